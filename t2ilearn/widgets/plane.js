// A plane to draw in: lines, dots, arrows, and points to drag by mouse, touch or arrow keys.

import { make, show } from "./shared.js";

// A drawing with axes from x[0] to x[1] and, upwards, y[0] to y[1]. Layers are drawn in order.
export function plane(label, { x, y, width = 360, height = 360 }) {
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });
  const px = (v) => ((v - x[0]) / (x[1] - x[0])) * width;
  const py = (v) => ((y[1] - v) / (y[1] - y[0])) * height;
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    const right = (event.clientX - box.left) / box.width;
    const up = 1 - (event.clientY - box.top) / box.height;
    return [x[0] + right * (x[1] - x[0]), y[0] + up * (y[1] - y[0])];
  };
  const layer = () => svg.appendChild(make("g"));
  return { svg, x, y, px, py, at, layer };
}

export function line(p, points, kind) {
  const d = points.map(([x, y], i) => `${i ? "L" : "M"}${p.px(x)} ${p.py(y)}`).join("");
  return make("path", { d, class: `t2i-line ${kind}`, "aria-hidden": "true" });
}

export function dot(p, [x, y], radius, kind) {
  return make("circle", {
    cx: p.px(x), cy: p.py(y), r: radius, class: kind, "aria-hidden": "true",
  });
}

export function note(p, [x, y], text, anchor = "start") {
  const at = { x: p.px(x), y: p.py(y), "text-anchor": anchor, "aria-hidden": "true" };
  return make("text", at, text);
}

// An arrow from a point along a step; nothing where the step is too short to be seen.
export function arrow(p, [x, y], [dx, dy], kind) {
  const [x0, y0, x1, y1] = [p.px(x), p.py(y), p.px(x + dx), p.py(y + dy)];
  const length = Math.hypot(x1 - x0, y1 - y0);
  if (length < 1.5) return make("g");
  const [ux, uy] = [(x1 - x0) / length, (y1 - y0) / length];
  const barb = Math.min(7, 0.6 * length);
  const wing = (side) =>
    `L${x1 - barb * ux + side * barb * 0.6 * uy} ${y1 - barb * uy - side * barb * 0.6 * ux}`;
  const d = `M${x0} ${y0}L${x1} ${y1}${wing(1)}M${x1} ${y1}${wing(-1)}`;
  return make("path", { d, class: `t2i-arrow ${kind}`, "aria-hidden": "true" });
}

// A point to drag by mouse, touch or arrow keys. `get` and `move` speak the plane's numbers; with
// `axis` "x" or "y" only that number changes. `place` follows the point.
export function handle(p, parent, { name, get, move, shape, axis = null, step = 0.1 }) {
  const node = make("g", { class: "t2i-handle", role: "slider", tabindex: 0, "aria-label": name });
  node.append(make("circle", { r: 16, class: "t2i-reach" }), ...shape);
  const within = (v, [low, high]) => Math.min(high, Math.max(low, v));
  const go = ([x, y]) => {
    const [ox, oy] = get();
    move([axis === "y" ? ox : within(x, p.x), axis === "x" ? oy : within(y, p.y)]);
  };
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  node.addEventListener("keydown", (event) => {
    const by = keys[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation(); // or the notebook moves on to the next cell
    const size = step * (event.shiftKey ? 5 : 1);
    go(get().map((v, i) => v + size * by[i]));
  });
  node.addEventListener("pointerdown", (event) => {
    node.setPointerCapture(event.pointerId);
    node.focus();
    event.preventDefault();
  });
  // A finger drags the point and not the page; `touch-action` does not reach into drawings.
  node.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  node.addEventListener("pointermove", (event) => {
    if (node.hasPointerCapture(event.pointerId)) go(p.at(event));
  });
  node.place = () => {
    const [x, y] = get();
    node.setAttribute("transform", `translate(${p.px(x)} ${p.py(y)})`);
    const [now, limits] = axis === "y" ? [y, p.y] : [x, p.x];
    const text = axis ? show(now) : `${show(x)} across, ${show(y)} up`;
    const values = { min: limits[0], max: limits[1], now: now.toFixed(2), text };
    for (const [key, value] of Object.entries(values)) node.setAttribute(`aria-value${key}`, value);
  };
  node.place();
  return parent.appendChild(node);
}

// Many points are one stop of the Tab key; Page Up and Page Down go from one to the next.
export function rove(handles) {
  const only = (chosen) => handles.forEach((h, i) => h.setAttribute("tabindex", i === chosen ? 0 : -1));
  handles.forEach((h, i) => {
    h.addEventListener("focus", () => only(i));
    h.addEventListener("keydown", (event) => {
      const by = { PageDown: 1, PageUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      handles[(i + by + handles.length) % handles.length].focus();
    });
  });
  only(0);
}
