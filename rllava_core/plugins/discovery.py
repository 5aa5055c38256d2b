"""Which plugins are installed, from their distributions' metadata alone: nothing of theirs is imported."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from rllava_core.plugins.isolation import RefusedError, isolated
from rllava_core.plugins.records import Plugin
from rllava_core.specs import ENTRY_POINT_GROUP, HOOK_API

CORE_DISTRIBUTION = "rllava-core"

_HEADER = re.compile(rf"^\ufeff?\s*\[\s*{ENTRY_POINT_GROUP}\s*\]", re.MULTILINE)
_PLUGIN_NAME = re.compile(r"[^\s,/=]+")


@dataclass(frozen=True)
class Found:
    """An entry point, what its distribution says of it, and why it cannot be loaded, if so.

    alike: further installations of its distribution in the very directory that Python imports it from.
    """

    plugin: Plugin
    entry_point: EntryPoint | None
    refusal: RefusedError | None = None
    alike: tuple[str, ...] = ()


class _Installed(Distribution):
    """A distribution whose metadata, which may hold a long README, are parsed once and not for every question."""

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution

    def read_text(self, filename: str) -> str | None:
        return self._distribution.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._distribution.locate_file(path)

    @cached_property
    def metadata(self) -> Any:
        return self._distribution.metadata


def core_version() -> str | None:
    """The version of `rllava-core` that runs; None where it is not installed as a distribution."""
    try:
        return metadata.version(CORE_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def discover() -> list[Found]:
    """The entry points of the group, those of distributions whose metadata cannot be read included.

    `importlib.metadata.entry_points` would raise for all distributions because of one.
    """
    installed: dict[str, list[Distribution]] = {}
    found: list[Found] = []
    for distribution in map(_Installed, metadata.distributions()):
        try:
            with isolated("reading its entry points"):
                if _HEADER.search(distribution.read_text("entry_points.txt") or ""):
                    installed.setdefault(canonicalize_name(distribution.name), []).append(distribution)
        except RefusedError as refusal:
            found.append(_unreadable(distribution, refusal))
    running = core_version()
    for name, distributions in installed.items():
        try:
            with isolated("reading its entry points"):
                found += _of_distribution(name, distributions, running)
        except RefusedError as refusal:
            found.append(_unreadable(distributions[0], refusal))
    return found


def describe(entry_point: EntryPoint, running: str | None) -> Found:
    """What metadata say of one entry point; one without a distribution is named by its package.

    running: as `core_version` says.
    """
    distribution = entry_point.dist
    if distribution is None:
        package = canonicalize_name(re.split(r"[.:]", entry_point.value, maxsplit=1)[0])
        return Found(Plugin(entry_point.name, package, "unknown", entry_point.value, "unknown"), entry_point)
    plugin = _identity(distribution, entry_point.name, entry_point.value)
    if not _PLUGIN_NAME.fullmatch(plugin.name):
        refusal = RefusedError(
            f"its name {plugin.name!r} cannot be written in a list: use no spaces, commas or slashes"
        )
        return Found(plugin, entry_point, refusal)
    try:
        with isolated("reading its requirements"):
            required = requirement_on_core(distribution)
        plugin = replace(plugin, hook_api=_hook_api(plugin, required))
        _check_compatible(required, running)
    except RefusedError as refusal:
        return Found(plugin, entry_point, refusal)
    return Found(plugin, entry_point)


def requirement_on_core(distribution: Distribution) -> SpecifierSet | None:
    """Which versions of `rllava-core` a distribution accepts; None if it does not require it.

    Raises packaging's InvalidRequirement.
    """
    required = None
    for requirement in map(Requirement, distribution.requires or ()):
        active = requirement.marker is None or requirement.marker.evaluate()
        if active and canonicalize_name(requirement.name) == CORE_DISTRIBUTION:
            required = requirement.specifier if required is None else required & requirement.specifier
    return required


def accepted_majors(required: SpecifierSet) -> str:
    """The major versions, which are those of the hook specifications, that a requirement accepts: `1`, `1–2`, `1+`."""
    most = 20
    named = [specifier.version.removesuffix(".*") for specifier in required]
    versions = [Version(text) for major in range(most) for text in (f"{major}.0", f"{major}.999")]
    versions += [Version(text) for text in named if _is_version(text)]
    majors = sorted({version.major for version in versions if required.contains(version, prereleases=True)})
    if not majors:
        return str(required)
    if majors[-1] == most - 1:
        return f"{majors[0]}+"
    return str(majors[0]) if len(majors) == 1 else f"{majors[0]}–{majors[-1]}"


def _hook_api(plugin: Plugin, required: SpecifierSet | None) -> str | None:
    if plugin.distribution == CORE_DISTRIBUTION:
        return str(Version(HOOK_API).major)
    return None if required is None else accepted_majors(required)


def _check_compatible(required: SpecifierSet | None, running: str | None) -> None:
    """Refuse a distribution that does not accept the running core; where that is not installed, go by the hook API."""
    if required is None:
        return
    if not all(_accepts(specifier, running or HOOK_API) for specifier in required):
        installed = f"{CORE_DISTRIBUTION} {running}" if running else f"hook API {HOOK_API}"
        wanted = ",".join(sorted(map(str, required), reverse=True))  # '>=1' before '<2', as people write it
        raise RefusedError(f"it requires {CORE_DISTRIBUTION}{wanted}, installed is {installed}", "incompatible")


def _accepts(specifier: Specifier, running: str) -> bool:
    """Whether one clause of a requirement accepts the running version.

    A pre-release of 1.0 implements the contract of 1.0, so `>=1` accepts it; a clause that speaks of pre-releases
    itself, or excludes a version, is taken at its word.
    """
    if specifier.contains(running, prereleases=True):
        return True
    literal = specifier.operator in ("!=", "===") or Version(specifier.version.removesuffix(".*")).is_prerelease
    return not literal and specifier.contains(Version(running).base_version)


def _of_distribution(name: str, distributions: list[Distribution], running: str | None) -> list[Found]:
    """The plugins of the installation that Python imports, which is the first on its path."""
    first = _Installed(metadata.distribution(name))
    directory = _directory(first)
    # Of several in one directory the listing's order would decide; the newest does instead, and they are in conflict.
    alike = sorted((other for other in distributions if _directory(other) == directory), key=_version, reverse=True)
    chosen = alike[0] if alike else first
    others = list(dict.fromkeys(_where(other) for other in distributions if _where(other) != _where(chosen)))
    same = tuple(dict.fromkeys(_where(other) for other in alike if _where(other) != _where(chosen)))
    found = []
    for entry_point in chosen.entry_points.select(group=ENTRY_POINT_GROUP):
        described = describe(entry_point, running)
        found.append(replace(described, plugin=replace(described.plugin, shadowed=tuple(others)), alike=same))
    if not found and _HEADER.search(chosen.read_text("entry_points.txt") or ""):
        odd = f"its entry_points.txt has entries of {ENTRY_POINT_GROUP!r} that Python does not read as such"
        return [_unreadable(chosen, RefusedError(odd))]
    return found


def _identity(distribution: Distribution, name: str, value: str) -> Plugin:
    try:
        title, version = canonicalize_name(distribution.metadata["Name"]), distribution.metadata["Version"]
    except Exception:  # noqa: BLE001 - isolating a plugin: what cannot be read is reported as unknown
        return Plugin(name, "unknown", "unknown", value, _directory(distribution))
    source = _editable_source(distribution)
    place = source or _directory(distribution)
    return Plugin(name, title, version or "unknown", value, place, editable=source is not None)


def _unreadable(distribution: Distribution, refusal: RefusedError) -> Found:
    plugin = _identity(distribution, name="unknown", value="")
    return Found(replace(plugin, name=plugin.distribution), None, refusal)


def _editable_source(distribution: Distribution) -> str | None:
    """The source tree of an editable installation, as the file `direct_url.json` says (PEP 610); None for others."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        return unquote(urlsplit(origin["url"]).path) if origin["dir_info"]["editable"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _directory(distribution: Distribution) -> str:
    return os.path.realpath(str(distribution.locate_file("")))


def _where(distribution: Distribution) -> str:
    return f"{distribution.version} in {_directory(distribution)}"


def _version(distribution: Distribution) -> Version:
    return Version(distribution.version) if _is_version(distribution.version) else Version("0")


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except (InvalidVersion, TypeError):
        return False
    return True
