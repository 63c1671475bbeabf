// What the theme and MathJax leave without a name for a screen reader.
function name(css, label) {
  for (const item of document.querySelectorAll(css)) {
    item.setAttribute("role", "group");
    item.setAttribute("aria-label", label);
  }
}

addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll(".search-button-field")) {
    button.removeAttribute("aria-label"); // its text says more
  }
  for (const summary of document.querySelectorAll("nav summary")) {
    const link = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages of ${link.textContent.trim()}`);
  }
  name("main pre", "Code or output");
  name("main .pst-scrollable-table-container, main .cell_output > .output", "Table or output");
});

addEventListener("load", () => {
  window.MathJax?.startup?.promise.then(() => name("main mjx-container[display]", "Formula"));
});
