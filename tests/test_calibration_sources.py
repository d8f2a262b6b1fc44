"""Calibration text from every kind of source, and one line for every kind of mistake. Nothing here needs a network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TEXT, tokenizer

from qcompile.calibration_sources import HUB, calibration_windows, read_documents
from qcompile.errors import CalibrationError


def windows(source: Path | str, **options: Any) -> torch.Tensor:
    found = calibration_windows(str(source), tokenizer(), **{"seqlen": 16, "positions": 128, **options})
    return found.windows


def text_of(ids: torch.Tensor) -> str:
    return str(tokenizer().decode(ids)).replace(" ", "")


def records() -> list[dict[str, Any]]:
    return [{"id": i, "text": f"{TEXT}{i}", "body": "the body " * 9} for i in range(6)]


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 3)
    found = windows(tmp_path / "a.txt")
    assert found.shape == (len(TEXT * 3) // 16, 16)
    assert found.dtype == torch.int64
    assert text_of(found.reshape(-1)).startswith("thequickbrownfox")


def test_windows_are_drawn_evenly_and_by_seed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 30)
    first, second = (windows(tmp_path / "a.txt", samples=5, seed=seed) for seed in (0, 1))
    assert first.shape == (5, 16)
    assert torch.equal(first, windows(tmp_path / "a.txt", samples=5, seed=0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("field", [None, "body"])
def test_jsonl_with_a_field(tmp_path: Path, field: str | None) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records())) + "\n\n")
    found = text_of(windows(tmp_path / "a.jsonl", field=field).reshape(-1))
    assert found.startswith("thebody" if field else "thequick")


@pytest.mark.parametrize(("name", "text"), [
    ("a.txt", TEXT * 3), ("a.jsonl", json.dumps({"text": TEXT * 3})), ("a.json", json.dumps([{"text": TEXT * 3}])),
], ids=["text", "jsonl", "json"])  # fmt: skip
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (document,) = read_documents(str(tmp_path / name), tokenizer())
    assert document.strip() == (TEXT * 3).strip()


def test_json_lists(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(records()))
    assert len(windows(tmp_path / "a.json")) > 10


def test_chat_messages_go_through_the_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "well met"}]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 5))
    assert text_of(windows(tmp_path / "a.jsonl").reshape(-1)).startswith("user:hellothere\nassistant:wellmet\n")


def test_parquet_and_folders_of_it(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records()), tmp_path / "d" / f"{name}.parquet")
    one, both = windows(tmp_path / "d" / "a.parquet"), windows(tmp_path / "d")
    assert len(both) in (2 * len(one), 2 * len(one) + 1)


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(records())
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "many"))
    assert torch.equal(windows(tmp_path / "one"), windows(tmp_path / "many"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(CalibrationError, match="must be a saved dataset"):
        windows(tmp_path / "one")


def test_hub_names_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((*arguments, options["split"]))
        return [{"question": TEXT, "answer": "because"}] * 3

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in (*HUB, "someone/something"):
        assert len(windows(name)) > 3
    assert asked == [*HUB.values(), ("someone/something", None, "train")]


def test_offline_a_hub_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        CalibrationError, match=r"got wikitext2: ConnectionError: no route; offline, give a text"
    ) as caught:
        windows("wikitext2")
    assert "\n" not in str(caught.value)


def test_a_stream_that_breaks_off_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*arguments: Any, **options: Any) -> Any:
        yield {"text": TEXT}
        raise TimeoutError("gone")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(CalibrationError, match="c4 broke off: TimeoutError: gone"):
        windows("c4")


def test_without_a_source_the_standard_library_serves() -> None:
    class Letters:
        unk_token_id = None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 64 for letter in text]}

    found = calibration_windows(None, Letters(), samples=4, positions=100)
    held_out = calibration_windows(None, Letters(), samples=4, positions=100, split="held_out")
    assert found.windows.shape == (4, 100)
    assert "a sample of your own domain would be better" in found.note
    assert not torch.equal(found.windows, held_out.windows)


def test_a_short_text_makes_one_shorter_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    found = calibration_windows(str(tmp_path / "a.txt"), tokenizer(), positions=128)
    assert found.windows.shape == (1, len(TEXT))
    assert "one shorter window" in found.note


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no samples": ({"samples": 0}, "samples must be at least 1; got 0"),
    "no length": ({"seqlen": 0}, "seqlen must be at least 2"),
    "too long": ({"seqlen": 256}, "must fit the model's 128 positions; got 256; use --seqlen 128"),
    "another model's tokenizer": ({"vocabulary": 10}, "model's vocabulary of 10; the tokenizer gives"),
    "no such field": ({"source": "a.jsonl", "field": "nothing"}, "must have a field nothing; got id, text, body"),
    "a field of numbers": ({"source": "a.jsonl", "field": "id"}, "must be text or chat messages; got int"),
    "too short": ({"source": "short.txt"}, "must have at least 64 tokens; .* has 5"),
    "empty": ({"source": "empty.txt"}, "has 0"),
    "unknown letters": ({"source": "greek.txt"}, "100% of .* is unknown to it"),
    "not there": ({"source": "nowhere.txt"}, "there is no"),
    "binary": ({"source": "binary.txt"}, "must be a readable UTF-8 text"),
    "broken lines": ({"source": "broken.jsonl"}, "one JSON record per line: line 3: Expecting property name"),
    "numbers for records": ({"source": "numbers.jsonl"}, "line 1: a record has named fields, or is text; got 1; mend"),
    "null among records": ({"source": "null.jsonl"}, "line 13: a record has named fields, .*; got null; mend"),
    "null in a list": ({"source": "null.json"}, "records with named fields; got NoneType"),
    "broken table": ({"source": "broken.parquet"}, "readable Parquet"),
    "broken messages": ({"source": "chat.jsonl"}, "must fit the tokenizer's chat template"),
    "an empty folder": ({"source": "folder"}, "must hold Parquet, JSONL or text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_line(tmp_path: Path, name: str) -> None:
    files: dict[str, bytes] = {
        "a.txt": (TEXT * 20).encode(), "a.jsonl": "\n".join(map(json.dumps, records())).encode(), "short.txt": b"hello",
        "empty.txt": b"", "greek.txt": ("ΩΨΔ" * 90).encode(), "binary.txt": b"\xff\xfe\x80" * 40,
        "broken.jsonl": b'"text"\n\n{\n', "null.json": b'["text", null, "text"]',
        "null.jsonl": b"\n".join([*[json.dumps({"text": TEXT}).encode()] * 12, b"null", b'{"text": "more"}']),
        "numbers.jsonl": b"1\n2\n", "broken.parquet": b"PAR1 no", "chat.jsonl": b'{"messages": [1, 2]}',
    }  # fmt: skip
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / "folder").mkdir()
    options, reason = MISTAKES[name]
    options = dict(options)
    with pytest.raises(CalibrationError, match=reason) as caught:
        windows(tmp_path / options.pop("source", "a.txt"), **options)
    assert "\n" not in str(caught.value)


def test_documents_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n"two"\n')
    assert list(read_documents(str(tmp_path / "a.jsonl"), tokenizer())) == ["one\n", "two"]
