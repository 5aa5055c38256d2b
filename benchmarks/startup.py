"""How long the commands take that must answer at once: `rllava --help`, `rllava plugins`, and a config error.

    uv run python benchmarks/startup.py

Prints the median of several warm runs beside that of an interpreter that starts and does nothing, and whether torch was
imported. The bars: `rllava plugins` in 0.25 s with what is installed here, in 0.5 s with fifty plugins more.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9
CALL = "import sys; sys.argv = ['rllava', *sys.argv[1:]]; from rllava_core.cli import main"

PLUGIN = """
from rllava_core import ComponentSpec, PluginInfo, hookimpl

@hookimpl
def rllava_plugin_info():
    return PluginInfo(summary="One of many.")

@hookimpl
def rllava_rewards():
    return [ComponentSpec(name=f"reward{number}-{{n}}", target="rllava_many{number}.parts:Reward", summary="A reward.")
            for n in range(2)]

@hookimpl
def rllava_algorithms():
    return [ComponentSpec(name="algorithm{number}", target="rllava_many{number}.parts:Algorithm", summary="Another.")]
"""


def main() -> None:
    """Print one line a command."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "wrong.yaml"
        config.write_text("model: {adapter: none}\nalgorithm: {name: none}\ntask: {}\ntraining: {stepz: 3}\n")
        many = _install(Path(folder) / "site", 50)
        rllava = [sys.executable, "-c", f"{CALL}; main()"]
        commands: list[tuple[str, list[str], str]] = [
            ("python -c pass", [sys.executable, "-c", "pass"], ""),
            ("rllava --help", [*rllava, "--help"], ""),
            ("rllava plugins", [*rllava, "plugins"], ""),
            ("rllava plugins --json", [*rllava, "plugins", "--json"], ""),
            ("rllava train (config error)", [*rllava, "train", str(config)], ""),
            ("rllava plugins, 50 more", [*rllava, "plugins"], many),
            ("rllava plugins --json, 50 more", [*rllava, "plugins", "--json"], many),
        ]
        for name, command, path in commands:
            seconds, torch = _median(command, path), _imports_torch(command, path)
            print(f"{name:<32} {seconds:.3f} s   torch imported: {torch}")


def _install(site: Path, count: int) -> str:
    """So many distributions of one plugin with three components each; returns the directory for the path."""
    for number in range(count):
        package, info = site / f"rllava_many{number}", site / f"rllava_many{number}-1.0.dist-info"
        package.mkdir(parents=True)
        info.mkdir()
        package.joinpath("__init__.py").write_text("")
        package.joinpath("plugin.py").write_text(PLUGIN.replace("{number}", str(number)).replace("{{n}}", "{n}"))
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: rllava-many{number}\nVersion: 1.0\nRequires-Dist: rllava-core>=1.0.0a1,<2\n"
        )
        info.joinpath("entry_points.txt").write_text(f"[rllava]\nmany{number} = rllava_many{number}.plugin\n")
    return str(site)


def _median(command: list[str], path: str) -> float:
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False, env=_environment(path))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first run warms the caches


def _imports_torch(command: list[str], path: str) -> bool:
    verbose = [command[0], "-X", "importtime", *command[1:]]
    output = subprocess.run(verbose, capture_output=True, text=True, check=False, env=_environment(path)).stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in output.splitlines())


def _environment(path: str) -> dict[str, str]:
    """Without the setting that keeps Python from caching compiled modules, as on a user's machine."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": path,
    }


if __name__ == "__main__":
    main()
