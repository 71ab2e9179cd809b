"""Scripts that tests run in a built page: what axe judges, contrasts, and what is too wide."""

STILL = "* { transition: none !important; animation: none !important; }"

# A chapter's code has the colours of own_pictures', and the API page's thousands of signatures have
# those of the first two in each part.
LEFT_OUT = (".cell_input", "section > .py ~ .py ~ .py > dt.sig", "dl.py dl.py > dt.sig")

# Texts look alike when they and their parents have one style, and the grounds under them are the
# same. axe measures colours on a screen position, at a cost for each text, so it is given the first
# and the last text of each look. Answers how many looks there are.
MARK_LOOKS = """() => {
  const grounds = new Map(), looks = new Map();
  const style = (e) => {
    const s = getComputedStyle(e);
    const line = s.textDecorationLine + s.borderBottomWidth + s.borderBottomStyle;
    return [e.tagName, s.color, s.fontSize, s.fontWeight, s.opacity, s.textShadow, line].join();
  };
  const ground = (e) => {
    if (!e) return "";
    if (!grounds.has(e)) {
      const s = getComputedStyle(e);
      const colour = s.backgroundColor === "rgba(0, 0, 0, 0)" ? "" : s.backgroundColor;
      const placed = s.position === "static" ? "" : s.position + e.className;
      const own = [colour, s.backgroundImage, s.opacity, s.filter, placed].join();
      grounds.set(e, ground(e.parentElement) + (own === ",none,1,none," ? "" : "/" + own));
    }
    return grounds.get(e);
  };
  const judged = new Set(document.querySelectorAll("input, select, textarea, button"));
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    if (!texts.currentNode.data.trim()) continue;
    const parent = texts.currentNode.parentElement, link = parent.closest("a");
    judged.add(parent);
    if (link) judged.add(link);
  }
  for (const e of judged) {
    e.removeAttribute("data-look");
    if (e.closest(LEFT_OUT) || !e.checkVisibility({ visibilityProperty: true })) continue;
    const look = [style(e), style(e.parentElement), ground(e)].join("|");
    looks.set(look, [...(looks.get(look) ?? [e]).slice(0, 1), e]);
  }
  for (const alike of looks.values()) alike.forEach((e) => e.setAttribute("data-look", ""));
  return looks.size;
}""".replace("LEFT_OUT", repr(", ".join(LEFT_OUT)))

# "region" is of moderate impact, and only what is serious or critical counts.
_AXE = """() => {
  axe.configure({ rules: [
    { id: "color-contrast", selector: "[data-look]" },
    { id: "link-in-text-block", selector: ":is(a[href], [role=link])[data-look]" },
    { id: "region", enabled: false },
  ] });
  const options = { preload: false, resultTypes: ["violations"], ...OPTIONS };
  return axe.run({ exclude: LEFT_OUT }, options);
}""".replace("LEFT_OUT", str(list(LEFT_OUT)))
_COLOURS = """{ runOnly: ["color-contrast", "link-in-text-block"] }"""  # all that the dark changes
AXE = {"light": _AXE.replace("OPTIONS", "{}"), "dark": _AXE.replace("OPTIONS", _COLOURS)}

# axe leaves open what it cannot see through, tables in outputs among it: their ratios by hand, of
# each text's colour and the first ground under it that is not clear (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(".text_html *")]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => [e.textContent, light(parts(getComputedStyle(e).color)), light(ground(e))])
    .map(([text, a, b]) => [text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)])
    .filter(([, ratio]) => ratio < 4.5);
}"""

# What in the text is wider than the window: what to mend.
WIDE = """() => [...document.querySelectorAll(".bd-article *, .bd-article, header *, footer *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
  .slice(-5).map((e) => e.outerHTML.slice(0, 120))"""
