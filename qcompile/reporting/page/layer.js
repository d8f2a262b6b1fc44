// The dataflow graph of one layer: pan by dragging or arrows, zoom by wheel or + and −.
const WIDTH = 190, HEIGHT = 56, ACROSS = 206, DOWN = 82, LABEL = 30;
const hue = (group) => String((group * 137 + 20) % 360);
const drawing = { view: null, which: "quantized", svg: null, boxes: new Map() };

function buildLayer() {
  const place = document.getElementById("layer-drawing");
  if (!data.layer.quantized.nodes.length) { place.append(make("p", { class: "absent" }, "Nothing to draw.")); return; }
  const select = make("select", { id: "layer-which" },
    make("option", { value: "quantized" }, "after all passes"), make("option", { value: "float" }, "after smoothing, in float"));
  select.addEventListener("change", () => { drawing.which = select.value; draw(); start(); });
  const button = (text, label, action) => make("button", { onclick: action, "aria-label": label }, text);
  drawing.svg = makeSvg("svg", { class: "drawing", tabindex: "0", role: "group", "aria-label": "Dataflow graph: arrows pan, plus and minus zoom, 0 shows all" });
  drawing.legend = make("ul", { class: "legend" });
  drawing.about = make("p", { class: "code", role: "status" }, " ");
  drawing.select = select;
  place.append(make("div", { class: "drawing-bar" }, make("label", {}, "Show ", select),
    button("+", "zoom in", () => zoom(0.8)), button("−", "zoom out", () => zoom(1.25)), button("all", "show all", fit),
    make("span", { class: "dim" }, "Colour: linears smoothed by one scale. Thick border: takes its inverse. Enter on a node: its line.")),
    drawing.legend, drawing.svg, drawing.about);
  listen(drawing.svg);
  onceSeen(place, () => { if (!drawing.view) { draw(); start(); } });
}

function draw() {
  const { nodes, edges, groups } = data.layer[drawing.which];
  const at = ([column, row]) => [column * ACROSS + WIDTH / 2, row * DOWN];
  const lines = edges.map((places) => makeSvg("path", { class: "edge", d: curve(places.map(at)) }));
  drawing.boxes.clear();
  const boxes = nodes.map((node) => {
    const [x, y] = at(node.place), box = nodeBox(node, x - WIDTH / 2, y);
    drawing.boxes.set(node, box);
    return box;
  });
  drawing.svg.replaceChildren(...lines, ...boxes);
  drawing.legend.replaceChildren(...groups.map((into, group) => {
    const swatch = make("span", { class: "swatch" });
    swatch.style.setProperty("--h", hue(group));
    return make("li", {}, swatch, into.slice(0, 3).join(", ") + (into.length > 3 ? `, ${into.length - 3} more` : ""));
  }));
  const rows = nodes.map((node) => node.place);
  drawing.size = [Math.max(...rows.map(([c]) => c)) * ACROSS + WIDTH, Math.max(...rows.map(([, r]) => r)) * DOWN + HEIGHT];
}

function curve(points) {
  let path = "";
  points.forEach(([x, y], i) => {
    const top = i === 0 ? y + HEIGHT : y;
    if (i === 0) { path = `M${x},${top}`; return; }
    const [px, py] = points[i - 1], from = i === 1 ? py + HEIGHT : py + HEIGHT / 2, to = i === points.length - 1 ? y : y + HEIGHT / 2;
    const middle = (from + to) / 2;
    path += `C${px},${middle} ${x},${middle} ${x},${to}`;
  });
  return path;
}

const inLayer = (name) => name.startsWith(`${data.layer.quantized.layer}.`) ? name.slice(data.layer.quantized.layer.length + 1) : name;
const cut = (text) => text.length > LABEL ? `${text.slice(0, LABEL - 1)}…` : text;

