"""Imports run downward only. Read from the syntax trees, so lazy imports count and nothing is imported."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "llm2_fast"
ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module or subpackage of llm2_fast may import from lower layers and, unless that closes a cycle or the
# pair is listed in SEPARATE, from its own. `__init__` is the package's own file: the public names.
LAYERS = (
    ("errors", "files", "version"),
    ("config", "prefix_index", "results", "rng", "sequence"),
    ("answers", "datacheck", "detokenizer", "problems", "prompts", "request", "store", "supervision"),
    ("reference",),
    ("kernels",),
    ("kernel_ops", "ops"),
    ("cache",),
    ("models",),
    ("verifier",),
    ("backends",),
    ("prefixes",),
    ("schedule",),
    ("engine", "train"),
    ("evaluation", "exploration", "integrations"),
    ("__init__",),
    ("cli", "__main__"),
)
SEPARATE = ({"engine", "train"},)
TRAIN_USERS = {"train", "__init__", "cli", "__main__"}
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

# Bookkeeping that must not pay for importing torch, nor depend on it through another module.
TORCH_FREE = ("errors", "version", "config", "results", "sequence", "prefix_index", "cache.blocks", "train.config")


class Import(NamedTuple):
    """One import statement, or call of an import function with a literal name."""

    target: str  # absolute dotted name
    line: int


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; `cache` stands for `cache/__init__.py`, `__init__` for the package's."""
    modules = {}
    for folder, _, files in os.walk(root / PACKAGE, followlinks=True):
        for file in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = file.relative_to(root / PACKAGE).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            modules[name] = file
    return modules


