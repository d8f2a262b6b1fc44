// What is linked to is shown, whatever has to be opened for it.
function follow() {
  const [what, where] = location.hash.slice(1).split(/=(.*)/s);
  if (what === "line") {
    const [graph, pass, side, line] = where.split(".");
    goToLine(Number(graph), Number(pass), side === "right" ? "right" : "left", Number(line));
  } else if (what === "node") {
    goToNode(data.linears[Number(where)]?.name);
  }
}

buildPasses();
buildLinears();
buildPlots();
buildLayer();
addEventListener("hashchange", follow);
follow();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
