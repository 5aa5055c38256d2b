"""Fixtures for all tests of the core."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest


class FakeDistribution(Protocol):
    """Installs a distribution of one module, without pip; returns the directory that is now on `sys.path`."""

    def __call__(
        self,
        name: str,
        version: str = "1.0",
        module_source: str = "",
        *,
        requires: Sequence[str] = (),
        entry_points: Mapping[str, str] | None = None,
    ) -> Path: ...


@pytest.fixture
def fake_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDistribution]:
    """`fake_distribution("rllava-example", "1.0", source)`: its module is `rllava_example`, its entry point `example`.

    requires: lines of `Requires-Dist`. entry_points: name to value, of the group `rllava`, in place of the one above.
    """
    modules_before = set(sys.modules)

    def install(
        name: str,
        version: str = "1.0",
        module_source: str = "",
        *,
        requires: Sequence[str] = (),
        entry_points: Mapping[str, str] | None = None,
    ) -> Path:
        module = name.replace("-", "_")
        if entry_points is None:
            entry_points = {name.removeprefix("rllava-"): module}
        site = tmp_path / f"site-{len(list(tmp_path.glob('site-*')))}"
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        site.joinpath(f"{module}.py").write_text(module_source, encoding="utf-8")
        header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        header += [f"Requires-Dist: {line}" for line in requires]
        info.joinpath("METADATA").write_text("\n".join(header) + "\n", encoding="utf-8")
        if entry_points:
            lines = ["[rllava]", *(f"{key} = {value}" for key, value in entry_points.items())]
            info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        return site

    yield install
    for module in set(sys.modules) - modules_before:
        path = getattr(sys.modules[module], "__file__", None) or ""
        if path.startswith(str(tmp_path)):
            del sys.modules[module]
    importlib.invalidate_caches()
