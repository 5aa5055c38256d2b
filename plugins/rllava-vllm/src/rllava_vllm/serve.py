"""A vLLM server that answers for a policy: `python -m rllava_vllm.serve MODEL [options of vllm serve]`.

It is vLLM's server with the arguments without which its answers would not be the policy's, and with vLLM's development
mode, whose routes take new weights. They ask for no password: unless `--host` says otherwise, only this machine reaches
them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rllava_vllm.arguments import ENVIRONMENT, cpu_arguments, exact_arguments

LONGEST_ON_CPU = 8192
"""Tokens read at once on a CPU, unless the options say otherwise."""

STARTED_BY = "RLLAVA_VLLM_STARTED_BY"
"""The process id of the run that starts a server for itself, which ends with it however it ends."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str]) -> None:
    """Becomes the server."""
    _end_with(os.environ.pop(STARTED_BY, None))
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m rllava_vllm.serve MODEL [options of vllm serve]")
    model, given = arguments[0], list(arguments[1:])
    exact = {**exact_arguments(), "enable_scale_out": True}  # the route that takes token ids and features
    if "--max-num-batched-tokens" not in given and _on_cpu():
        exact |= cpu_arguments(LONGEST_ON_CPU)
    host = [] if "--host" in given else ["--host", "127.0.0.1"]
    # Not `vllm serve`, which in vLLM 0.32 asks for a distribution of that name, and the one for CPUs has another.
    entry = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command = [sys.executable, *entry, *flags(exact), *host, *given]
    environment = {**ENVIRONMENT, **os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    os.execve(sys.executable, command, environment)


def _end_with(parent: str | None) -> None:
    """Ask the kernel for SIGTERM when the parent dies, which holds for what this process becomes, too."""
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has died already
        sys.exit(f"the run that started this server, process {parent}, has ended")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of the command line."""
    found: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
