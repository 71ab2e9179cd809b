// First half of the codebook lab: which term moves what. The decoder is the identity, so that the
// reconstruction of a picture x is the code vector; x is drawn as a ring.

import { arrow, dot, handle, plane, rove } from "./plane.js";
import { button, check, make, shell, show, slider } from "./shared.js";
import { RATE, SIDE, cell, descend, lossTerms, termGradients } from "./codebook_maths.js";

const BETAS = [0, 0.1, 0.25, 0.5, 1, 2, 4, 8];
const LONGER = { vectors: 2, encodings: 18 }; // arrows show so many steps at once

export function diamond(kind, size = 9) {
  const d = `M0 ${-size}L${size} 0L0 ${size}L${-size} 0Z`;
  return make("path", { d, class: `t2i-mark ${kind}` });
}

export function renderTerms(model, el) {
  const start = () => ({
    z: model.get("encodings").map((p) => [...p]),
    x: model.get("encodings"),
    vectors: model.get("code_vectors").map((p) => [...p]),
    beta: model.get("beta"),
    steps: 0,
  });
  let state = start();
  const shown = { reconstruction: true, codebook: true, commitment: true };

  const frame = shell(el, "Codebook lab: three loss terms", () => {
    state = start();
    beta.set(state.beta);
    draw();
  });
  const p = plane("Code vectors, their cells, and encodings", { x: [-SIDE, SIDE], y: [-SIDE, SIDE] });
  const [cells, rings, arrows, points] = [p.layer(), p.layer(), p.layer(), p.layer()];

  const grip = (list, i, name, shape) => handle(p, points, {
    name,
    shape,
    get: () => state[list][i],
    move: (place) => {
      state[list][i] = place;
      draw();
    },
  });
  const dots = state.z.map((_, i) =>
    grip("z", i, `Encoding ${i + 1}`, [make("circle", { r: 5, class: "t2i-mark" })]));
  const vectors = state.vectors.map((_, k) => grip("vectors", k, `Code vector ${k + 1}`, [
    diamond(`t2i-f${k % 6}`),
    make("text", { x: 9, y: -7, "aria-hidden": "true" }, `e${k + 1}`),
  ]));
  rove(dots);
  rove(vectors);

  const step = (times) => {
    for (let i = 0; i < times; i++) {
      Object.assign(state, descend(state.x, state.z, state.vectors, state.beta, RATE));
      state.steps += 1;
    }
    draw();
  };
  const beta = slider("Commitment β", BETAS, state.beta, (value) => {
    state.beta = value;
    draw();
  });
  const texts = {
    reconstruction: "reconstruction (moves encodings, dashed)",
    codebook: "codebook (moves code vectors, thick)",
    commitment: "β × commitment (moves encodings)",
  };
  const boxes = Object.keys(texts).map((term) => check(texts[term], true, (on) => {
    shown[term] = on;
    draw();
  }));
  const legend = make("div", { class: "t2i-wide" },
    make("p", {}, "Drag dots (encodings) and diamonds (code vectors). An arrow shows where a term " +
      "moves a point. A ring is the target of an encoding's reconstruction."),
    make("fieldset", { class: "t2i-choice t2i-stack" }, make("legend", {}, "Arrows of"), ...boxes),
    make("p", { class: "t2i-hint" }, "Keyboard: Tab to the dots or the diamonds, Page Up and " +
      "Page Down to another one, arrow keys to move it. Arrows are drawn longer than the steps: " +
      `${LONGER.vectors} times for code vectors, ${LONGER.encodings} times for encodings.`));
  frame.body.append(p.svg, legend);
  frame.controls.append(beta);
  frame.buttons.prepend(button("Step", () => step(1)), button("20 steps", () => step(20)));

  function draw() {
    const { x, z, vectors: book, beta: weight } = state;
    const slope = termGradients(x, z, book, weight);
    const along = (g, longer) => {
      const size = Math.hypot(...g) * RATE * longer;
      const factor = -RATE * longer * (size > 1 ? 1 / size : 1); // none leaves the plane
      return g.map((v) => v * factor);
    };
    cells.replaceChildren(...book.map((_, k) => make("polygon", {
      points: cell(book, k, p.x, p.y).map(([a, b]) => `${p.px(a)},${p.py(b)}`).join(" "),
      class: `t2i-cell t2i-f${k % 6}`,
      "aria-hidden": "true",
    })));
    rings.replaceChildren(...x.map((place) => dot(p, place, 7, "t2i-ring")));
    const drawn = [];
    z.forEach((place, i) => {
      const colour = `t2i-s${slope.tokens[i] % 6}`;
      const sent = (term, kind) =>
        shown[term] && drawn.push(arrow(p, place, along(slope[term][i], LONGER.encodings), kind));
      sent("reconstruction", "t2i-dashed t2i-sink");
      sent("commitment", colour);
    });
    if (shown.codebook) {
      book.forEach((place, k) => drawn.push(
        arrow(p, place, along(slope.codebook[k], LONGER.vectors), `heavy t2i-s${k % 6}`)));
    }
    arrows.replaceChildren(...drawn);
    dots.forEach((node, i) => {
      node.place();
      node.querySelector(".t2i-mark").setAttribute("class", `t2i-mark t2i-f${slope.tokens[i] % 6}`);
    });
    vectors.forEach((node) => node.place());
    const loss = lossTerms(x, z, book, weight);
    const idle = book.flatMap((_, k) => (slope.tokens.includes(k) ? [] : [`e${k + 1}`]));
    const apart = Math.sqrt(2 * loss.codebook);
    frame.say(
      `After ${state.steps} steps, β = ${weight}: reconstruction ${show(loss.reconstruction, 3)}, ` +
      `codebook ${show(loss.codebook, 3)}, commitment ${show(loss.commitment, 3)}. Encodings are ` +
      `${show(apart)} from their code vectors (root mean square). ` +
      (idle.length ? `No encoding chooses ${idle.join(", ")}: no gradient, no step.` : "Every code is chosen."));
  }
  draw();
}
