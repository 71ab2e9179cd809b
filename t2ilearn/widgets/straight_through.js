// Straight through: what the encoder hears of the decoder's wish, past a staircase.

import { arrow, handle, line, note, plane } from "./plane.js";
import { button, choice, make, range, shell, show, slider, softmax, widget } from "./shared.js";

const RATE = 0.05;

export function nearestCode(z, codes) {
  const gaps = codes.map((e) => (z - e) ** 2);
  return codes[gaps.indexOf(Math.min(...gaps))];
}

// The soft stairs: a mean of all codes, near ones weighing more. τ → 0 gives back the stairs.
export function softCode(z, codes, temperature) {
  const weights = softmax(codes.map((e) => -((z - e) ** 2) / temperature));
  const mean = (values) => values.reduce((sum, v, i) => sum + weights[i] * v, 0);
  const tilt = codes.map((e) => (-2 * (z - e)) / temperature); // slope of each exponent
  const value = mean(codes);
  const slope = mean(codes.map((e, i) => e * tilt[i])) - value * mean(tilt);
  return { value, slope };
}

// (z_q − x)² + β (z − sg[e])²: what the decoder hears, and the gradient at z_q and at z.
// way: "true" derivative, "copied" past the step, or "soft" stairs instead of hard ones.
export function gradientThrough(z, wish, codes, way, beta, temperature) {
  const code = nearestCode(z, codes);
  const soft = softCode(z, codes, temperature);
  const heard = way === "soft" ? soft.value : code;
  const slope = { true: 0, copied: 1, soft: soft.slope }[way];
  const atHeard = 2 * (heard - wish);
  const commitment = 2 * beta * (z - code);
  return {
    heard,
    slope,
    loss: (heard - wish) ** 2 + beta * (z - code) ** 2,
    atHeard,
    atZ: slope * atHeard + commitment,
  };
}

function draw(model, el) {
  const begin = () => ({
    z: model.get("z"), wish: model.get("wish"), way: "copied",
    beta: 0, temperature: 0.3, steps: 0, path: [],
  });
  let state = begin();
  const change = (name) => (value) => {
    state[name] = value;
    [state.steps, state.path] = [0, []];
    update();
  };
  const frame = shell(el, "Straight through a staircase", () => {
    state = begin();
    way.set(state.way);
    beta.set(state.beta);
    temperature.set(state.temperature);
    update();
  });
  const codes = [...model.get("codes")].sort((a, b) => a - b);
  const gap = (codes[codes.length - 1] - codes[0]) * 0.15 || 1;
  const [low, high] = [codes[0] - gap, codes[codes.length - 1] + gap];
  const p = plane("Across: the encoding z. Up: what the decoder hears",
    { x: [low - gap * 0.8, high], y: [low - gap * 0.8, high], height: 360 });
  const [ground, moving, grips] = [p.layer(), p.layer(), p.layer()];
  const circle = (kind) => [make("circle", { r: 7, class: `t2i-mark ${kind}` })];
  const common = { step: (high - low) / 50 };
  const atZ = handle(p, grips, {
    ...common, name: "Encoding z", axis: "x", shape: circle("t2i-f0"),
    get: () => [state.z, low], move: ([z]) => change("z")(z),
  });
  const atWish = handle(p, grips, {
    ...common, name: "What the decoder wishes for", axis: "y", shape: circle("t2i-f1"),
    get: () => [low, state.wish], move: ([, wish]) => change("wish")(wish),
  });
  const ways = [["true", "true: 0"], ["copied", "copied"], ["soft", "soft stairs"]];
  const way = choice("Gradient", ways, state.way, change("way"));
  const beta = slider("Commitment β", [0, 0.1, 0.25, 0.5, 1, 2, 4], 0, change("beta"));
  const temperature = slider("Softness τ", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2],
    state.temperature, change("temperature"));
  frame.body.append(p.svg, make("div", { class: "t2i-wide" },
    make("p", {}, "Blue: the encoding z, and what it is told. Orange: what the decoder hears, " +
      "what it wishes for, and the arrow between them."),
    make("p", { class: "t2i-hint" }, "Drag the two dots on the edges, or Tab to them and use the " +
      "arrow keys. Step moves z against its gradient.")));
  frame.controls.append(way, beta, temperature);
  frame.buttons.prepend(button("Step", () => step(1)), button("20 steps", () => step(20)));

  function step(times) {
    for (let i = 0; i < times; i++) {
      const { atZ: slope } = gradientThrough(
        state.z, state.wish, codes, state.way, state.beta, state.temperature);
      state.z = Math.min(high, Math.max(low, state.z - RATE * slope));
      state.steps += 1;
      state.path.push(nearestCode(state.z, codes));
    }
    update();
  }

  function update() {
    const { z, wish, temperature: tau } = state;
    const all = range(low, high, (high - low) / 400);
    const treads = codes.map((e, i) => {
      const from = i ? (codes[i - 1] + e) / 2 : low;
      const to = i < codes.length - 1 ? (e + codes[i + 1]) / 2 : high;
      return line(p, [[from, e], [to, e]], "t2i-stair");
    });
    const ramp = line(p, [[low, low], [high, high]], "dashed faint");
    const soft = line(p, all.map((v) => [v, softCode(v, codes, tau).value]), "t2i-s2");
    const edges = line(p, [[low, high], [low, low], [high, low]], "faint");
    const digits = codes.every(Number.isInteger) ? 0 : 1;
    const levels = codes.map((e) => note(p, [low - gap * 0.12, e - gap * 0.08], show(e, digits), "end"));
    const names = [note(p, [high, low - gap * 0.45], "z", "end"), note(p, [low, high - gap * 0.3], " z_q")];
    const extra = state.way === "soft" ? [soft] : state.way === "copied" ? [ramp] : [];
    ground.replaceChildren(edges, ...treads, ...extra, ...levels, ...names);

    const now = gradientThrough(z, wish, codes, state.way, state.beta, tau);
    const size = (g) => Math.max(-gap * 3, Math.min(gap * 3, (-g * gap) / 2));
    moving.replaceChildren(
      line(p, [[z, low], [z, now.heard], [low, now.heard]], "dashed faint"),
      line(p, [[low, wish], [high, wish]], "dashed thin t2i-s1"),
      arrow(p, [z, now.heard], [0, size(now.atHeard)], "heavy t2i-s1"),
      arrow(p, [z, low], [size(now.atZ), 0], "heavy t2i-s0"));
    atZ.place();
    atWish.place();

    const best = nearestCode(wish, codes);
    const good = state.path.filter((e) => e === best).length;
    const told = { true: "multiplied by 0", copied: "copied", soft: `multiplied by ${show(now.slope)}` };
    frame.say(
      `z = ${show(z)} is heard as ${show(now.heard)}; the decoder wishes for ${show(wish)}. Its ` +
      `gradient ${show(now.atHeard)} is ${told[state.way]}` +
      (state.beta ? `, commitment adds ${show(now.atZ - now.slope * now.atHeard)}` : "") +
      `: z gets ${show(now.atZ)}. Loss ${show(now.loss, 3)}.` +
      (state.steps ? ` After ${state.steps} steps, ${Math.round((100 * good) / state.steps)} % of ` +
        `them in the best cell.` : ""));
  }
  update();
}

export default widget(draw);
