// Attention as a weighted average: scores, softmax, weighted mean of values.

import { arrow, handle, line, plane, rove } from "./plane.js";
import { bar, check, choice, make, shell, show, slider, softmax, table, widget } from "./shared.js";

const SIDE = 2.5;

// Eq. 1 of Vaswani et al. with a temperature: softmax(q kᵀ / (√d τ)) v, all tokens at once.
// weighing "equal" gives every allowed token the same weight.
export function attend(queries, keys, values, { temperature = 1, causal = false, weighing = "qk" } = {}) {
  const root = Math.sqrt(queries[0].length) * temperature;
  const scores = queries.map((q, i) => keys.map((k, j) => {
    if (causal && j > i) return -Infinity;
    return weighing === "equal" ? 0 : q.reduce((sum, v, d) => sum + v * k[d], 0) / root;
  }));
  const weights = scores.map(softmax);
  const outputs = weights.map((row) =>
    values[0].map((_, d) => row.reduce((sum, w, j) => sum + w * values[j][d], 0)));
  return { scores, weights, outputs };
}

function draw(model, el) {
  const words = model.get("words");
  const copy = (name) => model.get(name).map((p) => [...p]);
  const begin = () => ({
    queries: copy("q"), keys: copy("k"), values: copy("v"),
    asks: model.get("asks"), temperature: 1, causal: false, weighing: "qk",
  });
  let state = begin();
  const set = (name) => (value) => {
    state[name] = value;
    update();
  };
  const frame = shell(el, "Attention: a weighted average", () => {
    state = begin();
    asks.set(state.asks);
    weighing.set(state.weighing);
    temperature.set(1);
    causal.set(false);
    update();
  });
  const options = words.map((word, i) => [i, word]);
  const asks = choice("Query of", options, state.asks, (i) => set("asks")(Number(i)));
  const weighing = choice("Weights from", [["equal", "nothing: all alike"], ["qk", "query · key"]],
    "qk", set("weighing"));
  const temperature = slider("Temperature τ", [0.1, 0.2, 0.5, 1, 2, 5, 10], 1, set("temperature"));
  const causal = check("Causal mask: no attention to later tokens", false, set("causal"));

  const size = { x: [-SIDE, SIDE], y: [-SIDE, SIDE], height: 300, width: 300 };
  const left = plane("Keys, and the chosen query", size);
  const right = plane("Values, and their weighted mean", size);
  const [under, grips] = [left.layer(), left.layer()];
  const [behind, over, holds] = [right.layer(), right.layer(), right.layer()];
  const point = (p, parent, list, i, name, shape) => handle(p, parent, {
    name,
    shape,
    get: () => state[list][i()],
    move: (place) => {
      state[list][i()] = place;
      update();
    },
  });
  const label = (text) => make("text", { x: 9, y: 4, "aria-hidden": "true" }, text);
  const keys = words.map((word, i) => point(left, grips, "keys", () => i, `Key of “${word}”`,
    [make("circle", { r: 6, class: `t2i-mark t2i-f${i % 6}` }), label(word)]));
  const square = { x: -6, y: -6, width: 12, height: 12, class: "t2i-mark t2i-ink" };
  const query = point(left, grips, "queries", () => state.asks, "Query", [make("rect", square)]);
  const values = words.map((word, i) => point(right, holds, "values", () => i, `Value of “${word}”`,
    [make("circle", { r: 6, class: `t2i-mark t2i-f${i % 6}` }), label(word)]));
  rove(keys);
  rove(values);
  const numbers = make("div", { class: "t2i-wide t2i-full" });
  const titled = (text, node) =>
    make("figure", { class: "t2i-half" }, make("figcaption", {}, text), node);
  frame.body.append(
    titled("Keys (dots) and the query (square, arrow)", left.svg),
    titled("Values (dots) and their weighted mean (square)", right.svg), numbers);
  frame.controls.append(asks, weighing, temperature, causal);
  frame.controls.after(make("p", { class: "t2i-hint" }, "Drag, or Tab to a point and use the " +
    "arrow keys; Page Up and Page Down go to another dot."));

  function update() {
    const { asks: i } = state;
    const { scores, weights, outputs } = attend(state.queries, state.keys, state.values, state);
    const axes = (p) => [line(p, [[-SIDE, 0], [SIDE, 0]], "faint"), line(p, [[0, -SIDE], [0, SIDE]], "faint")];
    under.replaceChildren(...axes(left), arrow(left, [0, 0], state.queries[i], "heavy t2i-sink"));
    behind.replaceChildren(...axes(right), ...state.values.map((v, j) => {
      const thread = line(right, [outputs[i], v], `t2i-s${j % 6}`);
      thread.setAttribute("style", `stroke-width:${8 * weights[i][j]}`);
      return thread;
    }));
    const [x, y] = outputs[i];
    over.replaceChildren(make("rect", {
      x: right.px(x) - 6, y: right.py(y) - 6, width: 12, height: 12, class: "t2i-mark t2i-ink",
      "aria-hidden": "true",
    }));
    [...keys, ...values, query].forEach((node) => node.place());
    query.setAttribute("aria-label", `Query of “${words[i]}”`);
    const number = (v) => (v === -Infinity ? "−∞" : show(v));
    numbers.replaceChildren(table(
      `Attention of “${words[i]}” to each token`,
      ["token", "score", "weight = softmax(score)"],
      words.map((word, j) => [word, number(scores[i][j]), bar(weights[i][j], show(weights[i][j]))])));
    const most = weights[i].indexOf(Math.max(...weights[i]));
    const whole = state.weighing === "equal" ? "All allowed tokens have equal weights" :
      `“${words[i]}” attends most to “${words[most]}”, weight ${show(weights[i][most])}`;
    const hidden = state.causal ? words.length - 1 - i : 0;
    frame.say(`${whole}. The mean of the values is (${show(x)}, ${show(y)}).` +
      (hidden ? ` ${hidden} later ${hidden === 1 ? "token is" : "tokens are"} hidden: score −∞, weight 0.` : ""));
  }
  update();
}

export default widget(draw);
