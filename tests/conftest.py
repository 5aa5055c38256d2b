"""Fixtures for all tests of the core."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from click.testing import CliRunner, Result

from rllava_core.cli import rllava


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


TOY = """\
model: {adapter: toy, from_scratch: any}
algorithm: {name: toy_gradient, group_size: 4}
task:
  dataset: {name: colours, count: 24}
  choices: [red, green, blue]
  rewards: [{name: match}]
training: {steps: 7, prompts_per_step: 4, learning_rate: 3.0e-3, temperature: 4.0, eval_every: 3, save_every: 2}
"""


@pytest.fixture
def toy_config(tmp_path: Path) -> Path:
    """The config of a run of a second with the toy plugin: 18 examples to train on, 6 held out."""
    path = tmp_path / "toy.yaml"
    path.write_text(TOY, encoding="utf-8")
    return path


@pytest.fixture
def run_rllava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run_rllava("train", …)` in this process, with `tmp_path` as the current folder.

    An exception that is no message for the user is raised here.
    """
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(rllava, args, catch_exceptions=False)


@pytest.fixture
def refused(run_rllava: Callable[..., Result]) -> Callable[..., str]:
    """`refused("train", …, code=2)`: a command that must end with one message and this code; returns the message."""

    def run(*args: str, code: int = 2) -> str:
        result = run_rllava(*args)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        assert result.stderr.count("error: ") == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.endswith("\n")
        return result.stderr.removeprefix("error: ").removesuffix("\n")

    return run
