// The adaptive weight: λ and all that goes with it over a recorded run, and its arithmetic live.

import { line, note, plane } from "./plane.js";
import { bar, make, range, shell, show, slider, table, widget } from "./shared.js";

const DELTA = 1e-4;
const LARGEST = 1e4;
const LEFT = 48; // room for the numbers at the axes, of 380
const DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

// λ, and the generator loss's gradient multiplied by it. As `adaptive_weight`.
export function weigh(pictures, generator, share = 1) {
  const weight = Math.min(LARGEST, Math.max(0, pictures / (generator + DELTA)));
  return { weight, after: weight * generator, added: share * weight * generator };
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

// When the discriminator begins to learn, and when the generator loss is first added to the
// generator's: places in the lists, or −1.
export function entries(curves) {
  return {
    learns: curves.discriminator_loss.findIndex((v) => v !== 0),
    added: curves.adaptive_weight.findIndex((v) => v !== 0),
  };
}

const PANELS = [
  { title: "λ", log: true, lines: [["adaptive_weight", 0, "λ"]] },
  { title: "discriminator loss", lines: [["discriminator_loss", 5, "discriminator loss"]] },
  { title: "mean logits", lines: [["logits_real", 2, "real"], ["logits_fake", 3, "generated"]] },
  { title: "picture terms", log: true, lines: [["pixels", 0, "pixels"], ["perceptual", 1, "perceptual"]] },
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
    at: model.get("start"), pictures: model.get("picture_loss"),
    generator: model.get("generator_loss"), share: model.get("share"),
  });
  let state = begin();
  const frame = shell(el, "The adaptive weight λ", () => {
    state = begin();
    cursor.set(steps[state.at]);
    Object.entries(sliders).forEach(([name, node]) => node.set(state[name]));
    update();
  });
  const room = ((steps[last] - steps[0]) * LEFT) / (380 - LEFT);
  const p = plane("Curves of a recorded run: λ, the discriminator loss, mean logits, picture terms",
    { x: [steps[0] - room, steps[last] + room / 8], y: [0, PANELS.length], width: 380, height: 400 });
  p.svg.style.touchAction = "pan-y"; // sideways a finger moves the cursor, up and down the page
  const [ground, moving] = [p.layer(), p.layer()];
  const { learns, added: entry } = entries(curves);
  const marks = [learns, entry].filter((i) => i > 0).map((i) =>
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
    pictures: slider("‖∇ picture terms‖", sizes, state.pictures, change("pictures"), plain),
    generator: slider("‖∇ generator loss‖", [0, ...sizes], state.generator,
      change("generator"), plain),
    share: slider("disc_weight × disc_factor", range(0, 1, 0.1), state.share, change("share"),
      (v) => show(v, 1)),
  };
  const [recorded, computed] = [make("div", { class: "t2i-full" }), make("div", { class: "t2i-full" })];
  frame.body.append(p.svg, make("div", { class: "t2i-wide" }, cursor, recorded,
    make("p", { class: "t2i-hint" }, "Drag across the curves, or use the slider. The dashed " +
      "lines show where the discriminator begins to learn, and where the generator loss is first " +
      "added. λ and the picture terms have a logarithmic axis.")),
    computed);
  frame.controls.append(...Object.values(sliders));

  function update() {
    const at = Object.fromEntries(Object.keys(curves).map((name) => [name, curves[name][state.at]]));
    moving.replaceChildren(line(p, [[at.step, 0], [at.step, PANELS.length]], "thin"));
    recorded.replaceChildren(table(`Recorded at step ${at.step}`, ["curve", "value"],
      PANELS.flatMap(({ lines, title }) => lines.map(([name, , label]) =>
        [lines.length > 1 && title === "mean logits" ? `logit, ${label}` : label, brief(at[name])]))));
    const { pictures, generator, share } = state;
    const { weight, after, added } = weigh(pictures, generator, share);
    const most = Math.max(pictures, generator, after);
    const rows = [["picture terms", pictures, 0], ["generator loss", generator, 1],
      ["generator loss × λ", after, 1], ["× disc_weight × disc_factor", added, 2]];
    computed.replaceChildren(table("Gradients at the decoder's last layer: lengths",
      ["term", `λ = ${brief(pictures)} / (${brief(generator)} + 0.0001) = ${brief(weight)}`],
      rows.map(([name, value, colour]) => [name, bar(value / most, brief(value), colour)])));
    const phase = learns < 0 || state.at < learns ? "There is no discriminator yet."
      : entry < 0 || state.at < entry ? "The discriminator learns alone."
        : "The generator loss is added.";
    const limit = weight === LARGEST ? " (its limit)" : "";
    frame.say(
      `Step ${at.step}: λ ${brief(at.adaptive_weight)}, discriminator loss ` +
      `${brief(at.discriminator_loss)}, mean logits ${brief(at.logits_real)} real and ` +
      `${brief(at.logits_fake)} generated, pixels ${brief(at.pixels)}, ` +
      `perceptual ${brief(at.perceptual)}. ${phase} With the sliders: λ ${brief(weight)}${limit}; the ` +
      `generator loss's gradient is ${brief(after / pictures)} times that of the picture terms, ` +
      `${brief(added / pictures)} times with disc_weight and disc_factor.`);
  }
  update();
}

export default widget(draw);
