// The codebook lab: three loss terms at work in the plane, or how a codebook collapses.

import { widget } from "./shared.js";
import { renderCollapse } from "./codebook_collapse.js";
import { renderTerms } from "./codebook_terms.js";

export default widget((model, el) => {
  (model.get("mode") === "terms" ? renderTerms : renderCollapse)(model, el);
});