def find_imports(name: str, path: Path) -> Iterator[Import]:
    """Every import of the module called `name` below the package; `from a import b` gives `a.b`."""
    parents = [PACKAGE, *name.split(".")]
    if path.name == "__init__.py" and name != "__init__":
        parents.append("__init__")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (Import(f"{source}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno)


def resolve(target: str, modules: dict[str, Path]) -> str | None:
    """The module of the package that an absolute name stands for or lies in; None outside the package."""
    package, *parts = target.split(".")
    if package != PACKAGE:
        return None
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts) or "__init__"


def unit(module: str) -> str:
    """The entry of LAYERS a module belongs to."""
    return module.split(".")[0]


def check_tree(root: Path) -> list[str]:
    """The violations in the tree at `root`, one line each."""
    modules = find_modules(root)
    unplaced = sorted({unit(name) for name in modules} - set(RANK))
    problems = [f"{name}: not in LAYERS" for name in unplaced]
    edges: dict[str, set[str]] = {name: set() for name in modules}
    torch_users = set()
    for name, path in modules.items():
        if unit(name) in unplaced:
            continue
        for target, line in find_imports(name, path):
            where = f"{path.relative_to(root)}:{line}"
            top = target.split(".")[0]
            if top in ("bench", "tests", "kernels"):
                problems.append(f"{where}: imports {target}")
            if top == "torch":
                torch_users.add(name)
            imported = resolve(target, modules)
            if imported is None:
                continue
            edges[name].add(imported)
            if reason := upward(unit(name), unit(imported)):
                problems.append(f"{where}: {unit(name)} imports {target}, {reason}")
    problems += [f"units import each other: {', '.join(cycle)}" for cycle in find_cycles(edges)]
    for name in TORCH_FREE:
        culprits = reachable(name, edges) & torch_users
        problems += [f"{name}: imports torch through {culprit}" for culprit in sorted(culprits)]
    return problems


def upward(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported`, or None if it may."""
    if importer == imported or imported not in RANK:
        return None
    if RANK[imported] > RANK[importer]:
        return "a higher layer"
    if {importer, imported} in SEPARATE:
        return "which stands beside it"
    if imported == "train" and importer not in TRAIN_USERS:
        return "which only the command line uses"
    return None


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """`start` and everything it imports, directly or not; empty if there is no such node."""
    seen: set[str] = set()
    pending = [start] if start in edges else []
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += edges.get(name, ())
    return seen


def find_cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more units of one layer that import each other."""
    units: dict[str, set[str]] = {}
    for name, targets in edges.items():
        same_layer = {unit(target) for target in targets if RANK.get(unit(target)) == RANK.get(unit(name))}
        units.setdefault(unit(name), set()).update(same_layer)
    reach = {name: reachable(name, units) for name in units}
    groups = {frozenset(other for other in reach[name] if name in reach.get(other, ())) for name in units}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_imports_run_downward() -> None:
    assert check_tree(ROOT) == []


def test_kernels_package_file_has_no_imports() -> None:
    assert list(find_imports("kernels", ROOT / "kernels" / "__init__.py")) == []


def test_modules_behind_the_link_are_checked() -> None:
    assert find_modules(ROOT)["kernels"].samefile(ROOT / "kernels" / "__init__.py")


CLEAN_TREE = {
    "__init__.py": "from llm2_fast.engine import LLM\nfrom llm2_fast.train import fit\n",
    "errors.py": "",
    "config.py": "from llm2_fast.errors import ArgumentError\n",
    "sequence.py": "from llm2_fast import config\n",
    "rng.py": "import torch\n",
    "reference.py": "from llm2_fast.rng import gumbel\n",
    "kernels/__init__.py": "",
    "kernels/select.py": "from .common import next_power_of_two\nimport triton\n",
    "kernels/common.py": "",
    "cache/__init__.py": "import torch\n",
    "cache/blocks.py": "from ..errors import ArgumentError\n",
    "engine.py": "import llm2_fast.cache.blocks\n",
    "train/__init__.py": "from llm2_fast import cache\n",
    "evaluation/__init__.py": "from llm2_fast.engine import LLM\n",
    "exploration/__init__.py": "from llm2_fast.evaluation import answer\n",
    "cli.py": "from llm2_fast import __version__, engine\nfrom llm2_fast.train import fit\n",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_checker_accepts_a_clean_tree(tmp_path: Path) -> None:
    assert check_tree(write_tree(tmp_path, CLEAN_TREE)) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("errors.py", "import llm2_fast.engine\n", "a higher layer"),
        ("errors.py", "from llm2_fast import engine\n", "a higher layer"),
        ("cache/blocks.py", "from .. import engine\n", "a higher layer"),
        ("cache/blocks.py", "from ..engine import LLM\n", "a higher layer"),
        ("config.py", "def f():\n    from llm2_fast.engine import LLM\n", "a higher layer"),
        ("config.py", "import importlib\nimportlib.import_module('llm2_fast.engine')\n", "a higher layer"),
        ("engine.py", "from llm2_fast import LLM\n", "a higher layer"),
        ("engine.py", "from llm2_fast.train import fit\n", "beside it"),
        ("train/loop.py", "from llm2_fast.engine import LLM\n", "beside it"),
        ("exploration/__init__.py", "from llm2_fast.train import fit\n", "only the command line"),
        ("evaluation/__init__.py", "import llm2_fast.exploration\n", "each other: evaluation, exploration"),
        ("kernels/select.py", "from kernels import common\n", "imports kernels"),
        ("engine.py", "import bench.harness\n", "imports bench.harness"),
        ("cli.py", "from tests import tolerances\n", "imports tests"),
        ("errors.py", "import torch\n", "errors: imports torch through errors"),
        ("sequence.py", "from llm2_fast.rng import gumbel\n", "sequence: imports torch through rng"),
        ("cache/blocks.py", "def f():\n    from torch import nn\n", "cache.blocks: imports torch"),
        ("utils.py", "", "utils: not in LAYERS"),
    ],
)
def test_checker_finds_a_planted_violation(tmp_path: Path, file: str, text: str, expected: str) -> None:
    original = CLEAN_TREE.get(file, "")
    problems = check_tree(write_tree(tmp_path, CLEAN_TREE | {file: original + text}))
    assert any(expected in problem for problem in problems), problems
