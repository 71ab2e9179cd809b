// One picture, damaged in three ways: which copy is the nearest? It depends on the distance.
// Everything was computed in Python; here it is looked up and put in order.

import { bar, make, shell, show, slider, table, widget } from "./shared.js";

// Places in the order of distance, the nearest first: [0.3, 0.1, 0.2] → [3, 1, 2].
export function ranks(distances) {
  return distances.map((d) => 1 + distances.filter((other) => other < d).length);
}

const ordinal = (n) => ["nearest", "second", "farthest"][n - 1];

function draw(model, el) {
  const damages = model.get("damages"); // [{ name, unit, strengths, pictures, distances }]
  const measures = model.get("measures"); // names of the distances
  const begin = () => damages.map((_, i) => model.get("start")[i]);
  let at = begin();
  const frame = shell(el, "Which copy is the nearest?", () => {
    at = begin();
    sliders.forEach((node, i) => node.set(damages[i].strengths[at[i]]));
    update();
  });
  const picture = (source, text) => {
    const image = make("img", { src: source, alt: text, class: "dark-light", draggable: "false" });
    const caption = make("figcaption", {}, text);
    return { image, caption, node: make("figure", {}, image, caption) };
  };
  const original = picture(model.get("original"), "the original");
  const copies = damages.map((damage) => picture("", damage.name));
  const sliders = damages.map((damage, i) =>
    slider(damage.name, damage.strengths, damage.strengths[at[i]], (value) => {
      at[i] = damage.strengths.indexOf(value);
      update();
    }, (value) => `${value}${damage.unit}`));
  const numbers = make("div", { class: "t2i-wide t2i-full" });
  const row = make("div", { class: "t2i-row" }, original.node, ...copies.map((c) => c.node));
  frame.body.append(row, numbers);
  frame.controls.append(...sliders);

  function update() {
    copies.forEach((copy, i) => {
      const damage = damages[i];
      copy.image.src = damage.pictures[at[i]];
      copy.caption.textContent = `${damage.name}, ${damage.strengths[at[i]]}${damage.unit}`;
      copy.image.alt = `the same, damaged by ${copy.caption.textContent}`;
    });
    const found = measures.map((_, m) => damages.map((damage, i) => damage.distances[at[i]][m]));
    const order = found.map(ranks);
    const cell = (m, i) => bar(found[m][i] / Math.max(...found[m]),
      `${show(found[m][i], 3)}, ${ordinal(order[m][i])}`, order[m][i] === 1 ? 2 : 0);
    numbers.replaceChildren(table("Distance from the original; green is the nearest",
      ["distance", ...damages.map((d) => d.name)],
      measures.map((name, m) => [name, ...damages.map((_, i) => cell(m, i))])));
    const nearest = measures.map((name, m) =>
      `${name}: ${damages[order[m].indexOf(1)].name} is nearest, ` +
      `${damages[order[m].indexOf(Math.max(...order[m]))].name} farthest`);
    const agree = new Set(order.map(String)).size === 1;
    frame.say(`${nearest.join("; ")}. ` + (agree ? "All rank alike." : "They disagree."));
  }
  update();
}

export default widget(draw);
