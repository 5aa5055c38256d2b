"""Pytest fixtures for the tests of plugins. Nothing loads them unasked; in a `conftest.py`:

from rllava_core.testing.fixtures import fake_distribution as fake_distribution
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest


class FakeDistribution(Protocol):
    """Installs a distribution without an installer; returns the directory that is now on the path."""

    def __call__(
        self,
        name: str,
        version: str = "1.0",
        module_source: str = "",
        *,
        requires: Sequence[str] = (),
        entry_points: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write metadata and modules, and put them first on the path of this process and of those that it starts.

        name, version: of the distribution `rllava-example`, whose module is `rllava_example`.
        module_source: of that module.
        requires: lines of `Requires-Dist`.
        entry_points: name to value, of the group `rllava`; default: `example` to the module.
        files: further files, by path.
        """
        ...


@pytest.fixture
def fake_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDistribution]:
    """Fakes installed distributions in a temporary directory; afterwards their modules are forgotten."""
    modules_before = set(sys.modules)

    def install(
        name: str,
        version: str = "1.0",
        module_source: str = "",
        *,
        requires: Sequence[str] = (),
        entry_points: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        module = name.replace("-", "_")
        if entry_points is None:
            entry_points = {name.removeprefix("rllava-"): module}
        site = tmp_path / f"site-{len(list(tmp_path.glob('site-*')))}"
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        for path, content in {f"{module}.py": module_source, **(files or {})}.items():
            site.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
            site.joinpath(path).write_text(content, encoding="utf-8")
        header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        header += [f"Requires-Dist: {line}" for line in requires]
        info.joinpath("METADATA").write_text("\n".join(header) + "\n", encoding="utf-8")
        if entry_points:
            lines = ["[rllava]", *(f"{key} = {value}" for key, value in entry_points.items())]
            info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
        return site

    yield install
    for module in set(sys.modules) - modules_before:
        path = getattr(sys.modules[module], "__file__", None) or ""
        if path.startswith(str(tmp_path)):
            del sys.modules[module]
    importlib.invalidate_caches()
