// The Gumbel lab: Gumbel-softmax samples of K tokens, and their gradients.

import { arrow, dot, handle, line, note, plane, rove } from "./plane.js";
import {
  bar, button, check, make, randomNumbers, range, shell, show, slider, softmax, table, widget,
} from "./shared.js";

const EDGE = 3; // logits go from −3 to 3
const SIDE = 2.5; // the plane of code vectors, both ways
const CLOUD = 200;

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const largest = (values) => values.indexOf(Math.max(...values));

// Gumbel noise of a number in [0, 1). Half a step up, for the logarithm of 0 is none.
export function gumbel(u) {
  return -Math.log(-Math.log(u + 2 ** -33));
}

// The Gumbel-softmax sample y = softmax((l + g) / τ). As `gumbel_softmax`.
export function gumbelSoftmax(logits, noise, temperature) {
  return softmax(logits.map((l, k) => (l + noise[k]) / temperature));
}

export function entropy(p) {
  return -p.reduce((sum, v) => sum + (v > 0 ? v * Math.log(v) : 0), 0);
}

// KL(p ‖ uniform) = ln K − H(p), in nats.
export function klToUniform(p) {
  return Math.log(p.length) - entropy(p);
}

// ∂y/∂l = (diag(y) − y yᵀ) / τ, and its length (Frobenius).
export function jacobian(y, temperature) {
  return y.map((a, i) => y.map((b, j) => ((i === j ? a : 0) - a * b) / temperature));
}

export function slope(y, temperature) {
  return Math.hypot(...jacobian(y, temperature).flat());
}

// A decoder's input: the mean of the code vectors, weighted by y.
export function mix(y, vectors) {
  return [0, 1].map((d) => y.reduce((sum, share, k) => sum + share * vectors[k][d], 0));
}

// One sample in numbers; `far` is how far the mixture is from the nearest code vector.
export function measure(logits, noise, temperature, vectors) {
  const y = gumbelSoftmax(logits, noise, temperature);
  const point = mix(y, vectors);
  return {
    y, point, winner: largest(y), entropy: entropy(y), top: Math.max(...y),
    far: Math.min(...vectors.map(([a, b]) => Math.hypot(a - point[0], b - point[1]))),
    slope: slope(y, temperature),
  };
}

// Many samples in numbers: means, the spread of the gradient's size, each token's share of wins.
export function summary(draws, size) {
  const of = (name) => draws.map((one) => one[name]);
  const [slopes, centre] = [of("slope"), mean(of("slope"))];
  return {
    entropy: mean(of("entropy")), top: mean(of("top")), far: mean(of("far")), slope: centre,
    spread: Math.sqrt(mean(slopes.map((s) => (s - centre) ** 2))), steepest: Math.max(...slopes),
    wins: Array.from({ length: size }, (_, k) => mean(of("winner").map((w) => Number(w === k)))),
  };
}

