// The table of linears: sorted by any column, filtered, some rows at a time.
const ROWS = 200;
const COLUMNS = [
  ["name", "linear", (l) => l.name],
  ["fate", "fate", (l) => l.fate],
  ["shape", "N × K", (l) => l.shape[0] * l.shape[1]],
  ["share", "share of MACs", (l) => l.share],
  ["alpha", "α", (l) => l.alphas.length ? Math.max(...l.alphas.map((a) => a ?? 0)) : null],
  ["factor", "largest s", (l) => l.factor],
  ["scale", "weight scale", (l) => l.scale],
  ["sqnr", "SQNR, dB", (l) => l.sqnr],
  ["kernel", "kernel", (l) => l.kernel],
  ["why", "why", (l) => l.why],
];
const table = { column: null, down: false, shown: ROWS, rows: [] };

function buildLinears() {
  table.drawn = new Set(data.layer.quantized.nodes.concat(data.layer.float.nodes).filter((n) => n.inside).map((n) => n.linear));
  table.body = make("tbody");
  table.heads = COLUMNS.map(([key, title]) =>
    make("th", { scope: "col", class: `col-${key}`, "aria-sort": "none" },
      make("button", { onclick: () => sortBy(key) }, title)));
  table.more = make("button", { onclick: () => { table.shown += ROWS; fillLinears(); } });
  document.getElementById("linear-table").append(
    make("table", { class: "linears" }, make("thead", {}, make("tr", {}, ...table.heads)), table.body), table.more);
  document.getElementById("linear-filter").addEventListener("input", later(chooseLinears));
  chooseLinears();
}

function sortBy(key) {
  table.down = table.column === key ? !table.down : false;
  table.column = key;
  COLUMNS.forEach(([name], i) => {
    table.heads[i].setAttribute("aria-sort", name !== key ? "none" : table.down ? "descending" : "ascending");
  });
  chooseLinears();
}

function chooseLinears() {
  const word = document.getElementById("linear-filter").value.toLowerCase();
  table.rows = data.linears.filter((l) => !word || [l.name, l.fate, l.kernel, l.why].some((text) => text.toLowerCase().includes(word)));
  const value = COLUMNS.find(([key]) => key === table.column)?.[2];
  if (value) {
    const sign = table.down ? -1 : 1, text = new Intl.Collator("en", { numeric: true });
    table.rows.sort((left, right) => {
      const a = value(left), b = value(right);
      if (a === null || b === null) return (a === null) - (b === null);  // what is not known comes last
      return sign * (typeof a === "string" ? text.compare(a, b) : a - b);
    });
  }
  table.shown = ROWS;
  document.getElementById("linear-found").textContent = plural(table.rows.length, "linear");
  fillLinears();
}

function fillLinears() {
  table.body.replaceChildren(...table.rows.slice(0, table.shown).map(linearRow));
  const left = table.rows.length - table.shown;
  table.more.hidden = left <= 0;
  table.more.textContent = `${left} more`;
}

function linearRow(l) {
  const name = l.link ? make("a", { href: `#line=${l.link[0]}.${l.link[1]}.left.${l.link[2]}` }, l.name) : l.name;
  const drawn = table.drawn.has(l.name) ? make("a", { href: `#node=${data.linears.indexOf(l)}` }, "drawn") : null;
  const calls = l.calls > 1 ? ` (${l.calls} calls)` : "";
  const number = (text) => make("td", { class: "number" }, text);
  return make("tr", {},
    make("td", { class: "name" }, name, calls, " ", drawn), make("td", {}, l.fate),
    number(`${l.shape[0]} × ${l.shape[1]}`), number(percent(l.share)),
    number(l.alphas.length ? [...new Set(l.alphas)].map((a) => a === null ? "none" : digits(a)).join(", ") : "–"),
    number(digits(l.factor)), number(digits(l.scale)), number(digits(l.sqnr)),
    make("td", {}, l.kernel), make("td", {}, l.why));
}
