"""How long the commands take that must answer at once: `rllava --help`, `rllava plugins`, and a config error.

    uv run python benchmarks/startup.py

Prints the median of several warm runs beside that of an interpreter that starts and does nothing, and whether torch was
imported.
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


def main() -> None:
    """Print one line a command."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "wrong.yaml"
        config.write_text("model: {adapter: none}\nalgorithm: {name: none}\ntask: {}\ntraining: {stepz: 3}\n")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "rllava --help": [sys.executable, "-c", f"{CALL}; main()", "--help"],
            "rllava plugins": [sys.executable, "-c", f"{CALL}; main()", "plugins"],
            "rllava train (config error)": [sys.executable, "-c", f"{CALL}; main()", "train", str(config)],
        }
        for name, command in commands.items():
            print(f"{name:<30} {_median(command):.3f} s   torch imported: {_imports_torch(command)}")


def _median(command: list[str]) -> float:
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False, env=_environment())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first run warms the caches


def _imports_torch(command: list[str]) -> bool:
    verbose = [command[0], "-X", "importtime", *command[1:]]
    output = subprocess.run(verbose, capture_output=True, text=True, check=False, env=_environment()).stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in output.splitlines())


def _environment() -> dict[str, str]:
    """Without the setting that keeps Python from caching compiled modules, as on a user's machine."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


if __name__ == "__main__":
    main()
