// A viewer of pictures that were made beforehand: one or two sliders choose which is shown.

import { button, make, shell, slider, widget } from "./shared.js";

const PACE = 500; // milliseconds a frame

// The number of a frame from its places on the axes; the last axis runs fastest.
export function frameIndex(places, lengths) {
  return places.reduce((index, place, axis) => index * lengths[axis] + place, 0);
}

function draw(model, el) {
  const axes = model.get("axes"); // [{ name, values }]
  const frames = model.get("frames");
  const captions = model.get("captions");
  const marks = model.get("marks"); // [left, top, width, height] in parts of 1, or []
  const lengths = axes.map((axis) => axis.values.length);
  const begin = () => axes.map((axis, i) => axis.values.indexOf(model.get("start")[i]));
  let [places, timer] = [begin(), null];
  const frame = shell(el, model.get("title"), () => {
    stop();
    places = begin();
    sliders.forEach((node, i) => node.set(axes[i].values[places[i]]));
    update();
  });
  const image = make("img", { class: "dark-light", draggable: "false" });
  const mark = make("span", { class: "t2i-place" });
  const box = make("span", { class: "t2i-picture" }, image, mark);
  const caption = make("figcaption");
  const figure = make("figure", { class: "t2i-frames" }, box, caption);
  figure.style.width = `${model.get("width")}px`;
  const sliders = axes.map((axis, i) => slider(axis.name, axis.values, axis.values[places[i]], () => {
    stop();
    places[i] = sliders[i].index();
    update();
  }));
  frame.body.append(figure);
  frame.controls.append(...sliders);
  const play = button("Play", () => (timer === null ? start() : stop()));
  frame.buttons.prepend(play);

  function start() {
    const last = axes.length - 1; // play along the axis that runs fastest
    if (places[last] === lengths[last] - 1) places[last] = -1;
    const next = () => {
      places[last] += 1;
      sliders[last].set(axes[last].values[places[last]]);
      if (places[last] === lengths[last] - 1 || !play.isConnected) stop();
      update();
    };
    timer = setInterval(next, PACE);
    play.textContent = "Stop";
    next();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    if (places.every((place) => place >= 0)) update();
  }

  function update() {
    const index = frameIndex(places, lengths);
    const where = axes.map((axis, i) => `${axis.name} ${axis.values[places[i]]}`).join(", ");
    image.src = frames[index];
    image.alt = captions[index] ? `${where}: ${captions[index]}` : where;
    caption.textContent = captions[index] || where;
    const place = marks[index] || [];
    mark.hidden = place.length === 0;
    ["left", "top", "width", "height"].forEach((side, i) => {
      mark.style[side] = `${100 * (place[i] || 0)}%`;
    });
    // While it plays, a screen reader could not keep up.
    if (timer === null) frame.say(`Frame ${index + 1} of ${frames.length}: ${image.alt}`);
  }
  update();
}

export default widget(draw);
