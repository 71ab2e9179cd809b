// The straight-through estimator: the gradient that the encoder gets through a step function.

import { arrow, handle, line, note, plane } from "./plane.js";
import { button, choice, make, range, shell, show, slider, softmax, widget } from "./shared.js";

const RATE = 0.05;

export function nearestCode(z, vectors) {
  const gaps = vectors.map((e) => (z - e) ** 2);
  return vectors[gaps.indexOf(Math.min(...gaps))];
}

// The soft steps: a mean of all code vectors, near ones with larger weights. τ → 0 gives the steps.
export function softCode(z, vectors, temperature) {
  const weights = softmax(vectors.map((e) => -((z - e) ** 2) / temperature));
  const mean = (values) => values.reduce((sum, v, i) => sum + weights[i] * v, 0);
  const tilt = vectors.map((e) => (-2 * (z - e)) / temperature); // slope of each exponent
  const value = mean(vectors);
  const slope = mean(vectors.map((e, i) => e * tilt[i])) - value * mean(tilt);
  return { value, slope };
}

// (z_q − x)² + β (z − sg[e])²: the decoder's input z_q, and the gradients at z_q and at z.
// way: "true" derivative, "copied" through the step, or that of "soft" steps.
export function gradientThrough(z, target, vectors, way, beta, temperature) {
  const code = nearestCode(z, vectors);
  const soft = softCode(z, vectors, temperature);
  const input = way === "soft" ? soft.value : code;
  const slope = { true: 0, copied: 1, soft: soft.slope }[way];
  const atInput = 2 * (input - target);
  const commitment = 2 * beta * (z - code);
  return {
    input,
    slope,
    loss: (input - target) ** 2 + beta * (z - code) ** 2,
    atInput,
    atZ: slope * atInput + commitment,
  };
}

function draw(model, el) {
  const begin = () => ({
    z: model.get("z"), target: model.get("target"), way: "copied",
    beta: 0, temperature: 0.3, steps: 0, path: [],
  });
  let state = begin();
  const change = (name) => (value) => {
    state[name] = value;
    [state.steps, state.path] = [0, []];
    update();
  };
  const frame = shell(el, "Straight-through estimator", () => {
    state = begin();
    way.set(state.way);
    beta.set(state.beta);
    temperature.set(state.temperature);
    update();
  });
  const vectors = [...model.get("code_vectors")].sort((a, b) => a - b);
  const gap = (vectors[vectors.length - 1] - vectors[0]) * 0.15 || 1;
  const [low, high] = [vectors[0] - gap, vectors[vectors.length - 1] + gap];
  const p = plane("Across: the encoding z. Up: the decoder's input z_q",
    { x: [low - gap * 0.8, high], y: [low - gap * 0.8, high], height: 360 });
  const [ground, moving, grips] = [p.layer(), p.layer(), p.layer()];
  const circle = (kind) => [make("circle", { r: 7, class: `t2i-mark ${kind}` })];
  const common = { step: (high - low) / 50 };
  const atZ = handle(p, grips, {
    ...common, name: "Encoding z", axis: "x", shape: circle("t2i-f0"),
    get: () => [state.z, low], move: ([z]) => change("z")(z),
  });
  const atTarget = handle(p, grips, {
    ...common, name: "Target of the reconstruction", axis: "y", shape: circle("t2i-f1"),
    get: () => [low, state.target], move: ([, target]) => change("target")(target),
  });
  const ways = [["true", "true: 0"], ["copied", "copied"], ["soft", "soft steps"]];
  const way = choice("Gradient", ways, state.way, change("way"));
  const beta = slider("Commitment β", [0, 0.1, 0.25, 0.5, 1, 2, 4], 0, change("beta"));
  const temperature = slider("Softness τ", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2],
    state.temperature, change("temperature"));
  frame.body.append(p.svg, make("div", { class: "t2i-wide" },
    make("p", {}, "Blue: the encoding z and its negative gradient. Orange: the decoder's input " +
      "z_q, the target of the reconstruction, and the negative gradient at z_q."),
    make("p", { class: "t2i-hint" }, "Drag the two dots on the edges, or Tab to them and use the " +
      "arrow keys. Step moves z against its gradient.")));
  frame.controls.append(way, beta, temperature);
  frame.buttons.prepend(button("Step", () => step(1)), button("20 steps", () => step(20)));

  function step(times) {
    for (let i = 0; i < times; i++) {
      const { atZ: slope } = gradientThrough(
        state.z, state.target, vectors, state.way, state.beta, state.temperature);
      state.z = Math.min(high, Math.max(low, state.z - RATE * slope));
      state.steps += 1;
      state.path.push(nearestCode(state.z, vectors));
    }
    update();
  }

  function update() {
    const { z, target, temperature: tau } = state;
    const all = range(low, high, (high - low) / 400);
    const treads = vectors.map((e, i) => {
      const from = i ? (vectors[i - 1] + e) / 2 : low;
      const to = i < vectors.length - 1 ? (e + vectors[i + 1]) / 2 : high;
      return line(p, [[from, e], [to, e]], "t2i-stair");
    });
    const ramp = line(p, [[low, low], [high, high]], "dashed faint");
    const soft = line(p, all.map((v) => [v, softCode(v, vectors, tau).value]), "t2i-s2");
    const edges = line(p, [[low, high], [low, low], [high, low]], "faint");
    const digits = vectors.every(Number.isInteger) ? 0 : 1;
    const levels = vectors.map((e) => note(p, [low - gap * 0.12, e - gap * 0.08], show(e, digits), "end"));
    const names = [note(p, [high, low - gap * 0.45], "z", "end"), note(p, [low, high - gap * 0.3], " z_q")];
    const extra = state.way === "soft" ? [soft] : state.way === "copied" ? [ramp] : [];
    ground.replaceChildren(edges, ...treads, ...extra, ...levels, ...names);

    const now = gradientThrough(z, target, vectors, state.way, state.beta, tau);
    const size = (g) => Math.max(-gap * 3, Math.min(gap * 3, (-g * gap) / 2));
    moving.replaceChildren(
      line(p, [[z, low], [z, now.input], [low, now.input]], "dashed faint"),
      line(p, [[low, target], [high, target]], "dashed thin t2i-s1"),
      arrow(p, [z, now.input], [0, size(now.atInput)], "heavy t2i-s1"),
      arrow(p, [z, low], [size(now.atZ), 0], "heavy t2i-s0"));
    atZ.place();
    atTarget.place();

    const best = nearestCode(target, vectors);
    const good = state.path.filter((e) => e === best).length;
    const passed = { true: "multiplied by 0", copied: "copied", soft: `multiplied by ${show(now.slope)}` };
    frame.say(
      `z = ${show(z)} is quantised to z_q = ${show(now.input)}; the target is ${show(target)}. The ` +
      `gradient at z_q, ${show(now.atInput)}, is ${passed[state.way]}` +
      (state.beta ? `, commitment adds ${show(now.atZ - now.slope * now.atInput)}` : "") +
      `: z gets ${show(now.atZ)}. Loss ${show(now.loss, 3)}.` +
      (state.steps ? ` After ${state.steps} steps, ${Math.round((100 * good) / state.steps)} % of ` +
        `them in the best cell.` : ""));
  }
  update();
}

export default widget(draw);
