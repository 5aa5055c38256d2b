"""From a resolved config to the parts of a run. The first place that imports components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from rllava_core.algorithms.protocol import Algorithm
from rllava_core.config import Resolved, ResolvedConfig
from rllava_core.engines.protocol import RolloutEngine, RolloutSetup, TrainEngine, TrainSetup
from rllava_core.errors import DataError, PluginError, RllavaError, TrainingError
from rllava_core.mdp.environment import Environment
from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.rewards import WeightedReward
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.training.seeds import WEIGHTS, derive, seed_everything


@dataclass(frozen=True)
class Task:
    """Where episodes come from and what is rewarded. Needs no model."""

    environment: Callable[[], Environment]
    examples: Callable[[Split], Sequence[Example] | None]
    rewards: tuple[WeightedReward, ...]
    max_new_tokens: int

    @property
    def primary(self) -> str | None:
        """Name of the reward that decides success."""
        return self.rewards[0].name if self.rewards else None


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of."""

    task: Task
    adapter: ModelAdapter
    media: MediaStore
    policy: Policy
    algorithm: Algorithm
    trainer: TrainEngine
    sampler: RolloutEngine


def build_task(resolved: ResolvedConfig) -> Task:
    """Read the data and make the rewards. Raises DataError."""
    run = resolved.run
    dataset = resolved.dataset.create() if resolved.dataset is not None else None

    def examples(split: Split) -> Sequence[Example] | None:
        if dataset is None:
            return None
        found: Sequence[Example] = dataset.examples(split)
        if not found:
            raise DataError(f"data set {run.task.dataset.name if run.task.dataset else ''!r} has no {split} examples")
        return found

    rewards = tuple(
        WeightedReward(section.reported_as, section.weight, part.create())
        for section, part in zip(run.task.rewards, resolved.rewards, strict=True)
    )
    return Task(
        lambda: cast(Environment, resolved.environment.create(run.task)),
        examples,
        rewards,
        run.task.max_new_tokens,
    )


def build_parts(resolved: ResolvedConfig, checkpoint: Path | None = None, *, learning: bool = True) -> Parts:
    """Load the model, or the weights of a checkpoint, and put everything together.

    learning: off for evaluation alone, which needs no reference policy.

    Data are read before any weight is loaded, so that their errors come at once.
    """
    run = resolved.run
    task = build_task(resolved)
    task.examples("held_out")
    if learning:
        task.examples("train")
    algorithm: Algorithm = resolved.algorithm.create()
    origin = resolved.model if checkpoint is None else _from_checkpoint(resolved.model, checkpoint)
    # Heads take their initial values from the same stream whether or not the weights come from a checkpoint.
    seed_everything(derive(run.training.seed, WEIGHTS))
    with _reading(checkpoint):
        policy = _policy(origin, algorithm, run.training.temperature)
    reference = None
    if learning and algorithm.uses_reference:
        seed_everything(derive(run.training.seed, WEIGHTS))
        reference = _policy(resolved.model, algorithm, run.training.temperature)
    media = MediaStore(policy.adapter)
    trainer: TrainEngine = resolved.train_engine.create(TrainSetup(policy, reference, media, run.training))
    sampler: RolloutEngine = resolved.rollout_engine.create(RolloutSetup(trainer.policy, media, trainer.autocast))
    return Parts(task, policy.adapter, media, policy, algorithm, trainer, sampler)


def _policy(model: Resolved, algorithm: Algorithm, temperature: float) -> Policy:
    adapter: ModelAdapter = model.create()
    weights = adapter.load()
    return Policy(adapter, weights, algorithm.heads, temperature)


@contextmanager
def _reading(checkpoint: Path | None) -> Iterator[None]:
    """A damaged checkpoint is reported as one, whatever the reader of its files raises."""
    try:
        yield
    except RllavaError:
        raise
    except Exception as error:
        if checkpoint is None:
            raise
        raise TrainingError(
            f"checkpoint {checkpoint} cannot be loaded ({' '.join(f'{type(error).__name__}: {error}'.split())}); "
            "remove it to go on from the one before"
        ) from error


def _from_checkpoint(model: Resolved, checkpoint: Path) -> Resolved:
    """The same adapter, reading a checkpoint that it wrote itself."""
    if not isinstance(model.config, ModelConfig):
        raise PluginError(
            f"model {model.component.qualified_name!r}: its config is no rllava_core.policy.config.ModelConfig, "
            "so its checkpoints cannot be loaded"
        )
    config = model.config.model_copy(update={"path": str(checkpoint), "from_scratch": None})
    return Resolved(model.component, config)


def device_name(policy: Policy) -> str:
    """For the manifest."""
    device = policy.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