function nodeBox(node, x, y) {
  const classes = [node.inside ? "" : "outside", node.member !== null ? "member" : "", node.takes.length ? "takes" : ""];
  const about = [`${node.name}: ${node.type}`, node.target, node.linear, node.module, node.source, ...node.reads.map((name) => `reads ${name}`)].filter(Boolean);
  const group = makeSvg("g", { class: classes.join(" ").trim(), transform: `translate(${x},${y})`, tabindex: "0", "aria-label": about.join(", ") },
    makeSvg("title", {}, about.join("\n")), makeSvg("rect", { width: WIDTH, height: HEIGHT, rx: 5 }),
    makeSvg("text", { x: 8, y: 16 }, cut(node.name)), makeSvg("text", { x: 8, y: 31, class: "small" }, cut(node.type)),
    makeSvg("text", { x: 8, y: 46, class: "small" }, cut(inLayer(node.linear) || node.target)));
  if (node.member !== null) group.style.setProperty("--h", hue(node.member));
  if (node.takes.length) group.style.setProperty("--t", hue(node.takes[0]));
  group.addEventListener("focus", () => { drawing.about.textContent = about.join(" · "); });
  group.addEventListener("keydown", (event) => { if (event.key === "Enter") lineOf(node); });
  group.addEventListener("dblclick", () => lineOf(node));
  return group;
}

function lineOf(node) {
  const graph = data.layer.graph, run = data.graphs[graph];
  const pass = drawing.which === "quantized" ? run.passes.length - 1 : run.passes.findIndex((step) => step.name === "quantize_linears");
  const side = drawing.which === "quantized" ? "right" : "left";
  const line = run.texts[side === "left" ? pass : pass + 1].findIndex((i) => data.lines[i][0].startsWith(`${node.name}: `));
  if (line >= 0) location.hash = `line=${graph}.${pass}.${side}.${line}`;
}

// #node=linear
function goToNode(linear) {
  const other = drawing.which === "quantized" ? "float" : "quantized";
  const found = (which) => data.layer[which].nodes.find((node) => node.inside && node.linear === linear);
  if (!found(drawing.which) && found(other)) drawing.which = drawing.select.value = other;
  draw();
  const node = found(drawing.which);
  if (!node) return;
  const [column, row] = node.place;
  drawing.view = { x: column * ACROSS - 400, y: row * DOWN - 250, w: 1000, h: 560 };
  look();
  const box = drawing.boxes.get(node);
  box.classList.add("here");
  drawing.svg.scrollIntoView({ block: "center" });
  box.focus({ preventScroll: true });
}

function fit() {
  const [w, h] = drawing.size;
  drawing.view = { x: -20, y: -20, w: w + 40, h: h + 40 };
  look();
}

// The beginning, at the size that text is written for: all of it would be unreadable.
function start() {
  const { clientWidth, clientHeight } = drawing.svg, nodes = data.layer[drawing.which].nodes;
  const first = nodes.find((node) => node.inside) ?? nodes[0];
  drawing.view = { x: first.place[0] * ACROSS + WIDTH / 2 - clientWidth / 2, y: -20, w: clientWidth, h: clientHeight };
  look();
}

function look() {
  const { x, y, w, h } = drawing.view;
  drawing.svg.setAttribute("viewBox", `${x} ${y} ${w} ${h}`);
}

function zoom(by, cx = 0.5, cy = 0.5) {
  const v = drawing.view, w = Math.min(40000, Math.max(120, v.w * by)), h = v.h * (w / v.w);
  drawing.view = { x: v.x + (v.w - w) * cx, y: v.y + (v.h - h) * cy, w, h };
  look();
}

function pan(dx, dy) {
  drawing.view.x += dx * drawing.view.w;
  drawing.view.y += dy * drawing.view.h;
  look();
}

function listen(svg) {
  const keys = {
    ArrowLeft: () => pan(-0.1, 0), ArrowRight: () => pan(0.1, 0), ArrowUp: () => pan(0, -0.1), ArrowDown: () => pan(0, 0.1),
    "+": () => zoom(0.8), "=": () => zoom(0.8), "-": () => zoom(1.25), 0: fit,
  };
  svg.addEventListener("keydown", (event) => {
    if (keys[event.key] && !event.ctrlKey && !event.metaKey) { keys[event.key](); event.preventDefault(); }
  });
  svg.addEventListener("wheel", (event) => {
    // Without focus or Ctrl the wheel scrolls the page.
    if (!event.ctrlKey && !svg.contains(document.activeElement)) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect();
    zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  let last = null;
  svg.addEventListener("pointerdown", (event) => { last = [event.clientX, event.clientY]; });
  svg.addEventListener("pointermove", (event) => {
    if (!last || !event.buttons) { last = null; return; }
    const box = svg.getBoundingClientRect(), scale = Math.max(drawing.view.w / box.width, drawing.view.h / box.height);
    drawing.view.x -= (event.clientX - last[0]) * scale;
    drawing.view.y -= (event.clientY - last[1]) * scale;
    last = [event.clientX, event.clientY];
    look();
  });
}
