"""Text from the standard library: there, split by file, and the same everywhere."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from qcompile.errors import ConfigError
from qcompile.stdlib_text import stdlib_files, stdlib_text

SPLITS = ("train", "calibration", "held_out")


def test_splits_are_disjoint_and_large_enough() -> None:
    files = {split: set(stdlib_files(split)) for split in SPLITS}  # type: ignore[arg-type]
    assert not files["train"] & files["held_out"]
    assert not files["train"] & files["calibration"]
    assert not files["held_out"] & files["calibration"]
    assert len(stdlib_text("train")) > 3_000_000
    assert len(stdlib_text("held_out")) > 100_000
    assert len(stdlib_text("calibration")) > 50_000


def test_tests_and_tables_are_left_out() -> None:
    for split in SPLITS:
        for path in stdlib_files(split):  # type: ignore[arg-type]
            assert not {"test", "tests", "site-packages", "encodings"} & set(Path(path).parts)


def test_the_text_is_the_same_in_another_process() -> None:
    code = (
        "from qcompile.stdlib_text import stdlib_text; import sys; sys.stdout.write(str(len(stdlib_text('held_out'))))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(result.stdout) == len(stdlib_text("held_out"))


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'validation'"):
        stdlib_text("validation")  # type: ignore[arg-type]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match="standard library"):
        stdlib_text("train")
