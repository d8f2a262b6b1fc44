// Graph lines: what pairs with what before and after a pass, and how a line is shown.
const NEAR = 3;

function pairedRows(run, index) {
  const left = run.texts[index], right = run.texts[index + 1], rows = [];
  let a = 0, c = 0;
  const same = (until) => {
    for (; a < until; a++, c++) rows.push({ left: a, right: c, kind: left[a] === right[c] ? "same" : "changed" });
  };
  for (const [from, to, start, end] of run.passes[index].blocks) {
    same(from);
    for (; a < to || c < end;) {
      rows.push({ left: a < to ? a++ : -1, right: c < end ? c++ : -1, kind: "block" });
    }
  }
  same(left.length);
  return rows;
}

// Rows to show: those that changed, with context, and gaps in between; `keep` is shown in any case.
function withContext(rows, keep = -1) {
  const shown = new Uint8Array(rows.length);
  rows.forEach((row, i) => {
    if (row.kind === "same" && i !== keep) return;
    shown.fill(1, Math.max(0, i - NEAR), i + NEAR + 1);
  });
  const items = [];
  for (let i = 0; i < rows.length;) {
    if (shown[i]) { items.push(rows[i++]); continue; }
    const from = i;
    while (i < rows.length && !shown[i]) i++;
    items.push({ kind: "gap", from, to: i });
  }
  return items;
}

function matchingLines(word) {
  const wanted = word.toLowerCase(), found = new Uint8Array(data.lines.length);
  const sources = data.sources.map((source) => source.toLowerCase().includes(wanted));
  data.lines.forEach(([text, source], i) => {
    found[i] = text.toLowerCase().includes(wanted) || (source >= 0 && sources[source]) ? 1 : 0;
  });
  return found;
}

function marked(text, word) {
  if (!word) return [text];
  const parts = [], wanted = word.toLowerCase(), low = text.toLowerCase();
  let from = 0;
  for (let at; (at = low.indexOf(wanted, from)) >= 0; from = at + wanted.length) {
    parts.push(text.slice(from, at), make("mark", {}, text.slice(at, at + wanted.length)));
  }
  parts.push(text.slice(from));
  return parts;
}

function lineContent(index, word) {
  const [text, source] = data.lines[index];
  const split = text.indexOf("  # ");
  const code = split < 0 ? text : text.slice(0, split);
  const parts = [make("span", {}, ...marked(code, word))];
  if (split >= 0) parts.push(make("span", { class: "note-part" }, ...marked(text.slice(split), word)));
  if (source >= 0) parts.push(make("span", { class: "source", title: data.sources[source] }, ...marked(data.sources[source], word)));
  return parts;
}
