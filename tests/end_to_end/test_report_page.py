"""The report in a real browser: headless Chromium, driven by playwright."""

import copy
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import HOSTILE, hostile_report, report_of

from qcompile.atomic_file import write_file
from qcompile.reporting.html_page import page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
READABLE = 4.5  # contrast that WCAG asks of small text


class Visit:
    """One open page, and everything it must not do."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light", width: int = 1280) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self._heard(message))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.wait("document.documentElement.dataset.ready")

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def close(self) -> None:
        """Whatever was done, the console stayed silent and the network unused."""
        asked = [url for url in self.requests if not url.startswith("data:")]
        self.context.close()
        assert self.complaints == []
        assert len(asked) == 1, f"only the file itself may be loaded; asked for {asked[1:]}"

    def wait(self, code: str) -> None:
        """Until an expression is true. (The driver's own waiting is an eval in the page, which its policy forbids.)"""
        until = time.monotonic() + 10
        while not self.evaluate(f"Boolean({code})"):
            assert time.monotonic() < until, code
            time.sleep(0.02)

    def evaluate(self, code: str) -> Any:
        return self.page.evaluate(code)

    def column(self, number: int) -> list[str]:
        found: list[str] = self.page.locator(f".linears tbody td:nth-child({number})").all_inner_texts()
        return found

    def see_plots(self) -> None:
        for plot in self.page.locator(".plot").all():
            plot.scroll_into_view_if_needed()
            plot.locator(".main-svg").first.wait_for()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same report with and without numbers, and one of hostile names."""
    place = tmp_path_factory.mktemp("pages")
    report_of(layers=2).write(place / "tiny.html")
    report_of(layers=2, device="meta").write(place / "meta.html")
    hostile_report().write(place / "hostile.html")
    return place


@pytest.fixture
def visit(browser: Any, files: Path) -> Iterator[Visit]:
    opened = Visit(browser, files / "tiny.html")
    yield opened
    opened.close()


def test_the_table_sorts_by_click(visit: Visit) -> None:
    head = visit.page.locator(".linears th.col-sqnr")
    for order, sign in (("ascending", 1), ("descending", -1)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        *numbers, last = visit.column(8)
        values = [float(number) * sign for number in numbers]
        assert values == sorted(values)
        assert last == "–", "what is not known comes last"


def test_the_table_sorts_by_keyboard_and_filters(visit: Visit) -> None:
    visit.page.locator("#linear-filter").focus()
    visit.page.keyboard.type("down_proj")
    visit.wait("document.querySelectorAll('.linears tbody tr').length === 2")
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    visit.page.keyboard.press("Space")
    names = [text.split()[0] for text in visit.column(1)]
    assert names == ["model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"]
    assert visit.page.locator("#linear-found").inner_text() == "2 linears"


def test_a_diff_opens_and_shows_both_sides_with_modules_and_sources(visit: Visit) -> None:
    details = visit.page.locator("details[data-pass=quantize_linears]")
    assert details.locator("tr").count() == 0, "what is not open costs nothing"
    details.locator("summary").focus()
    visit.page.keyboard.press("Enter")
    removed = details.locator("td.removed").first.inner_text()
    added = details.locator("td.added").first.inner_text()
    assert "aten.linear(" in removed
    assert "qcompile.quantize(" in added
    assert "model.layers.0.self_attn.q_proj" in removed
    assert re.search(r"transformers/models/llama/modeling_llama\.py:\d+: query_states = self\.q_proj", removed)
    gap = details.locator("tr.gap button").first
    before = details.locator("tr").count()
    gap.click()
    assert details.locator("tr").count() > before
    assert "error" in visit.page.locator("details[data-pass=smooth] summary").inner_text()


def test_search_finds_lines_in_all_passes(visit: Visit) -> None:
    visit.page.locator("details[data-pass=fuse_epilogues] summary").click()
    visit.page.locator("#diff-search").fill("layers.1.mlp.DOWN_proj")
    visit.wait("document.querySelector('#diff-found').textContent")
    rows = visit.page.locator("details[data-pass=fuse_epilogues] .diff tr").all_inner_texts()
    assert rows
    assert all("layers.1.mlp.down_proj" in row for row in rows)
    assert visit.page.locator("details[data-pass=fuse_epilogues] mark").count() >= len(rows)
    counts = visit.page.locator("summary .found").all_inner_texts()
    assert sum(int(re.findall(r"\d+", text)[0]) for text in counts) == int(
        re.findall(r"\d+", visit.page.locator("#diff-found").inner_text())[0]
    )
    visit.page.locator("#diff-search").fill("no such thing")
    visit.page.get_by_text("No line matches.").wait_for()


def test_a_linear_leads_to_its_line_and_to_the_drawing(visit: Visit) -> None:
    name = "model.layers.1.mlp.up_proj"
    visit.page.get_by_role("link", name=name, exact=True).click()
    target = visit.page.locator("tr.target")
    target.wait_for()
    assert name in target.inner_text()
    assert "aten.linear(" in target.inner_text()
    assert target.evaluate("row => row === document.activeElement")
    box = target.bounding_box()
    assert 0 < box["y"] < 900, "it is in view"
    row = visit.page.locator(".linears tbody tr", has_text="model.layers.0.mlp.down_proj").first
    row.get_by_role("link", name="drawn").click()
    here = visit.page.locator(".drawing g.here")
    here.wait_for()
    assert "model.layers.0.mlp.down_proj" in here.get_attribute("aria-label")
    assert here.evaluate("box => box === document.activeElement")
    visit.page.keyboard.press("Enter")
    visit.wait("location.hash.startsWith('#line=')")
    node = here.get_attribute("aria-label").partition(":")[0]
    assert f"{node}: " in visit.page.locator("tr.target").inner_text()


def test_plots_are_not_empty(visit: Visit) -> None:
    assert not visit.evaluate("'Plotly' in window"), "the library is read when a plot is seen"
    visit.see_plots()
    assert visit.page.locator("#plot-channels .scatterlayer .trace").count() == 4
    assert visit.page.locator("#plot-error .scatterlayer .point").count() == 14
    assert visit.page.locator("#plot-alpha .scatterlayer .point").count() == 8
    shape = "document.querySelector('#plot-channels .trace .js-line').getAttribute('d')"
    before = visit.evaluate(shape)
    visit.page.locator("#channel-linear").select_option("model.layers.1.mlp.down_proj")
    visit.wait(f"{shape} !== {before!r}")


def test_the_drawing_pans_and_zooms_by_keyboard_and_mouse(visit: Visit) -> None:
    drawing = visit.page.locator("svg.drawing")
    drawing.scroll_into_view_if_needed()
    visit.wait("document.querySelector('svg.drawing').getAttribute('viewBox')")

    def view() -> list[float]:
        return [float(number) for number in drawing.get_attribute("viewBox").split()]

    x, y, width, height = view()
    drawing.focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("ArrowDown")
    assert view() == pytest.approx([x + width / 10, y + height / 10, width, height])
    visit.page.keyboard.press("+")
    assert view()[2] == pytest.approx(width * 0.8)
    before = view()
    box = drawing.bounding_box()
    visit.page.mouse.move(box["x"] + 300, box["y"] + 300)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 350, box["y"] + 320)
    visit.page.mouse.up()
    assert view()[0] < before[0]
    visit.page.keyboard.press("0")
    assert view()[3] > height
    colours = visit.evaluate("[...document.querySelectorAll('g.member rect')].map(r => getComputedStyle(r).fill)")
    assert len(set(colours)) == 4
    assert visit.page.locator("g.takes").count() >= 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_the_page_is_as_wide_as_the_window(browser: Any, files: Path, scheme: str) -> None:
    visit = Visit(browser, files / "tiny.html", scheme)
    visit.see_plots()
    for name in ("smooth", "quantize_linears", "fuse_epilogues"):
        visit.page.locator(f"details[data-pass={name}] summary").click()
    contrasts = visit.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    worst = min(contrasts, key=lambda entry: entry["contrast"])
    assert worst["contrast"] >= READABLE, worst
    page_color = visit.evaluate("getComputedStyle(document.body).backgroundColor")
    paper = visit.evaluate("getComputedStyle(document.querySelector('#plot-error .main-svg')).backgroundColor")
    assert paper == page_color
    assert (sum(map(int, re.findall(r"\d+", page_color)[:3])) < 384) == (scheme == "dark")
    assert visit.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.close()


def test_hostile_names_are_text(browser: Any, files: Path) -> None:
    visit = Visit(browser, files / "hostile.html")
    visit.see_plots()
    for summary in visit.page.locator("details summary").all():
        summary.click()
    visit.page.locator("svg.drawing").scroll_into_view_if_needed()
    visit.page.locator("svg.drawing g").first.wait_for()
    visit.page.locator("#diff-search").fill("<img")
    visit.wait("document.querySelector('#diff-found').textContent")
    assert visit.evaluate("typeof window.hacked") == "undefined"
    assert visit.page.locator("img").count() == 0
    assert visit.page.title() == f"qcompile report: {HOSTILE[1]}"
    names = visit.evaluate("[...document.querySelectorAll('.linears td.name a')].map(a => a.textContent)")
    assert [name for name in names if name != "drawn"] == list(HOSTILE)
    visit.page.locator(".linears td.name a").first.click()
    assert HOSTILE[0] in visit.page.locator("tr.target").inner_text()
    assert visit.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.close()


def test_a_script_that_slipped_in_would_not_run(browser: Any, files: Path) -> None:
    text = (files / "tiny.html").read_text(encoding="utf-8")
    broken = text.replace('<p class="absent">', "<script>window.hacked = 1</script><p>", 1)
    assert broken != text
    write_file(files / "broken.html", broken)
    visit = Visit(browser, files / "broken.html")
    assert visit.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.context.close()


def test_without_weights_the_page_says_so(browser: Any, files: Path) -> None:
    visit = Visit(browser, files / "meta.html")
    assert visit.page.locator("#plot-list .absent").count() == 4
    assert visit.page.locator("#plot-list .plot").count() == 0
    assert visit.page.locator("summary").first.inner_text().count("not checked") == 1
    visit.close()


def test_ten_thousand_linears_open(browser: Any, files: Path) -> None:
    data = copy.deepcopy(hostile_report().data)
    data["linears"] = [entry | {"name": f"{entry['name']}{i}"} for i in range(2000) for entry in data["linears"]]
    data["linears"][0]["name"] = "half \ud800 a character"
    (channels,) = [*data["channels"].values()][:1]
    data["channels"] = {entry["name"]: channels for entry in data["linears"]}
    write_file(files / "many.html", page(data))
    visit = Visit(browser, files / "many.html")
    print(f"10,000 linears: {visit.evaluate('document.documentElement.dataset.ready')} ms")
    assert visit.page.locator("#linear-found").inner_text() == "10,000 linears"
    assert visit.page.locator(".linears tbody tr").count() == 200
    visit.page.get_by_role("button", name="9800 more").click()
    assert visit.page.locator(".linears tbody tr").count() == 400
    visit.page.locator(".linears th.col-name button").click()
    assert visit.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.close()


# Of every text that can be seen: its colour against the first background that is not transparent.
CONTRASTS = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const back = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("body"), NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement, box = element.getBoundingClientRect();
    if (!node.textContent.trim() || !box.width || !box.height || element.closest("script, noscript, option")) continue;
    const svg = element.closest("svg"), style = getComputedStyle(element);
    const rect = element.parentElement.querySelector(":scope > rect");
    const behind = svg?.classList.contains("drawing") && rect ? parse(getComputedStyle(rect).fill) : back(element);
    const levels = [light(parse(svg ? style.fill : style.color)), light(behind)].sort((a, b) => b - a);
    found.push({ text: node.textContent.slice(0, 60), contrast: (levels[0] + 0.05) / (levels[1] + 0.05) });
  }
  return found;
})()
"""
