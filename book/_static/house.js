document.addEventListener("DOMContentLoaded", () => {
  // The theme's arrows that open a chapter's pages in the side bar have no name of their own.
  for (const summary of document.querySelectorAll(".bd-sidebar li > details > summary")) {
    const page = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `pages under ${page ? page.textContent.trim() : "this"}`);
  }
  // docutils gives the bibliography's entries a role that ARIA 1.3 no longer has, in a list.
  for (const entry of document.querySelectorAll(".citation-list > [role=doc-biblioentry]")) {
    entry.setAttribute("role", "listitem");
  }
});
