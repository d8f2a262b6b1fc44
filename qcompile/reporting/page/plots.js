// Plots, drawn when they come into view: until then the library is only text.
const plots = [];

function loadPlotly() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
}

function buildPlots() {
  const place = document.getElementById("plot-list");
  const names = Object.keys(data.channels);
  if (names.length) channelPlot(place, names);
  else absent(place, "Channels before and after smoothing", "needs weights and activations.");
  const known = data.linears.filter((l) => l.sqnr !== null);
  if (known.length) addPlot(place, "error", "Error per layer", (layout) => errorPlot(known, layout));
  else absent(place, "Error per layer", "needs weights and activations.");
  if (data.groups.length) addPlot(place, "alpha", "α per smoothing group", alphaPlot);
  else absent(place, "α per smoothing group", "no group was smoothed, or no weights were read.");
  if (data.speed?.roofline) addPlot(place, "roofline", "Roofline", rooflinePlot);
  else absent(place, "Roofline", "the bench file has none.");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((draw) => draw()));
}

function absent(place, title, why) {
  place.append(make("h3", {}, title), make("p", { class: "absent" }, `Left out: ${why}`));
}

function addPlot(place, id, title, figure) {
  const element = make("div", { class: "plot", id: `plot-${id}`, role: "img", "aria-label": title });
  place.append(make("h3", {}, title), element);
  return drawSeen(element, figure);
}

function drawSeen(element, figure) {
  let seen = false;
  const draw = () => {
    if (!seen) return;
    loadPlotly();
    const layout = baseLayout();
    Plotly.react(element, figure(layout), layout, { responsive: true, displaylogo: false, displayModeBar: false });
  };
  plots.push(draw);
  onceSeen(element, () => { seen = true; draw(); });
  return draw;
}

function baseLayout() {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), linecolor: color("--edge"), zerolinecolor: color("--line"), automargin: true };
  return {
    paper_bgcolor: color("--page"), plot_bgcolor: color("--page"), font: { color: color("--ink"), size: 12 },
    hoverlabel: { bgcolor: color("--raised"), font: { color: color("--ink") }, namelength: -1 },
    margin: { t: 30, r: 20, b: 50, l: 60 }, height: 360, xaxis: { ...axis }, yaxis: { ...axis }, legend: {},
    colorway: ["#d1642b", "#2f7fd1", "#3f9a56", "#b0479b", "#a08a1f", "#6b63d6", "#218f96", "#c64a5c"],
  };
}

// Plotly reads a little HTML in labels; what a model is called must not be read as that.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function channelPlot(place, names) {
  const select = make("select", { id: "channel-linear" }, ...names.map((name) => make("option", { value: name }, name)));
  const log = make("input", { type: "checkbox", id: "channel-log" });
  const draw = addPlot(place, "channels", "Channels before and after smoothing", (layout) => {
    const found = data.channels[select.value];
    Object.assign(layout, { height: 520, grid: { rows: 2, columns: 1, pattern: "independent" }, showlegend: true });
    layout.xaxis2 = { ...layout.xaxis, title: { text: "input channel" } };
    layout.yaxis2 = { ...layout.yaxis, title: { text: "weight absmax" }, type: log.checked ? "log" : "linear" };
    Object.assign(layout.yaxis, { title: { text: "activation absmax" }, type: log.checked ? "log" : "linear" });
    const width = Math.ceil(found.channels / found.x[0].length);
    const line = (values, name, axis, color, fill = "none") => ({
      type: "scatter", mode: "lines", line: { shape: "hvh", width: 1.5, color }, fill, name,
      x: values.map((_, i) => i * width), y: values, xaxis: `x${axis}`, yaxis: `y${axis}`,
    });
    return [
      line(found.x[0], "activations before", "", "#d1642b", "tozeroy"), line(found.x[1], "activations after", "", "#2f7fd1"),
      line(found.w[1], "weights after", "2", "#3f9a56", "tozeroy"), line(found.w[0], "weights before", "2", "#b0479b"),
    ];
  });
  const most = Math.max(...names.map((name) => Math.ceil(data.channels[name].channels / data.channels[name].x[0].length)));
  document.getElementById("plot-channels").before(make("p", {}, make("label", {}, "Linear: ", select), " ",
    make("label", {}, log, " log scale"), most > 1 ? ` · maxima of up to ${most} neighbouring channels` : ""));
  select.addEventListener("change", draw);
  log.addEventListener("change", draw);
}

function errorPlot(known, layout) {
  const kinds = new Map();
  known.forEach((l, i) => {
    const kind = l.name.split(".").pop(), number = /\.(\d+)\./.exec(`.${l.name}.`);
    if (!kinds.has(kind)) kinds.set(kind, []);
    kinds.get(kind).push({ x: number ? Number(number[1]) : i, y: l.sqnr, name: l.name });
  });
  layout.xaxis.title = { text: "layer" };
  layout.yaxis.title = { text: "SQNR, dB (higher is better)" };
  const groups = kinds.size > 12 ? [["linears", [...kinds.values()].flat()]] : [...kinds];
  return groups.map(([kind, points]) => ({
    type: "scatter", mode: points.length > 1 ? "lines+markers" : "markers", name: plain(kind),
    x: points.map((p) => p.x), y: points.map((p) => p.y), text: points.map((p) => plain(p.name)),
    hovertemplate: "%{text}<br>%{y:.1f} dB<extra></extra>",
  }));
}

function alphaPlot(layout) {
  layout.xaxis.title = { text: "smoothing group, in the order of the model" };
  layout.yaxis.title = { text: "α" };
  layout.yaxis.range = [-0.05, 1.05];
  return [{
    type: "scatter", mode: "markers", x: data.groups.map((_, i) => i), y: data.groups.map((group) => group.alpha ?? 0),
    text: data.groups.map((g) => `${plain(g.linears.slice(0, 6).join(", "))}<br>${g.components} channels` +
      (g.alpha === null ? "<br>not smoothed" : "")),
    marker: { symbol: data.groups.map((g) => g.alpha === null ? "x" : "circle"), size: 8 },
    hovertemplate: "α %{y}<br>%{text}<extra></extra>",
  }];
}

function rooflinePlot(layout) {
  const { bandwidth, peak, points } = data.speed.roofline;
  const ridge = peak / bandwidth, xs = points.map(([, x]) => x);
  const ends = [Math.min(ridge / 10, ...xs) / 2, ridge, Math.max(ridge * 10, ...xs) * 2];
  Object.assign(layout.xaxis, { type: "log", title: { text: "operations per byte" } });
  Object.assign(layout.yaxis, { type: "log", title: { text: "operations per second" } });
  return [
    { type: "scatter", mode: "lines", name: "roof", x: ends, y: ends.map((x) => Math.min(peak, x * bandwidth)) },
    { type: "scatter", mode: "markers", name: "measured", x: xs, y: points.map(([, , y]) => y),
      text: points.map(([name]) => plain(name)), hovertemplate: "%{text}<br>%{y:.3s}/s<extra></extra>" },
  ];
}