function draw(model, el) {
  const vectors = model.get("code_vectors");
  const size = vectors.length;
  const noises = (random, count) => Array.from({ length: count }, () =>
    Array.from({ length: size }, () => gumbel(random())));
  const begin = () => {
    const [random, others] = [0, 1].map((n) => randomNumbers(2 * model.get("seed") + n + 1));
    return {
      logits: [...model.get("logits")], temperature: model.get("temperature"),
      hard: false, random, others, noise: noises(random, 1)[0],
      cloud: noises(others, CLOUD),
    };
  };
  let state = begin();
  const set = (name) => (value) => {
    state[name] = value;
    update();
  };
  const frame = shell(el, "Gumbel lab: differentiable samples", () => {
    state = begin();
    temperature.set(state.temperature);
    hard.set(state.hard);
    update();
  });
  const text = (v) => show(v, v < 1 ? 3 : 2);
  const temperature = slider("Temperature τ", range(-4, 2, 0.25).map((power) => 2 ** power),
    state.temperature, set("temperature"), text);
  const hard = check("Hard: one code vector, with the soft gradient", state.hard, set("hard"));

  const left = plane("Logits, and the noise added to each",
    { x: [-0.7, size - 0.4], y: [-5.6, 8.4], width: 340, height: 340 });
  const [bars, grips] = [left.layer(), left.layer()];
  const right = plane("Code vectors, and the decoder's input",
    { x: [-SIDE, SIDE], y: [-SIDE, SIDE], width: 340, height: 340 });
  const scene = right.layer();
  const within = { ...left, y: [-EDGE, EDGE] };
  const handles = vectors.map((_, k) => handle(within, grips, {
    name: `Logit of token ${k}`, axis: "y",
    shape: [make("circle", { r: 6.5, class: `t2i-mark t2i-f${k % 6}` })],
    get: () => [k, state.logits[k]],
    move: ([, l]) => {
      state.logits[k] = Number(l.toFixed(6));
      update();
    },
  }));
  rove(handles);
  const titled = (words, node) =>
    make("figure", { class: "t2i-half" }, make("figcaption", {}, words), node);
  const caption = make("figcaption");
  const [shares, sizes] = [make("div", { class: "t2i-full" }), make("div", { class: "t2i-full" })];
  frame.body.append(
    titled("Logits l (dots) and l + g, each with its noise (arrows)", left.svg),
    make("figure", { class: "t2i-half" }, caption, right.svg), shares, sizes);
  frame.controls.append(temperature, hard);
  frame.controls.after(make("p", { class: "t2i-hint", style: "margin-top: 8px" }, "Drag the dots of the logits. Keyboard: " +
    "Tab to them, Page Up and Page Down to another logit, arrow keys to move it."));
  frame.buttons.prepend(
    button("Sample", () => set("noise")(noises(state.random, 1)[0])),
    button(`${CLOUD} other samples`, () => set("cloud")(noises(state.others, CLOUD))));

  function columns(winner) {
    const { logits, noise } = state;
    const axis = [line(left, [[-0.7, 0], [size - 0.4, 0]], "thin"),
      ...[-3, 3, 6].flatMap((v) => [line(left, [[-0.7, v], [size - 0.4, v]], "faint"),
        note(left, [-0.68, v + 0.15], show(v, 0))])];
    return axis.concat(logits.flatMap((l, k) => [
      make("rect", {
        x: left.px(k) - 7, width: 14, y: left.py(Math.max(0, l)), "fill-opacity": 0.35,
        height: Math.abs(left.py(l) - left.py(0)), class: `t2i-f${k % 6}`, "aria-hidden": "true",
      }),
      arrow(left, [k, l], [0, noise[k]], `t2i-s${k % 6}${k === winner ? " heavy" : ""}`),
      note(left, [k, -5.3], k === winner ? `▲ ${k}` : String(k), "middle"),
    ]));
  }

  function faint(node, opacity) {
    node.setAttribute("fill-opacity", opacity);
    return node;
  }

  // Many samples as dots; where each is one code vector, as a disc whose area is its share.
  function crowd(draws, wins) {
    if (state.hard) {
      return vectors.map((place, k) => faint(dot(right, place, 45 * Math.sqrt(wins[k]), `t2i-f${k % 6}`), 0.3));
    }
    return draws.map(({ point, winner }) => {
      return faint(dot(right, point, 2.4, `t2i-f${winner % 6}`), 0.6);
    });
  }

  function square([x, y], kind) {
    return make("rect", {
      x: right.px(x) - 6, y: right.py(y) - 6, width: 12, height: 12, class: kind, "aria-hidden": "true",
    });
  }

  function update() {
    const { logits, noise, temperature: tau } = state;
    const p = softmax(logits);
    const now = measure(logits, noise, tau, vectors);
    const draws = state.cloud.map((one) => measure(logits, one, tau, vectors));
    const all = summary(draws, size);
    const input = state.hard ? vectors[now.winner] : now.point;
    const places = vectors.flatMap((place, k) => [
      dot(right, place, 7, `t2i-mark t2i-f${k % 6}`),
      note(right, [place[0], place[1] + (place[1] < 0 ? -0.36 : 0.2)], String(k), "middle"),
    ]);
    bars.replaceChildren(...columns(now.winner));
    handles.forEach((node) => node.place());
    caption.textContent = state.hard
      ? "The decoder's input: one code vector (filled square; discs: wins); the gradient is the mixture's (hollow)"
      : "The decoder's input in this sample (square) and in 200 others (dots); × is the mean under p";
    const [mx, my] = mix(p, vectors);
    scene.replaceChildren(...crowd(draws, all.wins), ...places,
      note(right, [mx, my - 0.08], "×", "middle"),
      ...(state.hard ? [line(right, [now.point, input], "dashed"), square(now.point, "t2i-mark t2i-hollow")] : []),
      square(input, "t2i-mark t2i-ink"));
    const kl = klToUniform(p);
    shares.replaceChildren(table(
      `H(p) = ${show(entropy(p))}, KL(p ‖ uniform) = ln ${size} − H(p) = ${show(kl)} nats`,
      ["token", "p = softmax (l)", "g", "y = softmax ((l + g) / τ)", `wins, of ${CLOUD}`],
      p.map((v, k) => [String(k), bar(v, show(v), 0), show(noise[k]), bar(now.y[k], show(now.y[k]), 1),
        bar(all.wins[k], show(all.wins[k]), 2)])));
    const far = (one) => (state.hard ? "0.00" : show(one.far));
    sizes.replaceChildren(table("The effect of the temperature",
      ["quantity", "this sample", `mean of ${CLOUD} samples`], [
        ["largest entry of y", show(now.top), show(all.top)],
        ["entropy of y, nats", show(now.entropy), show(all.entropy)],
        ["distance of the input to the nearest code vector", far(now), far(all)],
        ["size of ∂y/∂l", show(now.slope),
          `${show(all.slope)} ± ${show(all.spread)}, at most ${show(all.steepest)}`],
      ]));
    const likeliest = largest(p);
    frame.say(
      `τ = ${text(tau)}, ${state.hard ? `hard: the decoder's input is code vector ${now.winner} alone` :
        `soft: the decoder's input is ${show(now.top)} of code vector ${now.winner} and a mixture of the others`}. ` +
      `Over ${CLOUD} samples the largest entry has ${show(all.top)}, the entropy is ${show(all.entropy)} ` +
      `nats, and the gradient's size ${show(all.slope)} with a standard deviation of ${show(all.spread)}. ` +
      `Token ${likeliest} has the largest l + g in ${show(all.wins[likeliest])} of them at any τ; its p is ` +
      `${show(p[likeliest])}. KL(p ‖ uniform) = ${show(kl)} nats.`);
  }
  update();
}

export default widget(draw);
