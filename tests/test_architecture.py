"""The core names no plugin, and each floor imports only from the floors above it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "rllava_core"
FILES = sorted(CORE.rglob("*.py"))

FLOORS = [
    {"__init__", "errors", "specs", "hookspecs", "builtin"},
    {"plugins"},
    {"config"},
    {"mdp"},
    {"policy"},
    {"algorithms"},
    {"engines"},
    {"training"},
    {"planning"},
    {"cli", "__main__"},
    {"testing", "templates"},
]
TORCH_FREE = {"__init__", "errors", "specs", "hookspecs", "builtin", "plugins", "config", "mdp"}
HEAVY = {"torch", "torchvision", "transformers", "accelerate"}

LIBRARIES = {"gymnasium"}
"""Plugins that have a library's own name. The core may speak of the library, whose words its MDP has (`terminated`,
`truncated`, …); it neither imports it nor names the plugin."""

FIRST_PARTY = sorted(path.name.removeprefix("rllava-") for path in (ROOT / "plugins").glob("rllava-*"))


def relative(path: Path) -> str:
    """The path as test ids and messages show it."""
    return str(path.relative_to(ROOT))


def floor_of(name: str) -> int:
    """The floor on which the file or folder of this name lives; from 0, the top."""
    [floor] = [index for index, names in enumerate(FLOORS) if name in names]
    return floor


def part_of(path: Path) -> str:
    """The file or folder of the core in which this file lives."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that the file imports, except those under `if TYPE_CHECKING:`.

    lazy: with those inside functions.
    """
    package = [*path.relative_to(ROOT).with_suffix("").parts[:-1]]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending.extend(node.orelse)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def core_parts(path: Path, *, lazy: bool = True) -> set[str]:
    """The files and folders of the core that the file imports from."""
    names = (name.split(".") for name in imports(path, lazy=lazy))
    parts = {name[1] for name in names if name[0] == "rllava_core" and len(name) > 1}
    existing = {part_of(file) for file in FILES}
    # `from rllava_core import hookimpl` imports from the package's own file.
    return {part if part in existing else "__init__" for part in parts}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_core_imports_no_plugin(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}

    assert not {name for name in packages if name.startswith("rllava_") and name != "rllava_core"}
    assert not packages & LIBRARIES


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_core_mentions_no_plugin(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in FIRST_PARTY:
        # 'example2d' forbids 'example2d', 'Example2D', 'Example-2D' and 'EXAMPLEConfig', not 'examples'.
        stem = re.match(r"[a-z]*", name)
        word = re.escape(stem.group() if stem and stem.group() else name)
        if name in LIBRARIES:
            word = rf"rllava[-_]{word}"
        mentions = re.findall(rf"(?<![A-Za-z0-9])(?i:{word})(?![a-z]).*", text)
        assert not mentions, f"the plugin {name!r} is named: {mentions}"


def test_there_are_plugins_whose_names_to_look_for() -> None:
    assert FIRST_PARTY


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_floor_imports_only_from_the_floors_above_it(path: Path) -> None:
    floor = floor_of(part_of(path))

    assert not {part for part in core_parts(path) if floor_of(part) > floor}


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in TORCH_FREE], ids=relative)
def test_the_upper_floors_do_not_import_torch(path: Path) -> None:
    assert not HEAVY & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "cli"], ids=relative)
def test_commands_import_what_is_heavy_only_when_they_run(path: Path) -> None:
    assert not HEAVY & {name.split(".")[0] for name in imports(path, lazy=False)}
    assert not {"policy", "algorithms", "engines", "training"} & core_parts(path, lazy=False)


def test_importing_the_upper_floors_loads_no_torch_by_a_detour() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if part_of(path) in TORCH_FREE
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted(set(sys.modules) & {HEAVY!r}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )

    assert done.stdout.split() == []
