"""The tree says what the architecture is: packages, twins, dependency directions, what import may touch."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qcompile.lowering
import qcompile.passes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TESTS = ROOT / "tests"
# Folders of modules, and where the tests of each are.
SUBPACKAGES = sorted(path.parent for path in (ROOT / "qcompile").glob("*/__init__.py"))
FOLDERS = {ROOT / "qcompile": TESTS} | {
    folder: TESTS / folder.name for folder in (*SUBPACKAGES, ROOT / "passes", ROOT / "lowering")
}
MODULES = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]
# Where a module's test is not simply test_<module>.py beside its siblings.
TWINS = {"__init__": "test_layout", "__main__": "test_cli"}


def test_packages_listed_are_the_packages_there_are() -> None:
    tools = PROJECT["tool"]["setuptools"]
    at = tools["package-dir"]
    folders = {at.get(package, package.replace(".", "/")) for package in tools["packages"]}
    found = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.b]*/**/__init__.py")}
    assert folders == found


def test_sub_packages_are_the_root_folders() -> None:
    assert [Path(path) for path in qcompile.passes.__path__] == [ROOT / "passes"]
    assert [Path(path) for path in qcompile.lowering.__path__] == [ROOT / "lowering"]


def test_nothing_imports_the_folders_under_their_bare_names() -> None:
    assert "passes" not in sys.modules
    assert "lowering" not in sys.modules


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_has_its_twin(module: Path) -> None:
    twin = TWINS.get(module.stem, f"test_{module.stem}")
    folder = FOLDERS[module.parent] if module.stem not in TWINS else TESTS
    assert (folder / f"{twin}.py").is_file(), f"{module.relative_to(ROOT)} needs {folder / twin}.py"


def test_subpackages_say_what_they_are_for_and_hide_nothing() -> None:
    assert not {folder.name for folder in SUBPACKAGES} & {*qcompile.__all__}
    assert {path.parent for path in (ROOT / "qcompile").rglob("*.py")} == {ROOT / "qcompile", *SUBPACKAGES}
    for folder in SUBPACKAGES:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{folder.name} needs a docstring"
        assert len(tree.body) == 1, f"{folder.name}: what it holds is imported from its modules"


@pytest.mark.parametrize(("package", "other"), [("passes", "lowering"), ("lowering", "passes")])
def test_passes_and_lowering_do_not_know_each_other(package: str, other: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        for name in imported(path):
            assert not name.startswith(f"qcompile.{other}"), f"{path.name} imports {name}"


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def test_import_needs_neither_triton_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import qcompile, qcompile.backend, qcompile.passes;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_files_and_functions_stay_small() -> None:
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, f"{path.name}: two things under one name?"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.inductor
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, timeout=300)
    for module in MODULES:
        name = module.relative_to(ROOT).as_posix()
        assert (target / (name if name.startswith("qcompile/") else f"qcompile/{name}")).is_file(), name
    assert (target / "qcompile" / "demo_model" / "model.safetensors").is_file()
    parts = [path.name for path in (ROOT / "qcompile" / "reporting" / "page").iterdir()]
    assert all((target / "qcompile" / "reporting" / "page" / name).is_file() for name in parts)
    tables = [path.name for path in (ROOT / "lowering" / "tiles").iterdir()]
    assert tables
    assert all((target / "qcompile" / "lowering" / "tiles" / name).is_file() for name in tables)
