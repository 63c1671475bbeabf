/* Tables sort and can be saved as CSV, figures can be saved, and wide parts scroll by keyboard. The script fetches nothing,
   and the page is complete without it. */
"use strict";
(() => {
  const UNITS = {
    ns: 1e-9, "\u03bcs": 1e-6, ms: 1e-3, s: 1, min: 60, h: 3600,
    B: 1, kB: 1e3, KB: 1e3, MB: 1e6, GB: 1e9, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30,
  };
  // "382 [372, 392]", "1.05 [1.00, 1.10] ms", "more than 12 s", "3.2e-05", "98.2 %", "1,234"
  const NUMBER = /^(?:more than |less than |at least |[<>\u2264\u2265\u2248~]\s*)?([-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)(?:\s*\[[^\]]*\])?\s*(\p{L}+)?/iu;
  const NOTHING = /^(|never\b.*|nan|none|not finite|diverged|[-\u2013\u2014])$/i;
  const [NUMBERS, TEXTS, NOTHINGS] = [0, 1, 2]; // in this order, ascending or descending
  const collator = new Intl.Collator("en", { numeric: true });

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const latexOf = (math) => math.querySelector("annotation")?.textContent ?? math.textContent;

  function textOf(cell) {
    const copy = cell.cloneNode(true);
    for (const unseen of copy.querySelectorAll(".unseen")) unseen.remove();
    for (const math of copy.querySelectorAll("math")) math.replaceWith(latexOf(math));
    for (const sub of copy.querySelectorAll("sub")) sub.prepend("_");
    return copy.textContent.trim().replace(/\s+/g, " ");
  }

  function keyOf(text) {
    const plain = text.normalize("NFKC").replace(/\u2212/g, "-"); // a minus sign, and one code for micro
    if (NOTHING.test(plain)) return { rank: NOTHINGS, value: 0 };
    const found = plain.match(NUMBER);
    if (!found) return { rank: TEXTS, value: plain };
    return { rank: NUMBERS, value: Number(found[1].replaceAll(",", "")) * (UNITS[found[2]] ?? 1) };
  }

  function compare(a, b, sign) {
    if (a.rank !== b.rank) return a.rank - b.rank;
    return sign * (a.rank === TEXTS ? collator.compare(a.value, b.value) : a.value - b.value);
  }

  /* A click sorts up, the next one down, the third restores the original order. */
  function makeSortable(table, status) {
    const [head, body] = [table.tHead, table.tBodies[0]];
    const isPlain = head?.rows.length === 1 && table.tBodies.length === 1 && !body.querySelector("[rowspan], [colspan]");
    if (!isPlain || body.rows.length < 2) return;
    const original = [...body.rows];
    const headers = [...head.rows[0].cells];
    headers.forEach((header, column) => {
      const name = textOf(header);
      if (!name) return;
      const button = make("button", { type: "button" }, ...header.childNodes);
      header.append(button);
      for (const math of button.querySelectorAll("math")) { // a formula is no accessible name; its LaTeX is
        math.after(make("span", { className: "unseen" }, latexOf(math)));
        math.setAttribute("aria-hidden", "true");
      }
      button.addEventListener("click", () => {
        const order = { ascending: "descending", descending: null }[header.getAttribute("aria-sort")];
        for (const other of headers) other.removeAttribute("aria-sort");
        const rows = original.map((row) => ({ row, key: keyOf(textOf(row.cells[column])) }));
        if (order !== null) {
          const sign = order === "descending" ? -1 : 1;
          rows.sort((a, b) => compare(a.key, b.key, sign)); // stable
          header.setAttribute("aria-sort", order ?? "ascending");
        }
        body.append(...rows.map(({ row }) => row));
        status.textContent = order === null ? "In the original order." : `Sorted by ${name}, ${order ?? "ascending"}.`;
      });
    });
  }

  function save(name, content) {
    const link = make("a", { href: URL.createObjectURL(content), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function csvOf(table) {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [...table.rows].map((row) => [...row.cells].map((cell) => quoted(textOf(cell))).join(","));
    return new Blob(["\ufeff", lines.join("\r\n"), "\r\n"], { type: "text/csv" }); // spreadsheets need the byte order mark
  }

  /* report-cost.csv, report-cost-2.csv: the page, the section, and the number of the table in it. */
  function nameOf(table, taken) {
    const before = [...document.querySelectorAll("main :is(h2, h3)[id]")].filter(
      (heading) => heading.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING,
    );
    const page = location.pathname.split("/").pop().replace(/\.html$/, "") || "page";
    const stem = [page, before.at(-1)?.id].filter(Boolean).join("-");
    taken.set(stem, (taken.get(stem) ?? 0) + 1);
    return `${stem}${taken.get(stem) > 1 ? `-${taken.get(stem)}` : ""}.csv`;
  }

  function addTools(after, ...tools) {
    after.after(make("p", { className: "tools" }, ...tools));
  }

  function prepareTables() {
    const taken = new Map();
    const status = make("p", { className: "unseen" });
    status.setAttribute("role", "status");
    document.body.append(status);
    for (const table of document.querySelectorAll("main table")) {
      const box = table.closest(".table") ?? make("div", { className: "table" });
      if (!box.contains(table)) {
        table.before(box);
        box.append(table);
      }
      const label = table.caption ? textOf(table.caption) : "Table";
      box.dataset.label = label;
      makeSortable(table, status);
      const name = nameOf(table, taken);
      const button = make("button", { type: "button", title: name }, "Save as CSV");
      button.setAttribute("aria-label", `Save as CSV, ${name}`);
      button.addEventListener("click", () => save(name, csvOf(table)));
      addTools(box, button);
    }
  }

  function prepareFigures() {
    for (const figure of document.querySelectorAll("main figure[id]")) {
      const image = figure.querySelector("img[src^='data:image/svg+xml']");
      if (!image) continue;
      const name = `${figure.id.replace(/^fig-/, "")}.svg`;
      const link = make("a", { href: `#${figure.id}` }, "Link");
      link.setAttribute("aria-label", `Link to this figure, ${figure.id}`);
      const button = make("button", { type: "button" }, "Save as SVG");
      button.setAttribute("aria-label", `Save as SVG, ${name}`);
      button.addEventListener("click", () => {
        const bytes = Uint8Array.from(atob(image.src.split(",")[1]), (character) => character.charCodeAt(0));
        save(name, new Blob([bytes], { type: "image/svg+xml" }));
      });
      addTools(figure.lastElementChild, link, button);
    }
  }

  function linkHeadings() {
    for (const heading of document.querySelectorAll("main :is(h2, h3)[id]")) {
      if (heading.querySelector("a")) continue;
      heading.append(make("a", { href: `#${heading.id}`, className: "here" }, ...heading.childNodes));
    }
  }

  /* Parts wider than the page scroll inside themselves, so the keyboard must reach them. */
  function watchWidths() {
    const observer = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        const box = target.closest(".table") ?? target;
        if (box.scrollWidth > box.clientWidth + 1) {
          box.tabIndex = 0;
          box.setAttribute("role", box.matches(".table") ? "region" : "group");
          box.setAttribute("aria-label", `${box.dataset.label ?? (box.matches("pre") ? "Code" : "Formula")} (scrolls sideways)`);
        } else {
          for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
        }
      }
    });
    const boxes = "main :is(.table, .table > table, pre, p:has(> math[display='block']))";
    for (const box of document.querySelectorAll(boxes)) observer.observe(box);
  }

  /* Beside the text, the contents are always open; above it, only after a click. */
  function unfoldContents() {
    const contents = document.querySelector(".contents details");
    if (!contents) return;
    const wide = matchMedia("(min-width: 84rem)");
    const follow = () => (contents.open = wide.matches);
    wide.addEventListener("change", follow);
    follow();
  }

  unfoldContents();
  linkHeadings();
  prepareTables();
  prepareFigures();
  watchWidths();
})();
