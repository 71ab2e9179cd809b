// The Gumbel lab: a draw from K codes that one can differentiate, and what it costs.

import { arrow, dot, handle, line, note, plane, rove } from "./plane.js";
import {
  bar, button, check, make, randomNumbers, range, shell, show, slider, softmax, table, widget,
} from "./shared.js";

const EDGE = 3; // logits go from −3 to 3
const SIDE = 2.5; // the plane of codes, both ways
const CLOUD = 200;

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const largest = (values) => values.indexOf(Math.max(...values));

// Gumbel noise of a number in [0, 1). Half a step up, for the logarithm of 0 is none.
export function gumbel(u) {
  return -Math.log(-Math.log(u + 2 ** -33));
}

// The relaxed draw y = softmax((l + g) / τ).
export function relax(logits, noise, temperature) {
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

// What a decoder hears: the mean of the codes, weighted by y.
export function mix(y, codes) {
  return [0, 1].map((d) => y.reduce((sum, share, k) => sum + share * codes[k][d], 0));
}

// One draw in numbers; `far` is how far the mixture is from the nearest code.
export function measure(logits, noise, temperature, codes) {
  const y = relax(logits, noise, temperature);
  const point = mix(y, codes);
  return {
    y, point, winner: largest(y), entropy: entropy(y), top: Math.max(...y),
    far: Math.min(...codes.map(([a, b]) => Math.hypot(a - point[0], b - point[1]))),
    slope: slope(y, temperature),
  };
}

// Many draws in numbers: means, how the gradient's size spreads, and each code's share of wins.
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
  const codes = model.get("codes");
  const size = codes.length;
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
  const frame = shell(el, "Gumbel lab: a draw that one can differentiate", () => {
    state = begin();
    temperature.set(state.temperature);
    hard.set(state.hard);
    update();
  });
  const text = (v) => show(v, v < 1 ? 3 : 2);
  const temperature = slider("Temperature τ", range(-4, 2, 0.25).map((power) => 2 ** power),
    state.temperature, set("temperature"), text);
  const hard = check("Hard: hear one code, keep the soft gradient", state.hard, set("hard"));

  const left = plane("Logits, and the noise added to each",
    { x: [-0.7, size - 0.4], y: [-5.6, 8.4], width: 340, height: 340 });
  const [bars, grips] = [left.layer(), left.layer()];
  const right = plane("Codes, and what the decoder hears",
    { x: [-SIDE, SIDE], y: [-SIDE, SIDE], width: 340, height: 340 });
  const scene = right.layer();
  const within = { ...left, y: [-EDGE, EDGE] };
  const handles = codes.map((_, k) => handle(within, grips, {
    name: `Logit of code ${k}`, axis: "y",
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
    button("Draw", () => set("noise")(noises(state.random, 1)[0])),
    button(`${CLOUD} other draws`, () => set("cloud")(noises(state.others, CLOUD))));

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

  // Many draws as dots; where each is one code, as a disc whose area is the code's share.
  function crowd(draws, wins) {
    if (state.hard) {
      return codes.map((code, k) => faint(dot(right, code, 45 * Math.sqrt(wins[k]), `t2i-f${k % 6}`), 0.3));
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
    const now = measure(logits, noise, tau, codes);
    const draws = state.cloud.map((one) => measure(logits, one, tau, codes));
    const all = summary(draws, size);
    const heard = state.hard ? codes[now.winner] : now.point;
    const places = codes.flatMap((code, k) => [
      dot(right, code, 7, `t2i-mark t2i-f${k % 6}`),
      note(right, [code[0], code[1] + (code[1] < 0 ? -0.36 : 0.2)], String(k), "middle"),
    ]);
    bars.replaceChildren(...columns(now.winner));
    handles.forEach((node) => node.place());
    caption.textContent = state.hard
      ? "What the decoder hears: one code (filled square; discs: wins); the gradient is the mixture's (hollow)"
      : "What the decoder hears (square) and would in 200 other draws (dots); × is the mean by p";
    const [mx, my] = mix(p, codes);
    scene.replaceChildren(...crowd(draws, all.wins), ...places,
      note(right, [mx, my - 0.08], "×", "middle"),
      ...(state.hard ? [line(right, [now.point, heard], "dashed"), square(now.point, "t2i-mark t2i-hollow")] : []),
      square(heard, "t2i-mark t2i-ink"));
    const kl = klToUniform(p);
    shares.replaceChildren(table(
      `H(p) = ${show(entropy(p))}, KL(p ‖ uniform) = ln ${size} − H(p) = ${show(kl)} nats`,
      ["code", "p = softmax (l)", "g", "y = softmax ((l + g) / τ)", `wins, of ${CLOUD}`],
      p.map((v, k) => [String(k), bar(v, show(v), 0), show(noise[k]), bar(now.y[k], show(now.y[k]), 1),
        bar(all.wins[k], show(all.wins[k]), 2)])));
    const far = (one) => (state.hard ? "0.00" : show(one.far));
    sizes.replaceChildren(table("What the temperature trades",
      ["quantity", "this draw", `mean of ${CLOUD} draws`], [
        ["largest entry of y", show(now.top), show(all.top)],
        ["entropy of y, nats", show(now.entropy), show(all.entropy)],
        ["from heard to nearest code", far(now), far(all)],
        ["size of ∂y/∂l", show(now.slope),
          `${show(all.slope)} ± ${show(all.spread)}, at most ${show(all.steepest)}`],
      ]));
    const likeliest = largest(p);
    frame.say(
      `τ = ${text(tau)}, ${state.hard ? `hard: the decoder hears code ${now.winner} alone` :
        `soft: the decoder hears ${show(now.top)} of code ${now.winner} and the rest of others`}. ` +
      `Over ${CLOUD} draws the largest entry has ${show(all.top)}, the entropy is ${show(all.entropy)} ` +
      `nats, and the gradient's size ${show(all.slope)} with a standard deviation of ${show(all.spread)}. ` +
      `Code ${likeliest} wins ${show(all.wins[likeliest])} of them at any τ; its p is ` +
      `${show(p[likeliest])}. KL(p ‖ uniform) = ${show(kl)} nats.`);
  }
  update();
}

export default widget(draw);
