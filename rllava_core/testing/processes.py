"""What a component does in another process, where texts have other hashes and sets another order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rllava_core.testing.conformance import require


def in_another_process(module: str, function: str, *arguments: Any) -> str:
    """What `function` of `module` returns there, a line of text. arguments: values that JSON can hold.

    Raises ConformanceError if it fails.
    """
    # Unless the seed of hashes is the same by chance, as where somebody has fixed it.
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    script = (
        f"import sys; sys.path[:] = {sys.path!r}; import json; from {module} import {function} as function; "
        "print(function(*map(json.loads, sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(json.dumps, arguments)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    require(done.returncode == 0, f"it fails in another process: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()[-1]  # a component may print before
