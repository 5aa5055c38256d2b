"""Several processes on this machine, started by torch's launcher, which accelerate's calls too.

accelerate's own starts one process only where there is no GPU. Several machines, or a config of accelerate's, are for
`accelerate launch` and `torchrun` themselves: `-m rllava_core train CONFIG --run-dir DIR`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress

import psutil

from rllava_core.errors import ConfigError, RllavaError, TrainingError


def processes() -> int:
    """How many processes a launcher says that there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def launch(count: int, arguments: Sequence[str], *, cpu: bool) -> None:
    """Run `rllava` with these arguments in so many processes, and wait for them.

    cpu: they are to leave accelerators alone, as they do where there are none.
    Ctrl-C reaches each of them, which finish their step and save. Raises ConfigError or TrainingError if one fails: the
    others are ended then.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its tables of exit codes and warnings of threads are not for the users of a command.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // count))}
    if cpu or not torch.accelerator.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    os.environ.update(environment)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
    )
    failures: list[BaseException] = []

    def run() -> None:
        try:
            elastic_launch(config, sys.executable)("-m", "rllava_core", *arguments)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            failures.append(error)

    # In a thread, where the launcher leaves signals alone: at Ctrl-C it would end processes that save their work. They
    # have sessions of their own, so that a terminal does not tell them.
    worker = threading.Thread(target=run)
    before = signal.signal(signal.SIGINT, lambda *_: _interrupt(psutil.Process().children()))
    try:
        worker.start()
        worker.join()
    finally:
        signal.signal(signal.SIGINT, before)
    if not failures:
        return
    if not isinstance(failures[0], ChildFailedError):
        raise failures[0]
    number, failure = failures[0].get_first_failure()
    how = f"by signal {-failure.exitcode}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
    kind: type[RllavaError] = ConfigError if failure.exitcode == ConfigError.exit_code else TrainingError
    raise kind(f"process {number} of {count} ended {how}, and the others with it; its own message stands above, if any")


def _interrupt(children: Sequence[psutil.Process]) -> None:
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGINT)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
