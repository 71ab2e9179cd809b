// Second half of the codebook lab: a codebook that learns from encodings that stand still.

import { dot, plane } from "./plane.js";
import {
  button, check, choice, make, randomNumbers, range, shell, show, slider,
} from "./shared.js";
import {
  RATE, SIDE, averageStep, gradientStep, kmeansInit, nearest, newBook, perplexity,
  restartDeadCodes, shares,
} from "./codebook_maths.js";
import { diamond } from "./codebook_terms.js";

const DECAY = 0.9; // a code that is not chosen is dead, below 0.03 uses a step, after 34 steps
const RESTART_EVERY = 10;

export function renderCollapse(model, el) {
  const z = model.get("cloud");
  const wanted = { size: 16, begin: "random", update: "ema", restarts: false };
  let [book, steps, restarted, random] = [null, 0, 0, null];

  function restart() {
    random = randomNumbers(model.get("seed"));
    const first = [];
    while (first.length < wanted.size) {
      const i = Math.floor(random() * z.length);
      if (!first.includes(i)) first.push(i);
    }
    const onCloud = () => kmeansInit(z, first, 10, random);
    const vectors = wanted.begin === "random" ? model.get("random_code_vectors") : onCloud();
    book = newBook(vectors.slice(0, wanted.size).map((vector) => [...vector]));
    [steps, restarted] = [0, 0];
    draw();
  }

  function step(times) {
    for (let i = 0; i < times; i++) {
      const move = wanted.update === "ema" ? averageStep : gradientStep;
      book = move(book, z, DECAY, RATE);
      steps += 1;
      if (wanted.restarts && steps % RESTART_EVERY === 0) {
        restarted += book.counts.filter((n) => n < 0.03).length;
        book = restartDeadCodes(book, z, random);
      }
    }
    draw();
  }

  const set = (name) => (value) => {
    wanted[name] = value;
    restart();
  };
  const size = slider("Codebook size K", range(2, 32, 1), wanted.size, set("size"));
  const begins = [["random", "random"], ["encodings", "at the encodings"]];
  const begin = choice("Initialisation", begins, wanted.begin, set("begin"));
  const update = choice("Codebook learns by", [["ema", "EMA"], ["gradient", "gradient"]],
    wanted.update, set("update"));
  const restarts = check("Restart dead codes every 10 steps", false, (on) => (wanted.restarts = on));
  const frame = shell(el, "Codebook lab: collapse and its cures", () => {
    Object.assign(wanted, { size: 16, begin: "random", update: "ema", restarts: false });
    size.set(wanted.size);
    begin.set(wanted.begin);
    update.set(wanted.update);
    restarts.set(false);
    restart();
  });
  const p = plane("Encodings as dots, code vectors as diamonds", { x: [-SIDE, SIDE], y: [-SIDE, SIDE] });
  const [points, vectors] = [p.layer(), p.layer()];
  const bars = plane("How often each code vector is chosen", { x: [0, 32], y: [0, 1], height: 150 });
  const side = make("div", { class: "t2i-wide" },
    make("p", {}, "Dots are encodings, which do not move. Diamonds are code vectors; a hollow one " +
      "is chosen by no encoding. Below, how often each one is chosen."),
    bars.svg);
  frame.body.append(p.svg, side);
  frame.controls.append(size, begin, update, restarts);
  frame.buttons.prepend(
    button("Step", () => step(1)), button("10 steps", () => step(10)),
    button("100 steps", () => step(100)));

  function draw() {
    const tokens = nearest(z, book.vectors);
    const share = shares(tokens, book.vectors.length);
    points.replaceChildren(...z.map((place, i) => dot(p, place, 3, `t2i-f${tokens[i] % 6}`)));
    vectors.replaceChildren(...book.vectors.map(([x, y], k) => {
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
      `After ${unit(steps, "step")} ${used} of ${share.length} codes are used, perplexity ` +
      `${show(perplexity(share), 1)}. The most used is chosen by ${Math.round(100 * top)} % of ` +
      `the encodings.` + (restarted ? ` ${unit(restarted, "code")} restarted so far.` : ""));
  }
  restart();
}
