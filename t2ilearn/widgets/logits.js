// Sampling from logits: guidance, temperature, top-k, top-p, as `sample_from_logits`.

import {
  bar, button, randomNumbers, range, shell, show, slider, softmax, table, sampleIndex, widget,
} from "./shared.js";

const ROWS = 10;

// u + s (c − u): with s > 1 beyond what the caption asks for.
export function guide(conditional, unconditional, scale) {
  return conditional.map((c, i) => unconditional[i] + scale * (c - unconditional[i]));
}

// The probabilities to sample from. topK and topP are null where they are off.
export function probabilities(logits, { temperature = 1, topK = null, topP = null } = {}) {
  const top = Math.max(...logits);
  if (temperature === 0) {
    const first = logits.indexOf(top);
    return logits.map((_, i) => (i === first ? 1 : 0));
  }
  let left = logits.map((v) => (v - top) / temperature);
  if (topK !== null) {
    const least = [...left].sort((a, b) => b - a)[topK - 1];
    left = left.map((v) => (v < least ? -Infinity : v));
  }
  if (topP !== null) {
    const p = softmax(left);
    const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]);
    let sum = 0;
    for (const i of order) {
      sum += p[i];
      if (sum - p[i] >= topP) left[i] = -Infinity; // the likelier ones reach topP already
    }
  }
  return softmax(left);
}

function draw(model, el) {
  const conditional = model.get("logits");
  const unconditional = model.get("unconditional");
  const names = model.get("names");
  const guided = unconditional.length > 0;
  const size = conditional.length;
  const begin = () => ({ temperature: 1, topK: null, topP: null, scale: 1 });
  let [state, random, counts, draws] = [begin(), null, null, 0];
  const forget = () => {
    random = randomNumbers(model.get("seed"));
    counts = Array(size).fill(0);
    draws = 0;
    update();
  };
  const set = (name) => (value) => {
    state[name] = value;
    forget(); // counts of two different distributions must not be mixed
  };
  const ks = [1, 2, 3, 5, 8, 12, 20, 50, 100, 200, 500].filter((k) => k < size);
  const off = (v) => (v === null ? "off" : String(v));
  const sliders = {
    temperature: slider("Temperature τ", range(0, 3, 0.1), 1, set("temperature"), (v) => show(v, 1)),
    topK: slider("top-k", [...ks, null], null, set("topK"), off),
    topP: slider("top-p", [...range(0.1, 0.9, 0.1), 0.95, 0.99, null], null, set("topP"), off),
    scale: slider("Guidance scale s", range(0, 8, 0.5), 1, set("scale"), (v) => show(v, 1)),
  };
  const frame = shell(el, "Logit viewer: sampling from logits", () => {
    state = begin();
    Object.entries(sliders).forEach(([name, node]) => node.set(state[name]));
    forget();
  });
  const rows = document.createElement("div");
  rows.className = "t2i-wide";
  frame.body.append(rows);
  frame.controls.append(...Object.values(sliders).slice(0, guided ? 4 : 3));
  const throwTimes = (times) => {
    const p = current();
    for (let i = 0; i < times; i++) counts[sampleIndex(p, random())] += 1;
    draws += times;
    update();
  };
  frame.buttons.prepend(
    button("Sample 1", () => throwTimes(1)), button("Sample 100", () => throwTimes(100)));

  const current = () => {
    const logits = guided ? guide(conditional, unconditional, state.scale) : conditional;
    return probabilities(logits, state);
  };
  // The rows stay in the order of the unchanged logits, so that one can see what moves.
  const order = conditional.map((_, i) => i).sort((a, b) => conditional[b] - conditional[a]);
  const listed = order.slice(0, ROWS);
  const others = order.slice(ROWS);

  function update() {
    const p = current();
    const sum = (values, which) => which.reduce((all, i) => all + values[i], 0);
    const top = Math.max(...listed.map((i) => p[i]), sum(p, others));
    const row = (name, chance, drawn) => [
      name,
      bar(chance / top, chance > 0 && chance < 0.0005 ? "<0.001" : show(chance, 3)),
      draws ? String(drawn) : "–",
    ];
    const body = listed.map((i) => row(names[i], p[i], counts[i]));
    if (others.length) {
      body.push(row(`${others.length} others`, sum(p, others), sum(counts, others)));
    }
    const heads = [model.get("what"), "probability", "sampled"];
    rows.replaceChildren(table("Ordered as the model has them, unchanged", heads, body));
    const kept = p.filter((q) => q > 0).length;
    const best = p.indexOf(Math.max(...p));
    const spread = Math.exp(-p.reduce((all, q) => all + (q > 0 ? q * Math.log(q) : 0), 0));
    frame.say(
      `τ = ${show(state.temperature, 1)}, top-k ${off(state.topK)}, top-p ${off(state.topP)}` +
      (guided ? `, s = ${show(state.scale, 1)}` : "") +
      `: ${kept} of ${size} can be sampled. Likeliest is ${names[best]}, ${show(p[best], 3)}; perplexity ` +
      `${show(spread, 1)}.` + (draws ? ` ${draws} sampled.` : ""));
  }
  forget();
}

export default widget(draw);
