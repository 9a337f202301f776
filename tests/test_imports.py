"""The arrows between rooms, who may import torch, and what `fathom --help` costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fathom"

WAIST = {"errors", "api"}
"""Every room may import these two."""

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "api": {"errors"},
    "config": set(),
    "kernels": set(),
    "encoding": set(),
    "skills": set(),
    "accounting": {"config"},
    "model": {"config", "kernels"},
    "parallel": {"config", "kernels", "model"},
    "checkpoint": {"config", "kernels", "model", "parallel"},
    "engine": {"config", "kernels", "model", "parallel", "checkpoint"},
    "train": {"config", "kernels", "model", "parallel", "checkpoint", "encoding", "skills"},
    "server": {"config", "accounting", "encoding"},
    "evals": {"config", "encoding", "skills"},
}
"""The rooms that a room may import besides the waist and itself. `cli` may import anything, inside functions."""

WITHOUT_TORCH = ("api", "errors", "config", "accounting", "encoding", "skills", "server", "evals")
WITHOUT_TORCH_FILES = tuple(
    f"engine/{name}.py" for name in ("request", "pages", "turns", "scheduler", "stream", "stub")
)

LEAN = ("model", "kernels", "checkpoint", "parallel", "engine", "train")
LEAN_LIBRARIES = {"torch", "numpy", "safetensors", "tokenizers", "typer", "rich", "triton"}
"""These rooms must run where nothing else is installed."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, and whether importing the file leaves it out (in a function, or for types)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if _is_deferred(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            names = [f"fathom.{a.name}" for a in node.names] if node.module == "fathom" else [str(node.module)]
            yield from ((name, id(node) in inside) for name in names)


def _is_deferred(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))


def ours(path: Path) -> Iterator[tuple[str, bool]]:
    """The rooms of ours that a file imports."""
    for name, inside in imports(path):
        parts = name.split(".")
        if parts[0] == "fathom" and len(parts) > 1:
            yield parts[1], inside


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_arrows(path: Path) -> None:
    here = room(path)
    if here == "cli":
        return
    assert here in ARROWS, f"{here} is not a room of the house"
    allowed = ARROWS[here] | {here} | (set() if here in WAIST else WAIST)
    assert {name for name, _ in ours(path)} <= allowed


@pytest.mark.parametrize("path", [p for p in sources() if room(p) == "cli"], ids=lambda p: p.name)
def test_a_verb_imports_what_is_heavy_inside_functions(path: Path) -> None:
    """`main.py` imports no room but the waist; a verb that it imports when called may name rooms without torch."""
    light = WAIST | {"cli"} | (set() if path.name == "main.py" else set(WITHOUT_TORCH) - {"encoding"})
    early = {name for name, inside in ours(path) if not inside}
    heavy = {name for name, inside in imports(path) if not inside} & {"torch", "numpy", "tokenizers", "rich"}
    assert early <= light
    assert not heavy


def test_every_package_file_is_empty() -> None:
    assert [p for p in PACKAGE.rglob("__init__.py") if p.read_text(encoding="utf-8").strip()] == []


def test_rooms_without_torch() -> None:
    files = [p for p in sources() if room(p) in WITHOUT_TORCH]
    files += [PACKAGE / name for name in WITHOUT_TORCH_FILES if (PACKAGE / name).exists()]
    assert [str(p) for p in files if any(name.split(".")[0] == "torch" for name, _ in imports(p))] == []


def test_only_triton_files_import_triton() -> None:
    users = {p for p in sources() if any(name.split(".")[0] == "triton" for name, _ in imports(p))}
    assert all(p.parent.name == "kernels" and p.stem.endswith("_triton") for p in users)


def test_the_lean_rooms_need_few_libraries() -> None:
    foreign = {
        (room(p), name.split(".")[0])
        for p in sources()
        if room(p) in LEAN
        for name, _ in imports(p)
        if name.split(".")[0] not in LEAN_LIBRARIES | sys.stdlib_module_names | {"fathom"}
    }
    assert foreign == set()


def test_help_is_light() -> None:
    code = (
        "import sys, runpy; sys.argv = ['fathom', '--help']\n"
        "try: runpy.run_module('fathom.cli.main', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'deepseek_recipe', 'rich', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    begin = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert time.perf_counter() - begin < 5, "half a second is normal; five are a mistake even on a busy machine"
