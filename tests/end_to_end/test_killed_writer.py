"""A writer that is killed leaves the complete folder, or none that any reader takes."""

import ast
import os
import resource
import sys
from pathlib import Path

import pytest
from checkpoints import quantized
from compiling import run_python

import qcompile
from qcompile.errors import CheckpointError

KILLS = int(os.environ.get("QCOMPILE_KILLS", "60"))
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has run PyTorch")


@linux
def test_killed_at_random_moments(tmp_path: Path) -> None:
    printed = run_python("import sys, killing; killing.main(sys.argv[1], int(sys.argv[2]))", str(tmp_path), str(KILLS))
    counts = ast.literal_eval(printed.strip().splitlines()[-1])
    assert sum(counts.values()) == KILLS
    assert all(counts.values()), counts


@linux
def test_no_space_left(tmp_path: Path) -> None:
    """A limit on file sizes is met in the middle of a shard, as the end of a disk would be."""
    model = quantized()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"needs more space than there is .* nothing was written"):
            qcompile.save_pretrained(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
