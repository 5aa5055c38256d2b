"""From an id to what Gymnasium has registered under it, and from `module:Class` to a wrapper."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from importlib.metadata import distributions
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from rllava_core.config.problems import did_you_mean
from rllava_core.errors import ConfigError, describe

_WHERE = "task.environment.id"


def registered(identifier: str) -> EnvSpec:
    """The entry of Gymnasium's registry. Raises ConfigError for an id that is not there.

    identifier: `Id`, or `module:Id` where a module must be imported that registers it. Without a module, the installed
        packages that require gymnasium are imported until one registers the id.
    """
    module, _, name = identifier.rpartition(":")
    if module:
        import_module(module, _WHERE, identifier)
    # Gymnasium's own look-up would take the newest version for an id without one: a run's record should tell.
    if name in gymnasium.registry:
        return gymnasium.registry[name]
    broken = [] if module else _import_until_registered(name)
    if name in gymnasium.registry:
        return gymnasium.registry[name]
    raise ConfigError(f"{_WHERE}: {_unknown(name, module)}{''.join(f'; {problem}' for problem in broken)}")


def wrapper_class(target: str, where: str) -> type[gymnasium.Wrapper[Any, Any, Any, Any]]:
    """The class that `module:Class` names. Raises ConfigError for a module or class that is not there."""
    module, _, name = target.partition(":")
    found = vars(import_module(module, where, target)).get(name)
    if not (isinstance(found, type) and issubclass(found, gymnasium.Wrapper)):
        known = [key for key, value in vars(importlib.import_module(module)).items() if _is_wrapper(value)]
        what = "is no subclass of gymnasium.Wrapper" if found is not None else "does not exist"
        hint = did_you_mean(name, known) or (f" (wrappers in it: {', '.join(sorted(known))})" if known else "")
        raise ConfigError(f"{where}: {target!r} {what}{hint}")
    return found


def import_module(module: str, where: str, target: str) -> Any:
    """The module that a config names. Raises ConfigError where it is not installed or raises."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            hint = did_you_mean(module, [name for name, _ in _packages_for_gymnasium()])
            raise ConfigError(f"{where}: {target!r}: there is no module {error.name!r}; install it{hint}") from None
        raise ConfigError(f"{where}: importing {module!r} for {target!r} {describe(error)}") from error
    except Exception as error:
        raise ConfigError(f"{where}: importing {module!r} for {target!r} {describe(error)}") from error


def _import_until_registered(name: str) -> list[str]:
    """Import packages for Gymnasium, most of which register their environments then. Returns what went wrong."""
    broken = []
    for module, distribution in _packages_for_gymnasium():
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - somebody else's package, and perhaps not the one that is looked for
            broken.append(f"{distribution}, which might have it, {describe(error)}")
        if name in gymnasium.registry:
            break
    return broken


def _packages_for_gymnasium() -> list[tuple[str, str]]:
    """Module and distribution of what is installed and requires gymnasium, and has a module of its own name."""
    found = set()
    for distribution in distributions():
        # A damaged installation may lack its name.
        name = str(distribution.metadata["Name"] or "")
        required = any(re.match(r"gymnasium(?![\w-])(?!.*\bextra\b)", line) for line in distribution.requires or ())
        module = re.sub(r"[-.]+", "_", name).lower()
        if required and not module.startswith("rllava_") and importlib.util.find_spec(module) is not None:
            found.add((module, name))
    return sorted(found)


def _unknown(name: str, module: str) -> str:
    by = f" by {module!r}" if module else ""
    versions = [known for known in gymnasium.registry if known.rpartition("-v")[0] == name]
    if versions:
        return f"{name!r} has no version; did you mean {versions[-1]!r}?"
    namespace, slash, _ = name.rpartition("/")
    if slash and not any(known.startswith(f"{namespace}/") for known in gymnasium.registry):
        hint = f"install the package that has the environments of {namespace!r}, and if it is not found then, write its"
        return f"no environment {name!r} is registered{by}: {hint} module in front: 'module:{name}'"
    lower = {known.lower(): known for known in gymnasium.registry}
    close = [lower[word] for word in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)]
    hint = f"did you mean {close[0]!r}?" if close else f"if a package has it that is not found, write 'module:{name}'"
    return f"no environment {name!r} is registered{by}; {hint}"


def _is_wrapper(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, gymnasium.Wrapper) and value is not gymnasium.Wrapper
