"""docs/options.md and docs/passes.md, from the code: dataclass fields, their types, and docstrings.

    python scripts/generate_docs.py [--check]

`make docs` writes them; tests/test_generated_docs.py fails when they are stale, as --check does.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from qcompile.config import Config
from qcompile.passes import PASSES, observing, quantizing, smoothing, storing

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = "<!-- Written by scripts/generate_docs.py from the code; change that, then `make docs`. -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    arguments = parser.parse_args()
    stale = [name for name, text in pages().items() if _read(DOCS / name) != text]
    for name in stale:
        print(f"docs/{name} is stale; run: make docs" if arguments.check else f"wrote docs/{name}")
        if not arguments.check:
            (DOCS / name).write_text(pages()[name], encoding="utf-8")
    return 1 if stale and arguments.check else 0


def pages() -> dict[str, str]:
    """Every generated page, by file name."""
    return {"options.md": _options(), "passes.md": _passes()}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _options() -> str:
    return "\n".join(
        [
            "# Options",
            "",
            GENERATED,
            'Keys of `options` in `torch.compile(model, backend="w8a8", options={…})`, fields of `qcompile.Config`.',
            "",
            *_table(Config),
            "",
            "What they do to numbers is in [numerics](numerics.md), to graphs in [passes](passes.md); static",
            "activations and `clip` need a calibration.",
            "",
        ]
    )


def _passes() -> str:
    config = Config(calibrate=1)
    pipelines = {
        "calibration": observing(config), "a quantized run": quantizing(config),
        "`qcompile.smooth`": smoothing(config), "`qcompile quantize`": storing(config),
    }  # fmt: skip
    lines = ["# Passes", "", GENERATED, "The pipelines, as `qcompile opt --passes` takes them:", ""]
    lines += ["| for | passes |", "|---|---|", *(f"| {use} | `{line.to_text()}` |" for use, line in pipelines.items())]
    lines += [
        "",
        "*Stage*: which operators of the dialect may be there afterwards (`qcompile/verify.py`). *Bound*: what",
        "translation validation holds the pass to (`qcompile/validate.py`).",
    ]
    for kind in PASSES:
        lines += ["", f"## {kind.name}", "", f"Stage {kind.stage}, bound {kind.bound}.", "", *_module_text(kind)]
        if dataclasses.fields(kind):
            lines += ["", *_table(kind)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _module_text(kind: type[Any]) -> Iterator[str]:
    """The module's docstring as Markdown: its first line without the name, indented lines as code."""
    text = inspect.getdoc(sys.modules[kind.__module__]) or ""
    text = re.sub(rf"^{kind.name}: (.)", lambda found: found[1].upper(), text)
    for paragraph in text.split("\n\n"):
        is_code = paragraph.startswith("    ")
        inside = inspect.cleandoc(paragraph) if is_code else paragraph
        yield f"```text\n{inside}\n```" if is_code else inside
        yield ""


def _table(kind: type[Any]) -> list[str]:
    """One line per field: its values, default, and what the class's docstring says of it."""
    types, told = typing.get_type_hints(kind), _described(kind)
    rows = [
        f"| `{field.name}` | {_values(types[field.name])} | `{_default(field.default)}` | {told.get(field.name, '')} |"
        for field in dataclasses.fields(kind)
    ]
    return ["| option | values | default | |", "|---|---|---|---|", *rows]


def _values(annotation: Any) -> str:
    """A type as what a user may write."""
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{value}"`' if isinstance(value, str) else f"`{value}`" for value in get_args(annotation))
    if parts := [part for part in get_args(annotation) if part is not type(None)]:
        if get_origin(annotation) in (tuple, list):
            return "a list of strings"
        return " or ".join(dict.fromkeys(_values(part) for part in parts))
    names = {bool: "`True`, `False`", int: "a number", float: "a number", str: "text"}
    return names.get(annotation, f"a `{getattr(annotation, '__name__', annotation)}`")


def _default(value: Any) -> str:
    return repr(value).replace("'", '"')


def _described(kind: type[Any]) -> dict[str, str]:
    """What a docstring says of each field: "name: text" or "name, other: text", until the next one or a paragraph."""
    fields = {field.name for field in dataclasses.fields(kind)}
    text = (inspect.getdoc(kind) or "").partition("\n\n")[2].partition("\nRaises ")[0]
    starts = re.compile(rf"(?:^|(?<=[.)] )|\n)((?:{'|'.join(fields)})(?:, (?:{'|'.join(fields)}))*): ")
    pieces = starts.split(text) if fields else [""]
    found: dict[str, str] = {}
    for names, told in zip(pieces[1::2], pieces[2::2], strict=True):
        sentence = " ".join(told.split()).rstrip(".")
        found |= {name: sentence.replace("|", "\\|") for name in names.split(", ")}
    return found


if __name__ == "__main__":
    sys.exit(main())
