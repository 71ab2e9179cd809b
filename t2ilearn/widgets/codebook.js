// The codebook lab: three loss terms at work in the plane, and how a codebook collapses.

import { choice, make, widget } from "./shared.js";
import { renderCollapse } from "./codebook_collapse.js";
import { renderTerms } from "./codebook_terms.js";

function draw(model, el) {
  const room = make("div");
  const open = (mode) => (mode === "terms" ? renderTerms : renderCollapse)(model, room);
  const modes = [["terms", "Three loss terms"], ["collapse", "Collapse and its cures"]];
  const tabs = choice("Lab", modes, model.get("mode"), open);
  el.replaceChildren(make("div", { class: "t2i t2i-tabs" }, tabs), room);
  open(model.get("mode"));
}

export default widget(draw);
