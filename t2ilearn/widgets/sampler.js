// The token sampler: a picture written like a sentence, one code after the other.

import { bar, button, choice, make, shell, show, slider, table, widget } from "./shared.js";

const PACE = 350; // milliseconds a code

// A map of attention: bytes in base64, each the root of a weight, which keeps small ones apart.
export function unpack(text) {
  return Array.from(atob(text), (letter) => (letter.charCodeAt(0) / 255) ** 2);
}

// Several maps' mean: of the heads of a layer.
export function average(maps) {
  return maps[0].map((_, i) => maps.reduce((sum, map) => sum + map[i], 0) / maps.length);
}

// What the query that draws code number `step` pays to whom. Rows grow by one code a step.
export function rowOf(map, step, words) {
  const from = step * (words + 2) + (step * (step - 1)) / 2;
  const row = map.slice(from, from + words + 2 + step);
  return {
    start: row[0], words: row.slice(1, words + 1), padding: row[words + 1], codes: row.slice(words + 2),
  };
}

const sideOf = (codes) => Math.round(Math.sqrt(codes.length));

export function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

function draw(model, el) {
  const drawings = model.get("drawings");
  const half = drawings[0].codes.length >> 1;
  const begin = () => ({ which: 0, step: half, layer: 0, head: -1 });
  let [state, timer] = [begin(), null];
  const known = {};
  const frame = shell(el, "Token sampler: a picture as a sentence", () => {
    stop();
    state = begin();
    build();
  });
  const [picture, words, chances] = ["figure", "div", "div"].map((tag) => make(tag));
  picture.style.cssText = "flex: 0 1 288px; width: 288px";
  words.style.marginTop = "12px";
  frame.body.append(picture, make("div", { class: "t2i-wide" }, chances, words));
  frame.controls.after(make("p", { class: "t2i-hint", style: "margin-top: 8px" }, "Each step shows the query that draws the " +
    "next code, framed on the canvas. It may look at the words and at the codes before: the larger a " +
    "dot, the more it looks there."));
  const play = button("Play", () => (timer === null ? start() : stop()));
  frame.buttons.prepend(play);
  let steps = null;

  // Controls depend on the drawing: how many codes, which layers, how many heads.
  function build() {
    const { codes, layers, attention } = drawings[state.which];
    const pick = (name) => (value) => {
      state[name] = Number(value);
      update();
    };
    steps = slider("Codes drawn", codes.map((_, i) => i).concat(codes.length), state.step, (step) => {
      stop();
      pick("step")(step);
    });
    steps.style.cssText = "flex: 1 1 100%; max-width: none";
    const captions = choice("Caption", drawings.map((one, i) => [i, one.caption]), state.which, (i) => {
      stop();
      state = { ...state, which: Number(i), layer: 0, head: -1 };
      state.step = Math.min(state.step, drawings[state.which].codes.length);
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
    const last = drawings[state.which].codes.length;
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

  // The canvas of this step, cut out of the sheet of all; dots where the query looks.
  function canvas({ sheet, codes, caption }, looks) {
    const { step } = state;
    const side = sideOf(codes);
    const columns = Math.ceil(Math.sqrt(codes.length + 1));
    const rows = Math.ceil((codes.length + 1) / columns);
    const part = (at, count) => (count > 1 ? (100 * at) / (count - 1) : 0);
    const node = make("div", { role: "img", "aria-label": `${step} codes of: ${caption}` });
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
    codes.forEach((_, i) => {
      const radius = i < step ? 0.42 * Math.sqrt((looks[i] || 0) / most) : 0;
      if (i >= step) svg.append(square(i, 0, blank));
      else if (radius > 0.05) svg.append(make("circle", {
        cx: (i % side) + 0.5, cy: Math.floor(i / side) + 0.5, r: radius,
        fill: "#fd0", stroke: "#000", "stroke-width": 0.05,
      }));
    });
    if (step < codes.length) {
      svg.append(square(step, 0.08, { stroke: "#000", "stroke-width": 0.16 }),
        square(step, 0.08, { stroke: "#fff", "stroke-width": 0.08 }));
    }
    node.append(svg);
    return node;
  }

  // One token, shaded by what it gets.
  function token(text, weight, faint = false) {
    const node = make("span", { role: "listitem" }, text, make("small", {}, ` ${show(weight)}`));
    node.style.cssText = "display: inline-block; padding: 1px 6px; margin: 0 3px 4px 0; " +
      "border-radius: 4px; border: 1px solid var(--rule); background: color-mix(in srgb, " +
      `var(--c0) ${(45 * Math.sqrt(Math.min(1, weight))).toFixed(1)}%, var(--ground));` +
      (faint ? "border-style: dashed; font-style: italic" : "");
    return node;
  }

  function sentence(one, row) {
    const list = make("div", { role: "list", "aria-label": "Attention paid to each token" },
      token("start", row.start, true), ...one.words.map((word, i) => token(word, row.words[i])),
      ...(one.padding ? [token(`${one.padding} × padding`, row.padding, true)] : []),
      ...(state.step ? [token(`${state.step} ${state.step === 1 ? "code" : "codes"} drawn`, sum(row.codes), true)] : []));
    return [make("p", { class: "t2i-hint" }, "Attention to each word, and in sum to the rest"), list];
  }

  function next({ codes, likeliest, chances: all, chosen }) {
    const { step } = state;
    const [first, p, code] = [likeliest[step], all[step], codes[step]];
    const rows = first.map((k, i) => [`${k}${k === code ? " ●" : ""}`, bar(p[i], show(p[i], 3))]);
    let at = first.indexOf(code);
    if (at < 0) at = rows.push([`${code} ●`, bar(chosen[step], show(chosen[step], 3))]) - 1;
    const rest = Math.max(0, 1 - sum(p) - (at < first.length ? 0 : chosen[step]));
    rows.push(["all others", bar(rest, show(rest, 3))]);
    const node = table("The likeliest next codes, before any are cut off; ● was drawn", ["code", "probability"], rows);
    node.tBodies[0].rows[at].className = "t2i-chosen";
    return node;
  }

  function update() {
    const one = drawings[state.which];
    const { step } = state;
    const done = step === one.codes.length;
    const row = done ? null : rowOf(mapOf(one), step, one.words.length);
    const title = make("figcaption", {}, `${step} of ${one.codes.length} codes: “${one.caption}”`);
    picture.replaceChildren(canvas(one, done ? [] : row.codes), title);
    chances.replaceChildren(done ? make("p", {}, "Nothing is left to draw.") : next(one));
    words.replaceChildren(...(done ? [] : sentence(one, row)));
    if (timer !== null) return; // while it plays, a voice could not keep up
    frame.say(done ? `All ${step} codes are drawn: ${one.caption}.` : told(one, row));
  }

  function told(one, row) {
    const { step, layer, head } = state;
    const side = sideOf(one.codes);
    const place = (i) => `row ${Math.floor(i / side) + 1}, column ${(i % side) + 1}`;
    const most = (values) => values.indexOf(Math.max(...values));
    const [word, code] = [most(row.words), most(row.codes)];
    const who = `layer ${one.layers[layer] + 1}, ${head < 0 ? "mean of heads" : `head ${head + 1}`}`;
    return `${step} codes drawn; next is ${place(step)}. In ${who}, its query pays ` +
      `${show(sum(row.words))} to words, most to “${one.words[word]}” (${show(row.words[word])}), ` +
      (step ? `${show(sum(row.codes))} to codes, most to ${place(code)} (${show(row.codes[code])}), ` : "") +
      `${show(row.start)} to start` + (one.padding ? `, ${show(row.padding)} to padding` : "") +
      `. Code ${one.codes[step]} is drawn, probability ${show(one.chosen[step], 3)}.`;
  }
  build();
}

export default widget(draw);
