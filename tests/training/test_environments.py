"""The environments of a run travel to other processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rllava_core.config import load
from rllava_core.errors import PluginError
from rllava_core.mdp.environment import Start
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.mdp.pool import LocalEnvironments
from rllava_core.mdp.workers import WorkerEnvironments
from rllava_core.plugins import load_plugins
from rllava_core.training.environments import environment_pool

MISBEHAVING = "task.environment={name: misbehaving, length: 2}"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_config_says_where_environments_run(toy_config: Path, workers: int) -> None:
    resolved = load(toy_config, [MISBEHAVING, f"task.workers={workers}"], load_plugins())
    pool = environment_pool(resolved)
    try:
        [seen] = pool.reset([Start(None, 5)])
        first, last = (pool.step({0: Action("left", 0)})[0] for _ in range(2))
    finally:
        pool.close()

    assert isinstance(pool, WorkerEnvironments if workers else LocalEnvironments)
    assert isinstance(seen, Observation)
    assert seen.choices == ("left", "right")
    assert isinstance(first, Transition)
    assert isinstance(last, Transition)
    assert (first.done, last.done) == (False, True)  # the component's options have arrived


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_cannot_be_made_is_named(toy_config: Path, workers: int) -> None:
    options = "task.environment={name: misbehaving, how: raises, at: -1}"
    pool = environment_pool(load(toy_config, [options, f"task.workers={workers}"], load_plugins()))
    with pytest.raises(
        PluginError, match=r"^environment 'rllava-toy/misbehaving': making 'Misbehaving' from .*no such"
    ):
        pool.reset([Start(None, 5)])
    pool.close()


def test_workers_import_no_torch() -> None:
    script = (
        "import sys, rllava_core.mdp.worker_process, rllava_core.training.environments; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "False\n"
