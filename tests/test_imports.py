"""The structure of the package: imports run one way, and what sizes, predicts or plans never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import scantling

PACKAGE = Path(scantling.__file__).parent
# Lowest first; a module imports only from earlier lines (or, within laws and model, from its own line, acyclically).
LAYERS = [
    ["errors"],
    ["units", "yamlio", "hf_classes"],
    ["parts"],
    ["spec"],
    ["rows"],
    ["costing", "kept"],
    ["hardware"],
    ["shapes", "hf_config"],
    ["profiles"],
    ["resolve"],
    ["files", "hf_writer"],
    ["data", "recipe"],
    ["measured"],
    ["guidance", "lineage"],
    ["memory"],
    ["config"],
    ["record"],
    ["study"],
    ["laws"],
    ["compare"],
    ["planning"],
    ["reporting"],
    ["explore"],
    ["show"],
    ["model", "placement", "tensor_files"],
    ["device", "profile", "progress", "checkpoint", "optim", "average", "trackers", "hf_weights"],
    ["evaluate", "hf_folder"],
    ["growth"],
    ["training", "generate", "coordinates"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TORCH_FREE = [name for rank, names in enumerate(LAYERS) for name in names if rank <= RANK["show"]]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def top(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Every scantling module a file imports anywhere in it, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "scantling":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in RANK}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("scantling.")}
    return found


def test_every_module_has_its_place() -> None:
    assert {top(path) for path in MODULES} == set(RANK) | {top(path) for path in MODULES if top(path) in RANK}
    assert {top(path) for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    mine = top(path)
    for other in imports(path) - {mine}:
        assert RANK[other] < RANK[mine], f"{path.name} imports {other}, which lies above or beside it"


def test_the_torch_free_half_loads_no_torch() -> None:
    code = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module("scantling." + name)
heavy = {{"torch", "transformers", "ray"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("words", [["--help"], ["cost", "--help"], ["check", "tests/data/contract/spec-moe.yaml"]])
def test_light_verbs_load_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from scantling.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert end.code == 0, end.code
assert not {{"torch", "pandas", "scipy", "plotly"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_public_names_are_the_documented_ones() -> None:
    assert set(scantling.__all__) == set(dir(scantling)) & set(scantling.__all__)
    for name in scantling.__all__:
        assert getattr(scantling, name) is not None
