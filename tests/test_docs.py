"""What README and docs tell a user to run is run: every Python block, every command."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TEXT, float_folder, quantized, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile import cli
from qcompile.generation import pipeline as text_pipeline
from qcompile.lowering import inductor
from qcompile.lowering.select import SCALED_MM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("[!.]*/README.md")]
GENERATED = {ROOT / "docs" / name for name in ("architectures.md", "passes.md")}  # as long as what they tell of
ONE_STORY = ROOT / "docs" / "tutorial.md"  # its blocks follow from one another; every other command stands alone
# The command of a `make` target that is too long, or too recursive, to run from inside a test: covered elsewhere.
COVERED = {
    "make demo": "tests/commands/test_demo.py runs it",
    "make test": "is what runs now",
    "make quality": "measures",
    "make checkpoints": "measures",
    "make bench": "measures",
    "make bench-avx": "measures",
    "make passes-time": "measures",
    "make fuzz": "tests/properties/test_broken_checkpoints.py, longer",
    "make fuzz-server": "tests/properties, longer",
    "make kills": "tests/end_to_end/test_killed_writer.py, longer",
    "make traps": "tests/properties/test_smoothing_exact.py, longer",
    "make gpu": "tests/test_gpu_script.py runs it",
    "make docs": "tests/test_generated_docs.py runs its script",
    "make goldens": "tests/test_dump_golden.py runs its script",
    "make kernels": "tests/lowering/test_scaled_mm_kernel.py",
}
NEEDS_GPU = "qcompile tune"  # elsewhere it must say so in one line


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, and no C++ compiler for what runs without one as well: its numbers are the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inductor, "has_compiler", lambda: False)
    torch._dynamo.reset()
    yield tmp_path
    torch._dynamo.reset()


def names_in_examples() -> dict[str, Any]:
    """What the examples take for granted: a model, calibration batches, generate inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.randint(1, 64, (2, 9))
    return {
        "model": LlamaForCausalLM(config).eval().requires_grad_(False),
        "batches": [ids, ids.flip(1)],
        "inputs": {"input_ids": ids, "max_new_tokens": 3, "do_sample": False},
    }


@pytest.mark.inductor
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page != ONE_STORY],
    ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_python_examples_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = names_in_examples()
    monkeypatch.setattr(text_pipeline, "LENGTH", 31)  # few lengths to compile
    if re.search(r"\bpipeline\(|\bshard\(", page.read_text(encoding="utf-8")):
        qcompile.save_pretrained(quantized(), workplace / "out", tokenizer=tokenizer())
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)
        if re.search(r"^fast\b", block, re.M):
            with torch.no_grad():
                assert namespace["fast"](namespace["batches"][0]).logits.isfinite().all()


def commands() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for page in sorted({*PAGES} - {ONE_STORY}):
        for block in blocks(page, "(?:sh)?"):
            found += [(command, page.relative_to(ROOT).as_posix()) for command in commands_in(block)]
    return [(page, command) for command, page in dict(reversed(found)).items()]  # each once, however often it is shown


def commands_in(block: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*(make|qcompile|torchrun|python) ", line)]


def prepare(workplace: Path, command: str) -> None:
    """The model, the quantized folder and the texts that commands take for granted."""
    for name in ("notes.txt", "other.txt"):
        (workplace / name).write_text(TEXT * 30, encoding="utf-8")
    if "MODEL" in command:
        float_folder(workplace / "MODEL")
    if re.match(r"qcompile (evaluate|generate|bisect|report) DIR|torchrun ", command):
        qcompile.save_pretrained(quantized(), workplace / "DIR", tokenizer=tokenizer())


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_run(page: str, command: str, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if command.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert command.split()[1] in targets
        assert command in COVERED, f"{page}: run {command!r} in a test"
        return
    if command.startswith("python scripts/"):
        script = ROOT / command.split()[1]
        subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True, timeout=120)
        return
    if command.startswith("qcompile serve"):  # runs until it is stopped: tests/commands/test_serve.py
        cli._parser().parse_args(shlex.split(command)[1:])
        return
    prepare(workplace, command)
    (workplace / "your_script.py").write_text(
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16))\n"
        "fast = torch.compile(model, backend='w8a8', options={'inner': 'eager'})\n"
        "with torch.no_grad():\n    fast(torch.randn(2, 16))\n"
    )
    status, errors = outcome(command, workplace, capfd)
    if command.startswith(NEEDS_GPU) and not torch.cuda.is_available():
        assert status == 2
        assert errors.startswith("qcompile: tune measures on a GPU; this machine has none")
        assert errors.count("\n") == 1
        return
    assert status == 0, errors


def outcome(command: str, workplace: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr. qcompile itself runs in this process, which has done the slow imports."""
    environment, words = {**os.environ, "CXX": "no-compiler"}, shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "qcompile":
        capfd.readouterr()  # what the preparation said
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return cli.main(words[1:]), capfd.readouterr().err
    modules = {"torchrun": ["-P", "-m", "torch.distributed.run"]}
    words = [sys.executable, *modules.get(words[0], []), *words[1:]]
    done = subprocess.run(
        words, check=False, env=environment, cwd=workplace, timeout=300, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.inductor
def test_the_tutorial_runs_from_beginning_to_end(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints is what the page says it prints, but for the last digits and this CPU's product."""
    namespace: dict[str, Any] = {}
    text = ONE_STORY.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(python|text|)\n(.*?)^```", text, re.M | re.S):
        if kind == "python":
            capsys.readouterr()
            exec(compile(block, ONE_STORY.name, "exec"), namespace)
        elif kind == "":
            capsys.readouterr()
            for command in commands_in(block):
                assert cli.main(shlex.split(command)[1:]) == 0, command
        else:
            shown = capsys.readouterr().out
            for line in block.splitlines():
                assert anywhere(line) in anywhere(shown), line


PRODUCTS = re.compile(rf"\b({'|'.join(one.name for one in SCALED_MM)})\b")


def anywhere(text: str) -> str:
    """Without numbers that a machine may round another way, the product it has, and the space that lines them up."""
    return re.sub(r" +", " ", PRODUCTS.sub("int8_product", re.sub(r"[-+−]?\d+\.\d+", "#", text))).strip()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", sorted({*PAGES} - GENERATED), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150
