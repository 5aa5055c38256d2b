"""Runs `rllava` commands in several processes each, forked from this one, which has imported everything.

    python in_processes.py JOBS.json

JOBS.json is a list of jobs, done one after the other:

    {"processes": 2, "commands": [["train", …], …], "output": PATH, "environments": [{}, {"RLLAVA_PLUGINS": "…"}]}

What process number N of a job writes to its screen is in the file PATH.N, followed by its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from rllava_core.cli import rllava

IMPORTED = (
    *("accelerate.tracking", "rich.progress", "torch.nn.parallel", "transformers.models.qwen2_vl"),
    *("rllava_core.cli.train", "rllava_core.training.loop", "rllava_core.mdp.single_turn"),
    *("rllava_core.engines.local_train", "rllava_core.engines.local_rollout"),
    *("rllava_grpo.algorithm", "rllava_ppo.algorithm", "rllava_qwen2vl.adapter", "rllava_vqa.datasets.jsonl"),
)
"""By a run on its way."""


def run(job: dict[str, Any], rank: int, port: int) -> None:
    """In a forked process."""
    output = os.open(f"{job['output']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"]}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    os.environ.update(job.get("environments", [{}] * job["processes"])[rank])
    code: object = 0
    for command in job["commands"]:
        try:
            rllava(command, prog_name="rllava")
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # noqa: BLE001 - reported, since nothing may reach the loop of the parent
            traceback.print_exc()
            code = 99
        if code:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, f"\nexit code {code or 0}\n".encode())
    os._exit(0)


def main(jobs: Path) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(job["processes"]):
            if os.fork() == 0:
                run(job, rank, port)
        for _ in range(job["processes"]):
            os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
