"""Data to one self-contained HTML file: template, styles, scripts and the plotting library inlined.

The page's Content-Security-Policy allows the scripts that it is made with, by their digests, and no network: a script
that slipped in through a name would not run.
"""

import base64
import hashlib
import importlib.util
import json
from importlib import resources
from typing import Any

from qcompile.errors import ConfigError
from qcompile.strict_json import finite

NEEDED = ("jinja2", "plotly")
SCRIPTS = ("dom.js", "lines.js", "diff.js", "linears.js", "plots.js", "layer.js", "page.js")


def check_extra() -> None:
    """Raises ConfigError if what the page is made with is not installed."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'a report needs {name}; install it: pip install "qcompile[report]"')


def page(data: dict[str, Any]) -> str:
    """The HTML of a report. Raises ConfigError if jinja2 or plotly is missing."""
    check_extra()
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    script = "\n".join(map(_file, SCRIPTS))
    plotly = _inlined(get_plotlyjs())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_file("page.html")).render(
        data=data,
        style=Markup(_file("report.css")),
        script=Markup(script),
        plotly=Markup(plotly),
        json=Markup(embedded(data)),
        digests=Markup(f"{_digest(script)} {_digest(plotly)}"),
    )


def embedded(data: Any) -> str:
    """JSON for a <script type="application/json">: nothing in it can end the element or begin a comment."""
    text = json.dumps(finite(data, str), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def _file(name: str) -> str:
    return (resources.files("qcompile.reporting") / "page" / name).read_text(encoding="utf-8")


def _inlined(source: str) -> str:
    """JavaScript that an HTML parser leaves as it is, to the byte: its digest must hold."""
    text = source.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\\0")
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
