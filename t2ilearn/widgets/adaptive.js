// The adaptive weight: λ and all that goes with it over a recorded run, and its arithmetic live.

import { line, note, plane } from "./plane.js";
import { bar, make, range, shell, show, slider, table, widget } from "./shared.js";

const DELTA = 1e-4;
const LARGEST = 1e4;
const LEFT = 48; // room for the numbers at the axes, of 380
const DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

// λ, and what the critic's gradient is afterwards. As `adaptive_weight`.
export function weigh(pictures, adversarial, share = 1) {
  const weight = Math.min(LARGEST, Math.max(0, pictures / (adversarial + DELTA)));
  return { weight, after: weight * adversarial, added: share * weight * adversarial };
}

// Three digits of any size: "0.0213", "4.1 × 10⁻⁶".
export function brief(x) {
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 0.001 && size < 99999) {
    return show(x, Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(size)))));
  }
  const [digits, power] = size.toExponential(1).split("e");
  const raised = [...String(Math.abs(power))].map((d) => DIGITS[d]).join("");
  return `${x < 0 ? "−" : ""}${Number(digits)} × 10${power < 0 ? "⁻" : ""}${raised}`;
}

// A round number without zeros at its end.
const plain = (x) => (x > 0 && x < 0.001 ? brief(x) : String(Number(x.toPrecision(3))));

// The ends of an axis around all that is shown; on a scale of logarithms, whole powers of ten.
export function ends(values, log) {
  const shown = log ? values.filter((v) => v > 0).map(Math.log10) : values;
  if (shown.length === 0) return [-1, 1];
  let [low, high] = [Math.min(...shown), Math.max(...shown)];
  if (log) [low, high] = [Math.floor(low), Math.ceil(high)];
  return low === high ? [low - 1, high + 1] : [low, high];
}

// When the critic begins to learn, and when it is first heard: places in the lists, or −1.
export function entries(curves) {
  return {
    learns: curves.critic.findIndex((v) => v !== 0),
    heard: curves.weight.findIndex((v) => v !== 0),
  };
}

const PANELS = [
  { title: "λ", log: true, lines: [["weight", 0, "λ"]] },
  { title: "critic's loss", lines: [["critic", 5, "critic's loss"]] },
  { title: "mean logits", lines: [["real_logit", 2, "real"], ["fake_logit", 3, "drawn"]] },
  { title: "pictures", log: true, lines: [["pixels", 0, "pixels"], ["perceptual", 1, "perceptual"]] },
];

// One row of the chart: the curves, with numbers at both ends of the axis.
function panel(p, top, { title, lines, log }, curves, steps) {
  const [low, high] = ends(lines.flatMap(([name]) => curves[name]), log);
  const up = (v) => top - 0.25 - 0.7 * (1 - ((log ? Math.log10(v) : v) - low) / (high - low));
  const text = (v) => (log ? plain(10 ** v) : brief(v));
  const span = p.x[1] - p.x[0];
  const parts = [
    line(p, [[steps[0], top - 0.95], [steps[steps.length - 1], top - 0.95]], "faint"),
    note(p, [p.x[0], top - 0.15], title),
    note(p, [steps[0], top - 0.32], `${text(high)} `, "end"),
    note(p, [steps[0], top - 0.95], `${text(low)} `, "end"),
  ];
  lines.forEach(([name, colour, label], i) => {
    const points = curves[name].flatMap((v, k) => (log && v <= 0 ? [] : [[steps[k], up(v)]]));
    if (points.length > 1) parts.push(line(p, points, `thin t2i-s${colour}`));
    if (lines.length === 1) return;
    const key = note(p, [p.x[1] - (i ? 0.01 : 0.27) * span, top - 0.15], `━ ${label}`, "end");
    key.style.fill = `var(--c${colour})`;
    parts.push(key);
  });
  return parts;
}

