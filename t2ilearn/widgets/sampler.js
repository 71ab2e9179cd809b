// The token sampler: a picture sampled token by token, with the attention of each step.

import { bar, button, choice, make, shell, show, slider, table, widget } from "./shared.js";

const PACE = 350; // milliseconds per token

// A map of attention: bytes in base64, each the root of a weight, which keeps small ones apart.
export function unpack(text) {
  return Array.from(atob(text), (letter) => (letter.charCodeAt(0) / 255) ** 2);
}

// Several maps' mean: of the heads of a layer.
export function average(maps) {
  return maps[0].map((_, i) => maps.reduce((sum, map) => sum + map[i], 0) / maps.length);
}

// The attention of the query that predicts token number `step`. Rows grow by one token a step.
export function rowOf(map, step, text) {
  const from = step * (text + 2) + (step * (step - 1)) / 2;
  const row = map.slice(from, from + text + 2 + step);
  return {
    start: row[0], text: row.slice(1, text + 1), padding: row[text + 1], tokens: row.slice(text + 2),
  };
}

const sideOf = (tokens) => Math.round(Math.sqrt(tokens.length));

export function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

function draw(model, el) {
  const drawings = model.get("drawings");
  const half = drawings[0].tokens.length >> 1;
  const begin = () => ({ which: 0, step: half, layer: 0, head: -1 });
  let [state, timer] = [begin(), null];
  const known = {};
  const frame = shell(el, "Token sampler: a picture, token by token", () => {
    stop();
    state = begin();
    build();
  });
  const [picture, sentence, chances] = ["figure", "div", "div"].map((tag) => make(tag));
  picture.style.cssText = "flex: 0 1 288px; width: 288px";
  sentence.style.marginTop = "12px";
  frame.body.append(picture, make("div", { class: "t2i-wide" }, chances, sentence));
  frame.controls.after(make("p", { class: "t2i-hint", style: "margin-top: 8px" }, "Each step shows the query that predicts " +
    "the next token, framed on the canvas. It attends to the text and to the tokens before it: the " +
    "larger a dot, the larger its attention weight."));
  const play = button("Play", () => (timer === null ? start() : stop()));
  frame.buttons.prepend(play);
  let steps = null;

  // Controls depend on the drawing: how many tokens, which layers, how many heads.
  function build() {
    const { tokens, layers, attention } = drawings[state.which];
    const pick = (name) => (value) => {
      state[name] = Number(value);
      update();
    };
    steps = slider("Tokens sampled", tokens.map((_, i) => i).concat(tokens.length), state.step, (step) => {
      stop();
      pick("step")(step);
    });
    steps.style.cssText = "flex: 1 1 100%; max-width: none";
    const captions = choice("Caption", drawings.map((one, i) => [i, one.caption]), state.which, (i) => {
      stop();
      state = { ...state, which: Number(i), layer: 0, head: -1 };
      state.step = Math.min(state.step, drawings[state.which].tokens.length);
      build();
      // Controls are new: stay where one was, at the last of them.
      frame.controls.lastChild.querySelector("input:checked").focus();
    });
    captions.classList.add("t2i-stack");
    const numbers = attention[0].map((_, i) => [i, String(i + 1)]);
    frame.controls.replaceChildren(steps,
      choice("Layer", layers.map((layer, i) => [i, String(layer + 1)]), state.layer, pick("layer")),
      choice("Head", [[-1, "mean"], ...numbers], state.head, pick("head")),
      ...(drawings.length > 1 ? [captions] : []));
    update();
  }

  function start() {
    const last = drawings[state.which].tokens.length;
    if (state.step === last) state.step = -1;
    const next = () => {
      state.step += 1;
      steps.set(state.step);
      if (state.step === last || !play.isConnected) stop();
      else update();
    };
    timer = setInterval(next, PACE);
    play.textContent = "Pause";
    next();
  }

  function stop() {
    if (timer === null) return;
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    update();
  }

  // The attention of a layer's head, or their mean, unpacked once.
  function mapOf({ attention }) {
    const { which, layer, head } = state;
    const name = `${which} ${layer} ${head}`;
    known[name] ??= head < 0 ? average(attention[layer].map(unpack)) : unpack(attention[layer][head]);
    return known[name];
  }

  // The canvas of this step, cut out of the sheet of all; dots for the attention weights.
  function canvas({ sheet, tokens, caption }, looks) {
    const { step } = state;
    const side = sideOf(tokens);
    const columns = Math.ceil(Math.sqrt(tokens.length + 1));
    const rows = Math.ceil((tokens.length + 1) / columns);
    const part = (at, count) => (count > 1 ? (100 * at) / (count - 1) : 0);
    const node = make("div", { role: "img", "aria-label": `${step} tokens of: ${caption}` });
    node.style.cssText = `aspect-ratio: 1; background: url(${sheet}) ${part(step % columns, columns)}% ` +
      `${part(Math.floor(step / columns), rows)}% / ${100 * columns}% ${100 * rows}%; ` +
      "image-rendering: pixelated;";
    const svg = make("svg", { viewBox: `0 0 ${side} ${side}`, "aria-hidden": "true" });
    svg.style.cssText = "background: none; max-width: none";
    const square = (i, edge, looks) => make("rect", {
      x: (i % side) + edge, y: Math.floor(i / side) + edge, width: 1 - 2 * edge, height: 1 - 2 * edge,
      fill: "none", ...looks,
    });
    const blank = { stroke: "#fff", "stroke-opacity": 0.4, "stroke-width": 0.03 };
    const most = Math.max(...looks, 1e-9);
    tokens.forEach((_, i) => {
      const radius = i < step ? 0.42 * Math.sqrt((looks[i] || 0) / most) : 0;
      if (i >= step) svg.append(square(i, 0, blank));
      else if (radius > 0.05) svg.append(make("circle", {
        cx: (i % side) + 0.5, cy: Math.floor(i / side) + 0.5, r: radius,
        fill: "#fd0", stroke: "#000", "stroke-width": 0.05,
      }));
    });
    if (step < tokens.length) {
      svg.append(square(step, 0.08, { stroke: "#000", "stroke-width": 0.16 }),
        square(step, 0.08, { stroke: "#fff", "stroke-width": 0.08 }));
    }
    node.append(svg);
    return node;
  }

  // One token, shaded by its attention weight.
  function token(text, weight, faint = false) {
    const node = make("span", { role: "listitem" }, text, make("small", {}, ` ${show(weight)}`));
    node.style.cssText = "display: inline-block; padding: 1px 6px; margin: 0 3px 4px 0; " +
      "border-radius: 4px; border: 1px solid var(--rule); background: color-mix(in srgb, " +
      `var(--c0) ${(45 * Math.sqrt(Math.min(1, weight))).toFixed(1)}%, var(--ground));` +
      (faint ? "border-style: dashed; font-style: italic" : "");
    return node;
  }

  function listed(one, row) {
    const list = make("div", { role: "list", "aria-label": "Attention to each token" },
      token("start", row.start, true), ...one.text.map((word, i) => token(word, row.text[i])),
      ...(one.padding ? [token(`${one.padding} × padding`, row.padding, true)] : []),
      ...(state.step ? [token(`${state.step} image ${state.step === 1 ? "token" : "tokens"}`, sum(row.tokens), true)] : []));
    return [make("p", { class: "t2i-hint" }, "Attention to each text token, and in sum to the rest"), list];
  }

  function next({ tokens, likeliest, chances: all, chosen }) {
    const { step } = state;
    const [first, p, drawn] = [likeliest[step], all[step], tokens[step]];
    const rows = first.map((k, i) => [`${k}${k === drawn ? " ●" : ""}`, bar(p[i], show(p[i], 3))]);
    let at = first.indexOf(drawn);
    if (at < 0) at = rows.push([`${drawn} ●`, bar(chosen[step], show(chosen[step], 3))]) - 1;
    const rest = Math.max(0, 1 - sum(p) - (at < first.length ? 0 : chosen[step]));
    rows.push(["all others", bar(rest, show(rest, 3))]);
    const node = table("The likeliest next tokens, before top-k or top-p; ● was sampled", ["token", "probability"], rows);
    node.tBodies[0].rows[at].className = "t2i-chosen";
    return node;
  }

  function update() {
    const one = drawings[state.which];
    const { step } = state;
    const done = step === one.tokens.length;
    const row = done ? null : rowOf(mapOf(one), step, one.text.length);
    const title = make("figcaption", {}, `${step} of ${one.tokens.length} tokens: “${one.caption}”`);
    picture.replaceChildren(canvas(one, done ? [] : row.tokens), title);
    chances.replaceChildren(done ? make("p", {}, "All tokens are sampled.") : next(one));
    sentence.replaceChildren(...(done ? [] : listed(one, row)));
    if (timer !== null) return; // while it plays, a screen reader could not keep up
    frame.say(done ? `All ${step} tokens are sampled: ${one.caption}.` : described(one, row));
  }

  function described(one, row) {
    const { step, layer, head } = state;
    const side = sideOf(one.tokens);
    const place = (i) => `row ${Math.floor(i / side) + 1}, column ${(i % side) + 1}`;
    const most = (values) => values.indexOf(Math.max(...values));
    const [word, token] = [most(row.text), most(row.tokens)];
    const who = `layer ${one.layers[layer] + 1}, ${head < 0 ? "mean of heads" : `head ${head + 1}`}`;
    return `${step} tokens sampled; next is ${place(step)}. In ${who}, its query attends with ` +
      `${show(sum(row.text))} to the text, most to “${one.text[word]}” (${show(row.text[word])}), ` +
      (step ? `${show(sum(row.tokens))} to image tokens, most to ${place(token)} (${show(row.tokens[token])}), ` : "") +
      `${show(row.start)} to start` + (one.padding ? `, ${show(row.padding)} to padding` : "") +
      `. Token ${one.tokens[step]} is sampled, probability ${show(one.chosen[step], 3)}.`;
  }
  build();
}

export default widget(draw);
