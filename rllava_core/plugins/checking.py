"""Whether one plugin keeps the contract, in a process that imports nothing else.

    python -m rllava_core.plugins.checking OUTPUT DISTRIBUTION PLUGIN ENTRY_POINT

`rllava plugins check` starts it, so that what the plugin imports, prints and takes is the plugin's own. Writes the
findings to the file OUTPUT as JSON: a list of objects with check, level (ok, warning, error or skipped), message, and
component where the finding is about one.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rllava_core.plugins.discovery import CORE_DISTRIBUTION, Found, accepted_majors, discover, requirement_on_core
from rllava_core.plugins.isolation import RefusedError, isolated
from rllava_core.plugins.loading import load_alone, load_plugins
from rllava_core.plugins.records import Component, Plugin
from rllava_core.specs import CAPABILITIES, Kind

IMPORT_BUDGET = 0.2
"""Seconds that loading a plugin may take: with fifty of them installed, every command waits for all."""

TORCH = frozenset({"torch", "transformers"})

HEAVY = TORCH | {
    *("torchvision", "torchaudio", "accelerate", "peft", "datasets", "tensorflow", "jax", "triton"),
    *("numpy", "scipy", "pandas", "sklearn", "matplotlib", "PIL", "cv2", "skimage", "numba", "sympy"),
    *("gymnasium", "requests", "httpx", "httpx2", "aiohttp", "wandb"),
}
"""Packages that take long to import, and that listing plugins needs none of."""

RESERVED: dict[Kind, set[str]] = {"model": {"adapter"}, "reward": {"name", "weight", "label"}}
"""Keys of the config's own beside which a component's options stand; of the kinds that are not here: `name`."""

Level = Literal["ok", "warning", "error", "skipped"]
Finding = dict[str, str]


def check(found: Found) -> list[Finding]:
    """Everything that can be said of a plugin without importing what it provides."""
    findings = [*_check_metadata(found), *_check_installation(found)]
    before, began = set(sys.modules), time.perf_counter()
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        plugin = load_alone(found)
    seconds = time.perf_counter() - began
    if plugin.status == "incompatible":
        return [*findings, _finding("requirement on the core", "error", str(plugin.error))]
    findings.append(_import_time(seconds))
    findings += _check_imports(before)
    if printed.getvalue().strip():
        first = printed.getvalue().strip().splitlines()[0]
        findings.append(_finding("output", "warning", f"it prints while it is loaded: {first!r}"))
    if plugin.status == "broken":
        return [*findings, _finding("loading", "error", str(plugin.error))]
    findings.append(_finding("loading", "ok", f"implements {', '.join(plugin.hooks)}"))
    findings += _check_description(plugin)
    everyone = load_plugins(strict=False).plugins
    findings += _check_names(plugin, everyone)
    for component in plugin.components:
        label = f"{component.kind} {component.spec.name}"
        parts = [*_check_target(component), *_check_config(component), *_check_capabilities(component, everyone)]
        findings += [{"component": label, **finding} for finding in parts]
    return findings


def _check_metadata(found: Found) -> Iterator[Finding]:
    plugin = found.plugin
    if plugin.distribution == CORE_DISTRIBUTION or found.entry_point is None or found.entry_point.dist is None:
        return
    try:
        with isolated("reading its requirements"):
            required = requirement_on_core(found.entry_point.dist)
    except RefusedError as refusal:
        yield _finding("requirement on the core", "error", str(refusal))
        return
    advice = f"require '{CORE_DISTRIBUTION}>=1,<2' in its pyproject.toml, so that it is never loaded into another"
    if required is None:
        yield _finding("requirement on the core", "error", f"it does not require {CORE_DISTRIBUTION}; {advice}")
    elif accepted_majors(required).endswith("+"):
        yield _finding("requirement on the core", "warning", f"it accepts every later hook API; {advice}")
    else:
        yield _finding("requirement on the core", "ok", f"accepts hook API {accepted_majors(required)}")


def _check_installation(found: Found) -> Iterator[Finding]:
    plugin = found.plugin
    if found.alike:
        message = f"{plugin.location} holds metadata of {', '.join(found.alike)} too; uninstall it and install it again"
        yield _finding("installation", "error", message)
    elsewhere = [other for other in plugin.shadowed if other not in found.alike]
    if elsewhere:
        message = f"not imported, since {plugin.location} comes first on the path: {', '.join(elsewhere)}"
        yield _finding("installation", "warning", message)
    distribution = found.entry_point.dist if found.entry_point is not None else None
    missing = [] if plugin.editable or distribution is None else _missing_files(distribution)
    if missing:
        message = f"stale: {len(missing)} of the files it recorded are gone, such as {missing[0]}; install it again"
        yield _finding("installation", "error", message)
    elif not found.alike and not elsewhere:
        yield _finding("installation", "ok", f"{plugin.location}{' (editable)' if plugin.editable else ''}")


def _missing_files(distribution: metadata.Distribution) -> list[str]:
    """Python files that the installer wrote down and that are not there any more."""
    recorded = [path for path in distribution.files or () if path.suffix == ".py"]
    return [str(path) for path in recorded if not Path(str(distribution.locate_file(path))).is_file()]


def _import_time(seconds: float) -> Finding:
    level: Level = "ok" if seconds <= IMPORT_BUDGET else "error"
    advice = "" if level == "ok" else "; import what takes long where it is used, in the modules that specs name"
    message = f"{seconds * 1000:.0f} ms (budget {IMPORT_BUDGET * 1000:.0f} ms){advice}"
    return _finding("import time", level, message)


def _check_imports(before: set[str]) -> Iterator[Finding]:
    heavy = sorted(HEAVY & (set(sys.modules) - before))
    if heavy:
        message = f"loading it imports {', '.join(heavy)}; name classes as 'module:Class' in specs and import there"
        yield _finding("heavy imports", "error", message)
    else:
        yield _finding("heavy imports", "ok", "none")


def _check_description(plugin: Plugin) -> Iterator[Finding]:
    if not plugin.info.summary:
        message = "no rllava_plugin_info() with a summary; `rllava plugins show` has nothing to say of it"
        yield _finding("description", "warning", message)
    for component in plugin.components:
        if not component.spec.summary:
            message = f"{component.kind} {component.spec.name!r} has no summary"
            yield _finding("description", "warning", message)


def _check_names(plugin: Plugin, everyone: Iterable[Plugin]) -> Iterator[Finding]:
    loaded = next(other for other in everyone if other.identity == plugin.identity)
    if loaded.status == "conflict":
        yield _finding("names", "error", str(loaded.error))
    else:
        yield _finding("names", "ok", f"{len(plugin.components)} components, no other plugin uses their names")


def _check_target(component: Component) -> Iterator[Finding]:
    """The module that a spec names exists and seems to define the name; it is not imported, only its parents are."""
    module, _, attribute = component.spec.target.partition(":")
    try:
        with isolated(f"looking for {module!r}"):
            spec = importlib.util.find_spec(module)
            names = None if spec is None else _names_in(spec.origin)
    except RefusedError as refusal:
        yield _finding("target", "error", str(refusal))
        return
    if spec is None:
        yield _finding("target", "error", f"there is no module {module!r}")
    elif names is not None and attribute not in names:
        close = get_close_matches(attribute, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield _finding("target", "error", f"module {module!r} defines no {attribute!r}{hint}")
    else:
        yield _finding("target", "ok", component.spec.target)


def _names_in(origin: str | None) -> set[str] | None:
    """What a source file defines or imports; None where that cannot be told without running it."""
    if origin is None or not origin.endswith(".py"):
        return None
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(origin).read_bytes())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return None if names & {"*", "__getattr__", "globals"} else names


def _check_capabilities(component: Component, everyone: Iterable[Plugin]) -> Iterator[Finding]:
    """What it needs is something that the core, or some installed component, has a name for."""
    provided = {item for plugin in everyone for other in plugin.components for item in other.spec.provides}
    for name in sorted(component.spec.needs - CAPABILITIES - provided):
        close = get_close_matches(name, CAPABILITIES | provided, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the core knows {', '.join(sorted(CAPABILITIES))}"
        yield _finding("needs", "warning", f"nothing that is installed provides {name!r}; {hint}")


def _check_config(component: Component) -> Iterator[Finding]:
    """The config model can be imported without torch, and refuses what it does not know."""
    if component.spec.config is None:
        return
    name = "config"
    loaded_before = TORCH & set(sys.modules)
    try:
        with isolated("importing it"):
            model: Any = component.load_config()
    except RefusedError as refusal:
        yield _finding(name, "error", str(refusal))
        return
    heavy = sorted((TORCH & set(sys.modules)) - loaded_before)
    if heavy:
        message = f"{component.spec.config} imports {', '.join(heavy)}: put config models into a module of their own"
        yield _finding(name, "error", message)
        return
    from pydantic import BaseModel

    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        message = f"{component.spec.config} is no pydantic model; derive it from rllava_core.config.Options"
        yield _finding(name, "error", message)
    elif model.model_config.get("extra") != "forbid":
        message = f"{model.__name__} accepts unknown keys; derive it from rllava_core.config.Options"
        yield _finding(name, "error", message)
    elif taken := sorted(RESERVED.get(component.kind, {"name"}) & set(model.model_fields)):
        message = f"a {component.kind}'s section has a key {taken[0]!r} of its own, so this option can never be set"
        yield _finding(name, "error", message)
    else:
        yield _finding(name, "ok", f"{len(model.model_fields)} keys")


def _finding(name: str, level: Level, message: str) -> Finding:
    return {"check": name, "level": level, "message": message}


def main(output: str, distribution: str, name: str, entry_point: str) -> None:
    """Check one plugin and write the findings."""
    wanted = (distribution, name, entry_point)
    found = next(item for item in discover() if item.plugin.identity == wanted)
    Path(output).write_text(json.dumps(check(found)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
