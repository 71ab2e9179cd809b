// The theme's arrows that open a chapter's pages in the side bar have no name of their own.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-sidebar li > details > summary")) {
    const page = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `pages under ${page ? page.textContent.trim() : "this"}`);
  }
});
