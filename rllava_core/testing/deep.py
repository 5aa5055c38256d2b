"""The conformance kit's quick checks on every component of one plugin, for `rllava plugins check --deep`.

    python -m rllava_core.testing.deep OUTPUT DISTRIBUTION PLUGIN ENTRY_POINT

Writes the findings to the file OUTPUT as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import rllava_core.testing as kit
from rllava_core.plugins import Component, load_plugins
from rllava_core.specs import Kind
from rllava_core.testing.conformance import Conformance, run

SUITES: dict[Kind, str] = {
    "algorithm": "AlgorithmConformance",
    "model": "ModelAdapterConformance",
    "reward": "RewardConformance",
    "engine": "EngineConformance",
    "environment": "EnvironmentConformance",
    "dataset": "DatasetConformance",
}

LEVELS = {"passed": "ok", "failed": "error", "skipped": "skipped"}


def suites_of(component: Component) -> Iterator[Conformance]:
    """The suite of a component's kind; for an engine with two roles, one a role."""
    if component.kind == "model" and "own_model" in component.spec.needs:
        return  # the absence of a model
    suite_class: type[Conformance] = getattr(kit, SUITES[component.kind])
    roles: list[str | None] = [*sorted(component.roles)]
    for role in roles or [None]:
        suite = suite_class()
        suite.component = component.qualified_name
        suite.role = role
        yield suite


def main(output: str, distribution: str, name: str, entry_point: str) -> None:
    """Check the components of one plugin and write the findings."""
    findings = []
    registry = load_plugins(strict=False)
    plugin = next(item for item in registry.plugins if item.identity == (distribution, name, entry_point))
    # What components print is theirs to say elsewhere.
    with contextlib.redirect_stdout(sys.stderr):
        for component in plugin.components:
            for suite in suites_of(component):
                role = f" ({suite.role})" if suite.role else ""
                findings += [
                    {
                        "component": f"{component.kind} {component.spec.name}{role}",
                        "check": outcome.check.replace("_", " "),
                        "level": LEVELS[outcome.status],
                        "message": outcome.message,
                    }
                    for outcome in run(suite, quick=True)
                ]
    Path(output).write_text(json.dumps(findings), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
