// What all widgets share: numbers, elements, controls, and the frame around them.
//
// Python joins this file with a widget's own into one module (see `base.py`): every name here is
// known there, so own files must not declare it again. Nothing touches the page on import.

// --- numbers -----------------------------------------------------------------------------------

export function softmax(scores) {
  const top = Math.max(...scores); // ≤ 0 below: no overflow
  const parts = scores.map((s) => Math.exp(s - top));
  const sum = parts.reduce((a, b) => a + b, 0);
  return parts.map((p) => p / sum);
}

export function range(from, to, step) {
  const count = Math.round((to - from) / step);
  return Array.from({ length: count + 1 }, (_, i) => Number((from + i * step).toFixed(6)));
}

// Numbers in [0, 1) that are the same in every browser (xorshift, Marsaglia 2003).
export function randomNumbers(seed) {
  let state = seed * 2654435761 + 1 | 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}

// The index that a number in [0, 1) selects, with probabilities in proportion to the weights.
export function sampleIndex(weights, u) {
  let left = u * weights.reduce((a, b) => a + b, 0);
  let last = 0;
  for (const [i, weight] of weights.entries()) {
    if (weight <= 0) continue;
    if (left < weight) return i;
    left -= weight;
    last = i; // rounding may leave a remainder: then the last possible one
  }
  return last;
}

// A number for people; screen readers know the true minus sign.
export function show(x, digits = 2) {
  const text = Math.abs(x).toFixed(digits);
  return (x < 0 && Number(text) !== 0 ? "−" : "") + text;
}

// --- elements ----------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = ["svg", "g", "path", "circle", "rect", "line", "text", "polygon"];

export function make(tag, attributes = {}, ...children) {
  const node = SVG_TAGS.includes(tag)
    ? document.createElementNS(SVG, tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// What anywidget wants: draw now, and again whenever the kernel gives the model other numbers.
export function widget(draw) {
  const render = ({ model, el }) => {
    const again = () => draw(model, el);
    model.on("change", again);
    again();
    return () => model.off("change", again);
  };
  return { render };
}

// The frame of a widget: title, body, controls, a sentence that says the state, and reset.
export function shell(el, title, reset) {
  const body = make("div", { class: "t2i-body" });
  const controls = make("div", { class: "t2i-controls" });
  const live = make("p", { class: "t2i-live", "aria-live": "polite" });
  const buttons = make("div", { class: "t2i-controls" });
  buttons.append(button("Reset", reset));
  const heading = make("p", { class: "t2i-title", "aria-hidden": "true" }, title);
  const root = make("div", { class: "t2i", role: "group", "aria-label": title });
  root.append(heading, body, controls, buttons, live);
  el.replaceChildren(root);
  let waiting = null;
  const say = (text) => {
    // A drag changes the state sixty times a second: speak when it rests.
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (live.textContent !== text) live.textContent = text;
    }, 120);
  };
  return { root, body, controls, buttons, say };
}

export function button(text, press) {
  return make("button", { type: "button", onclick: press }, text);
}

// A slider over a list of values. Returns the element, with `set` to move it silently.
export function slider(label, values, start, change, text = (v) => String(v)) {
  const output = make("span", { class: "t2i-value", "aria-hidden": "true" });
  const input = make("input", { type: "range", min: 0, max: values.length - 1, step: 1 });
  const update = () => {
    output.textContent = text(values[input.value]);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  const node = make("div", { class: "t2i-control" }, make("label", {}, label, input), output);
  node.set = (value) => {
    const gaps = values.map((v) => Math.abs(v - value));
    const same = values.indexOf(value);
    input.value = same >= 0 ? same : gaps.indexOf(Math.min(...gaps));
    update();
  };
  node.index = () => Number(input.value);
  input.addEventListener("input", () => {
    update();
    change(values[input.value]);
  });
  node.set(start);
  return node;
}

// One of a few, as radio buttons. `options` are [value, text].
export function choice(label, options, start, change) {
  const name = `t2i-${Math.random()}`; // radios of one name exclude each other, page-wide
  const group = make("fieldset", { class: "t2i-choice" }, make("legend", {}, label));
  const inputs = options.map(([value, text]) => {
    const input = make("input", { type: "radio", name, value, onchange: () => change(value) });
    group.append(make("label", {}, input, make("span", {}, text)));
    return input;
  });
  group.set = (value) => inputs.forEach((input) => (input.checked = input.value === String(value)));
  group.set(start);
  return group;
}

export function check(label, start, change) {
  const input = make("input", { type: "checkbox", onchange: () => change(input.checked) });
  const node = make("label", { class: "t2i-check" }, input, label);
  node.set = (value) => (input.checked = value);
  node.set(start);
  return node;
}

// A bar in a table cell, with its number beside it.
export function bar(share, text, colour = 0) {
  const inner = make("span", { class: `t2i-fill t2i-b${colour}` });
  inner.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  const number = make("span", {}, text);
  return make("span", { class: "t2i-bar" }, make("span", { "aria-hidden": "true" }, inner), number);
}

export function table(caption, head, rows) {
  const cells = (tag, row) => row.map((cell, i) => {
    const header = tag === "th" || i === 0;
    return make(header ? "th" : "td", header ? { scope: tag === "th" ? "col" : "row" } : {}, cell);
  });
  return make("table", {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...cells("th", head))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
}
