// The hinge lab: a discriminator's logits on a line, both networks' losses, and each gradient.

import { arrow, handle, line, note, plane, rove } from "./plane.js";
import { bar, button, choice, make, range, shell, show, table, widget } from "./shared.js";

const EDGE = 3; // logits go from −3 to 3
const FLOORS = { real: 6, fake: 0.9 }; // where each row's line is drawn

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

export function softplus(x) {
  return Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))); // no overflow
}

const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
const BENDS = {
  hinge: { value: (x) => Math.max(0, x + 1), slope: (x) => (x + 1 > 0 ? 1 : 0) },
  "non-saturating": { value: softplus, slope: sigmoid },
};

// What the discriminator minimises. As `hinge_loss` and `non_saturating_loss`.
export function discriminatorLoss(real, fake, loss) {
  const { value } = BENDS[loss];
  const onReal = mean(real.map((d) => value(-d))) / 2;
  const onFake = mean(fake.map(value)) / 2;
  return { real: onReal, fake: onFake, total: onReal + onFake };
}

// What the generator minimises. As `generator_loss`.
export function generatorLoss(fake, loss) {
  return loss === "hinge" ? -mean(fake) : mean(fake.map((d) => softplus(-d)));
}

// The gradient at each logit: the discriminator's for both rows, the generator's for the fakes.
export function gradients(real, fake, loss) {
  const { slope } = BENDS[loss];
  return {
    real: real.map((d) => -slope(-d) / 2 / real.length),
    fake: fake.map((d) => slope(d) / 2 / fake.length),
    generator: fake.map((d) => (loss === "hinge" ? -1 : -slope(-d)) / fake.length),
  };
}

function draw(model, el) {
  const begin = () => ({
    real: [...model.get("real")], fake: [...model.get("fake")], loss: model.get("loss"),
  });
  let state = begin();
  const frame = shell(el, "Hinge lab: two losses of one logit", () => {
    state = begin();
    loss.set(state.loss);
    update();
  });
  const p = plane("Logits of real and of generated patches, from −3 to 3",
    { x: [-EDGE - 0.3, EDGE + 0.3], y: [0, 10], width: 380, height: 340 });
  const [ground, arrows, grips] = [p.layer(), p.layer(), p.layer()];
  const height = (row, i) => FLOORS[row] + 0.5 + (2.6 * (i + 0.5)) / state[row].length;
  const points = (row, colour, name) => state[row].map((_, i) => handle(p, grips, {
    name: `${name} logit ${i + 1}`, axis: "x",
    shape: [make("circle", { r: 6.5, class: `t2i-mark ${colour}` })],
    get: () => [state[row][i], height(row, i)],
    move: ([d]) => {
      state[row][i] = Math.min(EDGE, Math.max(-EDGE, d));
      update();
    },
  }));
  const dots = { real: points("real", "t2i-f2", "Real"), fake: points("fake", "t2i-f3", "Generated") };
  rove(dots.real);
  rove(dots.fake);
  const names = [["hinge", "hinge"], ["non-saturating", "non-saturating"]];
  const loss = choice("Loss", names, state.loss, (value) => {
    state.loss = value;
    update();
  });
  const put = (real, fake) => () => {
    state.real = state.real.map((_, i) => real + 0.3 * (real && i % 2));
    state.fake = state.fake.map((_, i) => fake - 0.3 * (fake && i % 2));
    update();
  };
  const numbers = make("div", { class: "t2i-wide" });
  frame.body.append(p.svg, numbers, make("p", { class: "t2i-hint t2i-full" },
    "Drag the logits. An arrow is the negative gradient at a logit: blue for the discriminator " +
    "loss, orange for the generator loss, which generated patches alone have. Keyboard: Tab to a row, " +
    "Page Up and Page Down to another logit, arrow keys to move it."));
  frame.controls.append(loss);
  frame.buttons.prepend(button("Untrained discriminator", put(0, 0)),
    button("Certain discriminator", put(2, -2)));

  function scenery() {
    const row = (name, text, sign) => {
      const floor = FLOORS[name];
      const slope = range(-EDGE, EDGE, 0.1).map((d) =>
        [d, floor + 0.9 * BENDS[state.loss].value(sign * d)]);
      return [
        line(p, [[-EDGE, floor], [EDGE, floor]], "thin"),
        line(p, slope.filter(([, y]) => y < floor + 3.2), "faint dashed"),
        line(p, [[-sign, floor], [-sign, floor + 3.2]], "faint"),
        note(p, [-EDGE, floor + 3.4], text),
        ...range(-EDGE, EDGE, 1).map((d) => note(p, [d, floor - 0.6], show(d, 0), "middle")),
      ];
    };
    return [...row("real", "D(x), real", -1), ...row("fake", "D(x̂), generated", 1)];
  }

  function update() {
    const { real, fake } = state;
    const pull = gradients(real, fake, state.loss);
    const push = (row, kind, lift, colour) => state[row].map((d, i) => arrow(p,
      [d, height(row, i) + lift], [-pull[kind][i] * state[row].length * 1.2, 0], `heavy ${colour}`));
    ground.replaceChildren(...scenery());
    arrows.replaceChildren(...push("real", "real", 0, "t2i-s0"),
      ...push("fake", "fake", 0.12, "t2i-s0"), ...push("fake", "generator", -0.12, "t2i-s1"));
    [...dots.real, ...dots.fake].forEach((node) => node.place());

    const both = names.map(([name]) => discriminatorLoss(real, fake, name));
    const wish = names.map(([name]) => generatorLoss(fake, name));
    const most = Math.max(2, ...both.map((l) => l.total));
    const rows = [["on real", "real"], ["on generated", "fake"], ["discriminator, total", "total"]];
    const body = rows.map(([text, part]) => [text, ...both.map((l) => bar(l[part] / most, show(l[part])))]);
    body.push(["generator", ...wish.map((v) => show(v))]);
    numbers.replaceChildren(table(`Losses; the arrows belong to ${state.loss}`,
      ["loss", "hinge", "non-saturating"], body));

    const now = names.findIndex(([name]) => name === state.loss);
    const { total } = both[now];
    const felt = (list) => list.filter((g) => Math.abs(g) > 1e-9).length;
    const silent = state.loss === "hinge" ? 1 : Math.log(2);
    const verdict = Math.abs(total - silent) < 5e-4
      ? "as if all logits were 0" : total < silent
        ? "it distinguishes them" : "worse than if all logits were 0";
    frame.say(
      `The ${state.loss} discriminator loss is ${show(total, 3)}: ${verdict}. It has a gradient at ` +
      `${felt(pull.real)} of ${real.length} real and ${felt(pull.fake)} of ${fake.length} generated logits. ` +
      `The generator loss is ${show(wish[now], 3)}; its gradient, ` +
      `${show(mean(pull.generator.map(Math.abs)), 3)} per generated logit on average.`);
  }
  update();
}

export default widget(draw);