function draw(model, el) {
  const curves = model.get("curves");
  const steps = curves.step;
  const last = steps.length - 1;
  const begin = () => ({
    at: model.get("start"), pictures: model.get("pictures"),
    adversarial: model.get("adversarial"), share: model.get("share"),
  });
  let state = begin();
  const frame = shell(el, "The adaptive weight λ", () => {
    state = begin();
    cursor.set(steps[state.at]);
    Object.entries(sliders).forEach(([name, node]) => node.set(state[name]));
    update();
  });
  const room = ((steps[last] - steps[0]) * LEFT) / (380 - LEFT);
  const p = plane("Curves of a recorded run: λ, the critic's loss, mean logits, picture terms",
    { x: [steps[0] - room, steps[last] + room / 8], y: [0, PANELS.length], width: 380, height: 400 });
  p.svg.style.touchAction = "pan-y"; // sideways a finger moves the cursor, up and down the page
  const [ground, moving] = [p.layer(), p.layer()];
  const { learns, heard } = entries(curves);
  const marks = [learns, heard].filter((i) => i > 0).map((i) =>
    line(p, [[steps[i], 0], [steps[i], PANELS.length]], "dashed faint"));
  ground.append(...marks, ...PANELS.flatMap((one, i) => panel(p, PANELS.length - i, one, curves, steps)));
  const go = (event) => {
    const [x] = p.at(event);
    const gaps = steps.map((s) => Math.abs(s - x));
    state.at = gaps.indexOf(Math.min(...gaps));
    cursor.set(steps[state.at]);
    update();
  };
  p.svg.addEventListener("pointerdown", (event) => {
    p.svg.setPointerCapture(event.pointerId);
    go(event);
  });
  p.svg.addEventListener("pointermove", (event) => {
    if (p.svg.hasPointerCapture(event.pointerId)) go(event);
  });

  const change = (name) => (value) => {
    state[name] = value;
    update();
  };
  const sizes = range(-6, 0, 1).flatMap((k) => [1, 2, 5].map((n) => Number(`${n}e${k}`))).concat(10);
  const cursor = slider("Step", steps, steps[state.at], () => {
    state.at = cursor.index();
    update();
  });
  const sliders = {
    pictures: slider("‖∇ pictures‖", sizes, state.pictures, change("pictures"), plain),
    adversarial: slider("‖∇ adversarial‖", [0, ...sizes], state.adversarial,
      change("adversarial"), plain),
    share: slider("Term's weight × say", range(0, 1, 0.1), state.share, change("share"),
      (v) => show(v, 1)),
  };
  const [recorded, computed] = [make("div", { class: "t2i-full" }), make("div", { class: "t2i-full" })];
  frame.body.append(p.svg, make("div", { class: "t2i-wide" }, cursor, recorded,
    make("p", { class: "t2i-hint" }, "Drag across the curves, or use the slider. Dashed: the critic " +
      "begins to learn, and is first heard. λ and the picture terms are drawn by powers of ten.")),
    computed);
  frame.controls.append(...Object.values(sliders));

  function update() {
    const at = Object.fromEntries(Object.keys(curves).map((name) => [name, curves[name][state.at]]));
    moving.replaceChildren(line(p, [[at.step, 0], [at.step, PANELS.length]], "thin"));
    recorded.replaceChildren(table(`Recorded at step ${at.step}`, ["curve", "value"],
      PANELS.flatMap(({ lines, title }) => lines.map(([name, , label]) =>
        [lines.length > 1 && title === "mean logits" ? `logit, ${label}` : label, brief(at[name])]))));
    const { pictures, adversarial, share } = state;
    const { weight, after, added } = weigh(pictures, adversarial, share);
    const most = Math.max(pictures, adversarial, after);
    const rows = [["pictures", pictures, 0], ["adversarial, as it comes", adversarial, 1],
      ["× λ", after, 1], ["× λ × weight and say", added, 2]];
    computed.replaceChildren(table("Gradients at the decoder's last layer: lengths",
      ["term", `λ = ${brief(pictures)} / (${brief(adversarial)} + 0.0001) = ${brief(weight)}`],
      rows.map(([name, value, colour]) => [name, bar(value / most, brief(value), colour)])));
    const phase = learns < 0 || state.at < learns ? "There is no critic yet."
      : heard < 0 || state.at < heard ? "The critic learns alone." : "The critic is heard.";
    const limit = weight === LARGEST ? " (its limit)" : "";
    frame.say(
      `Step ${at.step}: λ ${brief(at.weight)}, critic's loss ${brief(at.critic)}, logits ` +
      `${brief(at.real_logit)} real and ${brief(at.fake_logit)} drawn, pixels ${brief(at.pixels)}, ` +
      `perceptual ${brief(at.perceptual)}. ${phase} With the sliders: λ ${brief(weight)}${limit}; the ` +
      `critic's gradient is ${brief(after / pictures)} of the pictures', ${brief(added / pictures)} with ` +
      "weight and say.");
  }
  update();
}

export default widget(draw);
