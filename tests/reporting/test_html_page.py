"""Data to HTML: what must not be in the text, and what must."""

import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from reports import HOSTILE, hostile_report, report_of

from qcompile.errors import ConfigError
from qcompile.reporting import html_page
from qcompile.reporting.html_page import embedded, page


class Parts(HTMLParser):
    """Scripts by type, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("type", "script") if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data


def test_data_comes_back_from_the_page() -> None:
    data = report_of().data
    found = Parts(page(data))
    assert set(found.scripts) == {"application/json", "text/plain", "script"}
    assert json.loads(found.scripts["application/json"]) == json.loads(json.dumps(data))


def test_names_stay_text() -> None:
    text = page(hostile_report().data)
    found = Parts(text)
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in found.tags)
    names = [entry["name"] for entry in json.loads(found.scripts["application/json"])["linears"]]
    assert names == list(HOSTILE)
    assert "&lt;/script&gt;" in text, "the title is escaped, too"


def test_scripts_are_allowed_by_digest_and_nothing_else_is() -> None:
    found = Parts(page(report_of().data))
    (policy,) = [a["content"] or "" for tag, a in found.tags if tag == "meta" and a.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "style-src", "img-src", "script-src"}
    digests = {
        f"'sha256-{base64.b64encode(hashlib.sha256(found.scripts[kind].encode()).digest()).decode()}'"
        for kind in ("script", "text/plain")
    }
    assert set(rules["script-src"].split()) == digests


def test_nothing_is_loaded_from_elsewhere() -> None:
    found = Parts(page(report_of().data))
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_json_in_a_script_cannot_end_it() -> None:
    value = {"</script>": ["<!--", "\u2028", float("nan"), float("inf"), 1.5]}
    text = embedded(value)
    assert "<" not in text
    assert ">" not in text
    assert json.loads(text) == {"</script>": ["<!--", "\u2028", "nan", "inf", 1.5]}


def test_javascript_is_inlined_without_ending_its_element() -> None:
    made = html_page._inlined('a = "</script>"; b = "<!--"; \r\n')
    assert made == 'a = "<\\/script>"; b = "<\\!--"; \n'


def test_every_script_of_the_folder_is_inlined() -> None:
    from importlib import resources

    names = {path.name for path in (resources.files("qcompile.reporting") / "page").iterdir()}
    assert names == {*html_page.SCRIPTS, "page.html", "report.css"}


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    with pytest.raises(ConfigError, match=r'a report needs plotly; install it: pip install "qcompile\[report\]"'):
        page({})


def test_import_needs_no_extra() -> None:
    imports = "import qcompile.reporting.report, qcompile.cli"
    code = f"import sys; sys.modules['jinja2'] = sys.modules['plotly'] = None; {imports}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_links_in_the_scripts_are_no_urls() -> None:
    script = Parts(page(report_of().data)).scripts["script"]
    assert set(re.findall(r"https?://[^\"'\s]+", script)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
