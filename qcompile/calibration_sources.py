"""Calibration text from wherever the user has it: a file, a folder, a hub, or the standard library. Works offline.

A source becomes text, the text becomes windows of tokens, and an evenly drawn set of windows is what the model sees.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.paths import expanded
from qcompile.stdlib_text import stdlib_text

FEWEST_TOKENS = 64
# More than this share of unknown tokens means the tokenizer does not know the text's script.
MOST_UNKNOWN = 0.2
DEFAULT_SEQLEN = 2048
# Short names of what calibration is usually run on: path on the hub, configuration, split.
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": ("allenai/c4", "en", "train"),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
    "gsm8k": ("openai/gsm8k", "main", "train"),
}
TEXT_FIELDS = ("text", "content", "prompt")
CHAT_FIELDS = ("messages", "conversations", "conversation")
UTF8 = "utf-8-sig"  # with or without a byte order mark
TABLES = (".parquet", ".arrow")


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """windows [count, seqlen] int64, and what they are of, in words. note: what the user should know; may be empty."""

    windows: Tensor
    source: str
    note: str = ""


def calibration_windows(
    source: str | None,
    tokenizer: Any,
    *,
    samples: int = 128,
    seqlen: int | None = None,
    positions: int | None = None,
    vocabulary: int | None = None,
    field: str | None = None,
    seed: int = 0,
    split: Literal["calibration", "held_out"] = "calibration",
) -> CalibrationText:
    """Windows of tokens to calibrate on, or to score on: split says which of the standard library's sources to take.

    source: a text file, a .jsonl or .json file of records, a .parquet file, a folder of those or one that `datasets`
    saved, a hub dataset by short name or id, or None for the standard library's sources. field: the records' text
    field, or their chat messages; found by itself if it has a usual name. seqlen: tokens per window, at most the
    model's `positions`. vocabulary: how many tokens the model knows. Raises CalibrationError.
    """
    _check_counts(samples, seqlen, positions)
    length = seqlen if seqlen is not None else min(DEFAULT_SEQLEN, positions or DEFAULT_SEQLEN)
    documents = [stdlib_text(split)] if source is None else read_documents(source, tokenizer, field)
    ids = _tokens(documents, tokenizer, enough=None if source is None else samples * length * 4)
    what = source or "the Python standard library's sources"
    _check_tokens(ids, tokenizer, vocabulary, what)
    note = "" if source is not None else "calibrated on built-in text; a sample of your own domain would be better"
    if len(ids) < length:
        note = f"{what} has {len(ids)} tokens, less than one window of {length}; one shorter window is used"
        length = len(ids)
    windows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return CalibrationText(windows[chosen.sort().values], what, note)


def read_documents(source: str, tokenizer: Any, field: str | None = None) -> Iterable[str]:
    """The texts of a source. Raises CalibrationError."""
    path = expanded(source)
    if path.is_dir():
        return _folder(path, tokenizer, field)
    if path.is_file():
        return _file(path, tokenizer, field)
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CalibrationError(f"a text must be a file, a folder or a hub dataset; there is no {source}")
    return _texts(_from_hub(source), tokenizer, field, source)


def _check_counts(samples: int, seqlen: int | None, positions: int | None) -> None:
    if samples < 1:
        raise CalibrationError(f"samples must be at least 1; got {samples}")
    if seqlen is not None and seqlen < 2:
        raise CalibrationError(f"seqlen must be at least 2; got {seqlen}")
    if seqlen is not None and positions is not None and seqlen > positions:
        raise CalibrationError(
            f"seqlen must fit the model's {positions} positions; got {seqlen}; use --seqlen {positions}"
        )


def _check_tokens(ids: list[int], tokenizer: Any, vocabulary: int | None, what: str) -> None:
    if len(ids) < FEWEST_TOKENS:
        raise CalibrationError(
            f"a text must have at least {FEWEST_TOKENS} tokens; {what} has {len(ids)}; give a longer text"
        )
    if vocabulary is not None and max(ids) >= vocabulary:
        raise CalibrationError(
            f"tokens must be in the model's vocabulary of {vocabulary}; the tokenizer gives {max(ids)}; it belongs to "
            "another model"
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = ids.count(unknown) / len(ids) if unknown is not None else 0.0
    if share > MOST_UNKNOWN:
        raise CalibrationError(
            f"the tokenizer must know the text; {share:.0%} of {what} is unknown to it; give a text it was made for"
        )


def _tokens(documents: Iterable[str], tokenizer: Any, enough: int | None) -> list[int]:
    """Token numbers of documents one after the other, stopping once there are more than enough."""
    ids: list[int] = []
    for text in documents:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if enough is not None and len(ids) >= enough:
            break
    return ids


def _file(path: Path, tokenizer: Any, field: str | None) -> Iterable[str]:
    if path.suffix in (".jsonl", ".json"):
        return _texts(_json_records(path), tokenizer, field, str(path))
    if path.suffix in TABLES:
        return _texts(_table_records([path]), tokenizer, field, str(path))
    if field is not None:
        raise CalibrationError(f"a field is for records; {path} is text; leave out --field")
    try:
        return [path.read_text(encoding=UTF8)]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} must be a readable UTF-8 text: {error}; give another file") from None


def _folder(path: Path, tokenizer: Any, field: str | None) -> Iterable[str]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _texts(_saved_dataset(path), tokenizer, field, str(path))
    files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl", ".json", ".txt"))
    if not files:
        raise CalibrationError(
            f"{path} must hold Parquet, JSONL or text files, or a saved dataset; it has none of them"
        )
    return (text for file in files for text in _file(file, tokenizer, field))


def _json_records(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding=UTF8) if path.suffix == ".json" else None
    where = ""
    try:
        if text is not None and text.lstrip().startswith("["):
            yield from json.loads(text)
            return
        with path.open(encoding=UTF8) as file:
            for number, line in enumerate(file, 1):
                where = f"line {number}: "
                if not line.strip():
                    continue
                if not isinstance(record := json.loads(line), dict | str):
                    raise ValueError(f"a record has named fields, or is text; got {line.strip()[:40]}")
                yield record
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} must hold one JSON record per line: {where}{error}; mend the file") from None


def _table_records(paths: list[Path]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise CalibrationError(f"{path} must be a readable Parquet file: {reason}; get the file again") from None


def _saved_dataset(path: Path) -> Iterable[Any]:
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged dataset makes of itself
        reason = str(error).partition("\n")[0]
        raise CalibrationError(f"{path} must be a saved dataset: {reason}; save it again") from None
    records: Iterable[Any] = found[next(iter(found))] if isinstance(found, dict) else found
    return records


def _from_hub(name: str) -> Iterable[Any]:
    import datasets

    path, configuration, split = HUB.get(name, (name, None, "train"))
    try:
        records: Iterable[Any] = datasets.load_dataset(path, configuration, split=split, streaming=True)
        return iter(records)
    except Exception as error:  # offline, unknown, gated: the library has an error for each
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
        raise CalibrationError(
            f"a text must be a file, a folder or a hub dataset that can be reached; got {name}: {reason}; "
            "offline, give a text, JSONL or Parquet file"
        ) from None


def _texts(records: Iterable[Any], tokenizer: Any, field: str | None, source: str) -> Iterator[str]:
    iterator = iter(records)
    while True:
        try:
            record = next(iterator)
        except StopIteration:
            return
        except CalibrationError:
            raise
        except Exception as error:  # a stream that breaks off
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
            raise CalibrationError(f"{source} broke off: {reason}; give a file") from None
        yield record if isinstance(record, str) else _text(record, tokenizer, field, source)


def _text(record: Any, tokenizer: Any, field: str | None, source: str) -> str:
    if not isinstance(record, Mapping):
        raise CalibrationError(f"{source} must hold records with named fields; got {type(record).__name__}")
    usual = [*TEXT_FIELDS, *CHAT_FIELDS, "question"]
    name = field or next((name for name in usual if name in record), None)
    if name is None or name not in record:
        fields = ", ".join(map(str, record))
        raise CalibrationError(
            f"{source} must have a field {field or 'text or messages'}; got {fields}; name one: --field"
        )
    value = record[name]
    if isinstance(value, list):
        return _chat(value, tokenizer, source)
    if not isinstance(value, str):
        raise CalibrationError(f"field {name} of {source} must be text or chat messages; got {type(value).__name__}")
    answer = record.get("answer") if field is None else None
    return f"{value}\n{answer}\n" if isinstance(answer, str) else value + "\n"


def _chat(messages: list[Any], tokenizer: Any, source: str) -> str:
    """Chat messages as the model meets them, through its own template."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
        raise CalibrationError(
            f"messages of {source} must fit the tokenizer's chat template: {reason}; give a text field instead"
        ) from None
