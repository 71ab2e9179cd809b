// Stored widgets on the built pages: where their scripts lie, and what they expect of a page.
// Sphinx loads this between require.js and embed-amd.js, on pages that hold widgets only.

// Scripts that a widget asks for by name (anywidget) lie beside require.js.
require.config({ baseUrl: new URL("vendor", document.currentScript.src).href });

// embed-amd.js draws the widgets on "load" too; this listener is there first. By then the page's
// own icons are in place and the deferred MathJax has run.
window.addEventListener("load", () => {
  // The theme's icons replace <i class="fa …"> by <svg>. Widgets hold on to the <i> that they made
  // and fail when it is gone (the Play widget does), so from now on icons go inside it instead.
  if (window.FontAwesome) {
    window.FontAwesome.config.autoReplaceSvg = "nest";
  }
  // Widgets ask MathJax 2 to set the equations in a label; the pages have MathJax 3.
  if (window.MathJax && !window.MathJax.Hub) {
    const Queue = ([, , element]) =>
      window.MathJax.startup.promise.then(() => window.MathJax.typesetPromise([element]));
    window.MathJax.Hub = { Queue };
  }
});
