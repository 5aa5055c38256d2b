"""Runs `rllava` commands, each in a process of its own that is forked from this one, which has imported everything.

Reads a line of JSON for each command from standard input and answers with one on standard output:

    {"args": ["train", …], "stdout": PATH, "stderr": PATH, "signals": [], "kill_after": null, "file_limit": null}
    {"code": 0}                  the exit code, or minus the number of the signal that ended the process

signals: {"at": "module:function", "call": 2, "signal": "SIGKILL", "after": false}: what the process does to itself
before (or after) the second call of that function. kill_after: seconds until this process kills it. file_limit: bytes
beyond which a file cannot grow, as on a disk that is full.

Nothing is computed here, so a forked process finds torch as a fresh one would.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any

# What a run imports on its way.
import accelerate.tracking  # noqa: F401
import rich.progress  # noqa: F401
import transformers.utils  # noqa: F401

import rllava_core.cli.evaluate
import rllava_core.cli.train
import rllava_core.engines.local_rollout
import rllava_core.engines.local_train
import rllava_core.mdp.single_turn
import rllava_core.testing.tiny
import rllava_core.training.loop  # noqa: F401
import rllava_toy.algorithm
import rllava_toy.task  # noqa: F401
from rllava_core.cli import rllava


def send_at(at: str, call: int, name: str, after: bool) -> None:
    """Replace a function with one that sends this process a signal around its call number `call`."""
    module, _, path = at.partition(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, attribute)
    calls = 0

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), getattr(signal, name))
        result = original(*args, **kwargs)
        if calls == call and after:
            os.kill(os.getpid(), getattr(signal, name))
        return result

    setattr(owner, attribute, replacement)


def run(request: dict[str, Any]) -> int:
    """In the forked process: carry out the command. Returns its exit code."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for item in request["signals"]:
        send_at(item["at"], item["call"], item["signal"], item["after"])
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    try:
        rllava(request["args"], prog_name="rllava")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - reported, since nothing may reach the loop of the parent
        traceback.print_exc()
        return 99
    return 0


def main() -> None:
    with contextlib.suppress(ImportError):  # a second of compiled expressions that every run would make for itself
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            code = run(request)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            os.kill(process, signal.SIGKILL)  # until it is waited for, its number belongs to no other process
        _, status = os.waitpid(process, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers)


if __name__ == "__main__":
    main()
