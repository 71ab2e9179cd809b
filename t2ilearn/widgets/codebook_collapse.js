// Second half of the codebook lab: a codebook that learns from encodings that stand still.

import { dot, plane } from "./plane.js";
import {
  button, check, choice, make, randomNumbers, range, shell, show, slider,
} from "./shared.js";
import {
  RATE, SIDE, averageStep, gradientStep, kmeansStart, nearest, newBook, perplexity, revive,
  shares,
} from "./codebook_maths.js";
import { diamond } from "./codebook_terms.js";

const DECAY = 0.9; // a code that nobody chooses is dead, below 0.03 uses a step, after 34 steps
const REVIVE_EVERY = 10;

export function renderCollapse(model, el) {
  const z = model.get("cloud");
  const wanted = { size: 16, begin: "random", update: "ema", revival: false };
  let [book, steps, revived, random] = [null, 0, 0, null];

  function restart() {
    random = randomNumbers(model.get("seed"));
    const first = [];
    while (first.length < wanted.size) {
      const i = Math.floor(random() * z.length);
      if (!first.includes(i)) first.push(i);
    }
    const onCloud = () => kmeansStart(z, first, 10, random);
    const codes = wanted.begin === "random" ? model.get("random_codes") : onCloud();
    book = newBook(codes.slice(0, wanted.size).map((code) => [...code]));
    [steps, revived] = [0, 0];
    draw();
  }

  function step(times) {
    for (let i = 0; i < times; i++) {
      const move = wanted.update === "ema" ? averageStep : gradientStep;
      book = move(book, z, DECAY, RATE);
      steps += 1;
      if (wanted.revival && steps % REVIVE_EVERY === 0) {
        revived += book.counts.filter((n) => n < 0.03).length;
        book = revive(book, z, random);
      }
    }
    draw();
  }

  const set = (name) => (value) => {
    wanted[name] = value;
    restart();
  };
  const size = slider("Codes K", range(2, 32, 1), wanted.size, set("size"));
  const begins = [["random", "random"], ["encodings", "at the encodings"]];
  const begin = choice("Start", begins, wanted.begin, set("begin"));
  const update = choice("Codes learn by", [["ema", "EMA"], ["gradient", "gradient"]],
    wanted.update, set("update"));
  const revival = check("Revive the dead every 10 steps", false, (on) => (wanted.revival = on));
  const frame = shell(el, "Codebook lab: collapse and its cures", () => {
    Object.assign(wanted, { size: 16, begin: "random", update: "ema", revival: false });
    size.set(wanted.size);
    begin.set(wanted.begin);
    update.set(wanted.update);
    revival.set(false);
    restart();
  });
  const p = plane("Encodings as dots, codes as diamonds", { x: [-SIDE, SIDE], y: [-SIDE, SIDE] });
  const [points, codes] = [p.layer(), p.layer()];
  const bars = plane("How often each code is chosen", { x: [0, 32], y: [0, 1], height: 150 });
  const side = make("div", { class: "t2i-wide" },
    make("p", {}, "Dots are encodings, which stand still. Diamonds are codes; a hollow one is " +
      "chosen by nobody. Below, how often each code is chosen."),
    bars.svg);
  frame.body.append(p.svg, side);
  frame.controls.append(size, begin, update, revival);
  frame.buttons.prepend(
    button("Step", () => step(1)), button("10 steps", () => step(10)),
    button("100 steps", () => step(100)));

  function draw() {
    const tokens = nearest(z, book.codes);
    const share = shares(tokens, book.codes.length);
    points.replaceChildren(...z.map((place, i) => dot(p, place, 3, `t2i-f${tokens[i] % 6}`)));
    codes.replaceChildren(...book.codes.map(([x, y], k) => {
      const mark = diamond(share[k] ? `t2i-f${k % 6}` : "t2i-hollow", share[k] ? 8 : 6);
      mark.setAttribute("transform", `translate(${p.px(x)} ${p.py(y)})`);
      return mark;
    }));
    const top = Math.max(...share);
    const width = 32 / share.length;
    bars.svg.replaceChildren(...share.map((q, k) => make("rect", {
      x: bars.px((k + 0.1) * width), width: bars.px(0.8 * width),
      y: bars.py(0.94 * (q / top)), height: Math.max(2, 150 - bars.py(0.94 * (q / top))),
      class: `t2i-f${k % 6}`, "aria-hidden": "true",
    })));
    const used = share.filter((q) => q > 0).length;
    const unit = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
    frame.say(
      `After ${unit(steps, "step")} ${used} of ${share.length} codes are in use, perplexity ` +
      `${show(perplexity(share), 1)}. The most popular is chosen by ${Math.round(100 * top)} % of ` +
      `the encodings.` + (revived ? ` ${unit(revived, "code")} revived so far.` : ""));
  }
  restart();
}
