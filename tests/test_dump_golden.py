"""Dumps of five architectures, byte for byte, in this process and in another one."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden_graphs import CONFIGS, FOLDER, VERSIONS, text

OTHERS = ("gpt2", "mixtral")
SCRIPT = Path(__file__).parent / "golden_graphs.py"


def golden(name: str) -> str:
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    if not kept.startswith(VERSIONS):
        pytest.skip(f"the golden texts are for {kept.splitlines()[0][2:]}; this is {VERSIONS[2:].strip()}")
    return kept


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_is_the_golden_one(name: str) -> None:
    kept, found = golden(name), text(name)
    changed = list(difflib.unified_diff(kept.splitlines(), found.splitlines(), "golden", "now", lineterm="", n=0))
    assert kept == found, "\n".join(["`make goldens` writes what is there now:", *changed[:20]])


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-P", SCRIPT, tmp_path, *OTHERS]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    assert {path.stem for path in tmp_path.iterdir()} == set(OTHERS)
    for name in OTHERS:
        assert (tmp_path / f"{name}.txt").read_bytes() == golden(name).encode()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_address_and_no_path_is_in_a_text(name: str) -> None:
    kept = golden(name)
    assert not re.search(r"0x[0-9a-f]{6}|/(home|usr|work|tmp|root)/|site-packages", kept)
    assert kept.count("qcompile.scaled_mm(") >= 2
