"use strict";
(() => {
  const root = document.documentElement;
  const KEY = "evalfw-theme";
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  // Browsers refuse storage to some pages, those of files among them: the choice then holds until the page is left.
  const remembered = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  };
  const remember = (theme) => {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      return;
    }
  };

  // In the head, before anything is painted.
  const first = remembered();
  if (first === "light" || first === "dark") root.dataset.theme = first;
  const otherTheme = () => ((root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark" ? "light" : "dark");

  const setUpTheme = (button) => {
    const label = () => {
      button.textContent = otherTheme() === "dark" ? "Dark theme" : "Light theme";
    };
    button.addEventListener("click", () => {
      root.dataset.theme = otherTheme();
      remember(root.dataset.theme);
      label();
    });
    prefersDark.addEventListener("change", label);
    label();
    button.hidden = false;
  };

  // What stands for a figure that is not there.
  const MISSING = /^(–|not (measured|probed|shown|run|reached|checked|decided)\b)/;
  // `106 (97.0–114)`, `12 %`, `at least 1.01`, `1.64×`, `41, 42`, `12.1 → 11.7`; not `2026-11-24` nor `6x`.
  const NUMBER = /^(?:at (?:least|most) |less than )?([-−]?\d+(?:\.\d+)?)(?=$|[\s,(%×–→])/;
  const collator = new Intl.Collator("en", { numeric: true });

  const parse = (cell) => {
    // As rendered: a line break parts a figure from what stands below it.
    const text = (cell?.innerText ?? "").trim();
    const number = NUMBER.exec(text)?.[1].replace("−", "-");
    return { missing: text === "" || MISSING.test(text), text, number: number === undefined ? NaN : Number(number) };
  };

  // The rows in the order of a column. Equal ones keep their order, and what is missing comes last either way.
  const sorted = (rows, column, direction) => {
    const keyed = rows.map((row) => ({ row, key: parse(row.cells[column]) }));
    const isNumeric = keyed.every(({ key }) => key.missing || !Number.isNaN(key.number));
    const compare = isNumeric ? (a, b) => a.number - b.number : (a, b) => collator.compare(a.text, b.text);
    keyed.sort(({ key: a }, { key: b }) => {
      if (a.missing || b.missing) return Number(a.missing) - Number(b.missing);
      return direction === "ascending" ? compare(a, b) : compare(b, a);
    });
    return keyed.map(({ row }) => row);
  };

  // Each press goes on: ascending, descending, as it was.
  const NEXT = { ascending: "descending", descending: null };

  const setUpTable = (table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    if (original.length < 2) return;
    const headers = [...(table.tHead?.rows[0].cells ?? [])];
    headers.forEach((header, column) => {
      if (header.tagName !== "TH") return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const current = header.getAttribute("aria-sort");
        const direction = current === null ? "ascending" : NEXT[current];
        for (const other of headers) other.removeAttribute("aria-sort");
        if (direction !== null) header.setAttribute("aria-sort", direction);
        body.append(...(direction === null ? original : sorted(original, column, direction)));
      });
    });
  };

  // A box is a stop for the keyboard only while it has something to scroll.
  const setUpBox = (box) => {
    const update = () => {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    };
    new ResizeObserver(update).observe(box);
  };

  document.addEventListener("DOMContentLoaded", () => {
    setUpTheme(document.querySelector("button.theme"));
    document.querySelectorAll("main table").forEach(setUpTable);
    document.querySelectorAll("main .scroll, main pre").forEach(setUpBox);
    // On a narrow screen the contents would stand between the reader and the decision.
    const narrow = matchMedia("(max-width: 60rem)");
    const contents = document.querySelector("nav details");
    const fold = () => {
      contents.open = !narrow.matches;
    };
    narrow.addEventListener("change", fold);
    fold();
  });
})();
