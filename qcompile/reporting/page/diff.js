// The pipeline: one row per pass, which opens to the graph before and after side by side.
const AT_ONCE = 200;
let searched = "", matches = null;
const diffs = [];

function buildPasses() {
  const place = document.getElementById("passes");
  data.graphs.forEach((run, graph) => {
    if (data.graphs.length > 1) place.append(make("h3", {}, `Graph ${graph + 1} of ${data.graphs.length}`));
    place.append(make("p", { class: "dim" }, `${plural(run.nodes, "node")} captured, ` +
      `${run.texts[run.texts.length - 1].length.toLocaleString("en")} after all passes`));
    diffs.push(run.passes.map((_, index) => new Diff(place, run, index)));
  });
  const input = document.getElementById("diff-search");
  input.addEventListener("input", later(() => search(input.value)));
}

function search(word) {
  searched = word;
  matches = word ? matchingLines(word) : null;
  let total = 0;
  for (const diff of diffs.flat()) total += diff.search();
  document.getElementById("diff-found").textContent = word ? `${plural(total, "line")} in all passes` : "";
}

class Diff {
  constructor(place, run, index) {
    this.run = run;
    this.index = index;
    const step = run.passes[index];
    this.found = make("span", { class: "dim found" });
    this.details = make("details", { class: "pass", "data-pass": step.name },
      make("summary", {},
        make("span", { class: "name" }, step.name),
        make("span", { class: "number" }, `${digits(step.seconds * 1e3)} ms`),
        make("span", { class: "number" }, plural(step.edits, "edit")),
        checkText(step), this.found, make("span", { class: "dim" }, step.doc)),
    );
    this.details.addEventListener("toggle", () => { if (this.details.open && !this.body) this.show(-1, null); });
    place.append(this.details);
  }

  rows() {
    this.paired = this.paired || pairedRows(this.run, this.index);
    return this.paired;
  }

  matching(row) {
    const left = this.run.texts[this.index], right = this.run.texts[this.index + 1];
    return (row.left >= 0 && matches[left[row.left]]) || (row.right >= 0 && matches[right[row.right]]);
  }

  search() {
    const count = matches ? this.rows().filter((row) => this.matching(row)).length : 0;
    this.found.textContent = matches ? plural(count, "line") : "";
    this.body?.remove();
    this.body = null;
    if (this.details.open) this.show(-1, null);
    return count;
  }

  // keep: the number of a line of `side` to show and to mark.
  show(keep, side) {
    this.body?.remove();
    const rows = this.rows();
    const at = keep < 0 ? -1 : rows.findIndex((row) => row[side] === keep);
    this.items = matches && keep < 0 ? rows.filter((row) => this.matching(row)) : withContext(rows, at);
    this.target = at < 0 ? null : rows[at];
    const middle = this.target ? this.items.indexOf(this.target) : 0;
    this.from = Math.max(0, middle - 20);
    this.to = Math.min(this.items.length, this.from + AT_ONCE);
    this.table = make("tbody");
    this.before = make("button", { onclick: () => this.more(-1) });
    this.after = make("button", { onclick: () => this.more(1) });
    const step = this.run.passes[this.index];
    this.body = make("div", { class: "body" },
      make("p", { class: "doc" }, make("code", {}, step.text), ` · bound: ${step.bound}`),
      this.refusals(step),
      this.items.some((item) => item.kind !== "gap") ? null : make("p", { class: "doc" }, matches ? "No line matches." : "Nothing changed."),
      this.before,
      make("table", { class: "diff code" }, make("colgroup", {}, make("col", { class: "no" }), make("col"),
        make("col", { class: "no" }), make("col")), this.table),
      this.after);
    this.details.append(this.body);
    this.fill();
  }

  forget() {
    this.target = null;
    this.body?.querySelectorAll(".target").forEach((row) => row.classList.remove("target"));
  }

  refusals(step) {
    if (!step.refused) return null;
    const list = make("ul", { class: "refusals", tabindex: "0" }, ...step.refusals.map(([node, reason]) => make("li", {}, `${node}: ${reason}`)));
    if (step.refused > step.refusals.length) list.append(make("li", {}, `and ${step.refused - step.refusals.length} more`));
    return list;
  }

  fill() {
    this.table.replaceChildren(...this.items.slice(this.from, this.to).map((item) => this.row(item)));
    const above = this.from, below = this.items.length - this.to;
    this.before.hidden = !above;
    this.after.hidden = !below;
    this.before.textContent = `${above} rows above`;
    this.after.textContent = `${below} rows below`;
  }

  more(direction) {
    if (direction < 0) this.from = Math.max(0, this.from - AT_ONCE);
    else this.to = Math.min(this.items.length, this.to + AT_ONCE);
    this.fill();
  }

  row(item) {
    if (item.kind === "gap") {
      const open = () => {
        this.items.splice(this.items.indexOf(item), 1, ...this.rows().slice(item.from, item.to));
        this.to = Math.min(this.items.length, this.to + Math.min(AT_ONCE, item.to - item.from));
        this.fill();
      };
      return make("tr", { class: "gap" }, make("td", { colspan: "4" },
        make("button", { onclick: open }, `${plural(item.to - item.from, "unchanged line")}`)));
    }
    const cells = [["left", this.run.texts[this.index]], ["right", this.run.texts[this.index + 1]]].flatMap(([side, text]) => {
      const line = item[side];
      const kind = item.kind === "block" ? (side === "left" ? "removed" : "added") : `${item.kind} ${side}`;
      return [make("td", { class: "no" }, line < 0 ? "" : String(line + 1)),
        make("td", { class: line < 0 ? "" : kind }, ...(line < 0 ? [] : lineContent(text[line], searched)))];
    });
    return make("tr", item === this.target ? { class: "target", tabindex: "-1" } : {}, ...cells);
  }
}

function checkText(step) {
  const check = step.check;
  if (!check) return make("span", { class: "dim" }, "not checked");
  if (check.failed) return make("span", { class: "bad", title: check.failed }, `FAILED: ${check.failed}`);
  if (check.same) return make("span", { class: "dim" }, "changes no number");
  const what = step.bound === "exact" ? "error" : "of bound";
  const limit = check.limit ? ` ≤ ${digits(check.limit, 2)}` : "";
  return make("span", {}, `${what} ${digits(check.error, 2)}${limit}`);
}

// #line=graph.pass.side.line
function goToLine(graph, index, side, line) {
  const diff = diffs[graph]?.[index];
  if (!diff) return;
  for (const other of diffs.flat()) other.forget();
  diff.show(line, side);
  diff.details.open = true;
  const row = diff.table.querySelector(".target");
  row?.scrollIntoView({ block: "center" });
  row?.focus({ preventScroll: true });
}
