"""From a resolved config to the parts of a run. The first place that imports components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel

from rllava_core.algorithms.protocol import Algorithm
from rllava_core.config import Resolved, ResolvedConfig
from rllava_core.engines.config import overlaps
from rllava_core.engines.protocol import AnswerSetup, RolloutEngine, RolloutSetup, TrainEngine, TrainSetup, close
from rllava_core.errors import ConfigError, DataError, PluginError, RllavaError, TrainingError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.messages import Observation
from rllava_core.mdp.pool import EnvironmentPool
from rllava_core.mdp.rewards import WeightedReward
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.config import ENCODED_BYTES, ModelConfig
from rllava_core.policy.encoding import encoder_of
from rllava_core.policy.hosted import Hosted
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy
from rllava_core.policy.trained import copy_sharing_frozen, set_trained, share_frozen
from rllava_core.training.environments import environment_pool
from rllava_core.training.episodes import Episodes, Limits
from rllava_core.training.seeds import HELD_OUT, WEIGHTS, derive, seed_everything


@dataclass(frozen=True)
class Task:
    """Where episodes come from and what is rewarded. Needs no model."""

    environments: EnvironmentPool
    examples: Callable[[Split], Sequence[Example] | None]
    rewards: tuple[WeightedReward, ...]
    limits: Limits

    @property
    def primary(self) -> str | None:
        """Name of the reward that decides success."""
        return self.rewards[0].name if self.rewards else None


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of. A context manager, with which environments and engines end.

    ending: what has to be ended.
    """

    task: Task
    episodes: Episodes
    adapter: ModelAdapter
    media: MediaStore
    policy: Policy
    algorithm: Algorithm
    trainer: TrainEngine
    sampler: RolloutEngine
    ending: ExitStack

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.close()


@dataclass(frozen=True)
class Players:
    """What plays episodes, and learns nothing. A context manager, as `Parts` is.

    policy: None where the rollout engine answers by a model of its own.
    """

    task: Task
    episodes: Episodes
    algorithm: Algorithm
    policy: Policy | None
    ending: ExitStack

    def __enter__(self) -> Players:
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.close()


def build_players(resolved: ResolvedConfig, checkpoint: Path | None = None) -> Players:
    """For evaluation: the model, or the weights of a checkpoint, unless the engine answers by a model of its own."""
    if "own_model" not in resolved.rollout_engine.component.spec.provides:
        # Most images are seen once anyway, and those of a batch faster together.
        parts = build_parts(resolved, checkpoint, learning=False, encoding=False)
        return Players(parts.task, parts.episodes, parts.algorithm, parts.policy, parts.ending)
    with ExitStack() as ending:
        task = build_task(resolved)
        ending.callback(task.environments.close)
        _first_observation(task, resolved.run.training.seed)
        adapter = Hosted()
        sampler: RolloutEngine = resolved.rollout_engine.create(AnswerSetup(resolved.run.training.temperature))
        ending.callback(close, sampler)
        episodes = Episodes(adapter, MediaStore(adapter), sampler, task.environments, task.limits)
        return Players(task, episodes, resolved.algorithm.create(), None, ending.pop_all())


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
    section = run.task
    limits = Limits(section.max_new_tokens, section.max_turns, section.max_episode_tokens, section.history)
    return Task(environment_pool(resolved), examples, rewards, limits)


def build_parts(
    resolved: ResolvedConfig, checkpoint: Path | None = None, *, learning: bool = True, encoding: bool = True
) -> Parts:
    """Load the model, or the weights of a checkpoint, and put everything together.

    learning: off for evaluation alone, which needs no copies of the policy and no critic.
    encoding: whether frozen parts see each image once, where they can.

    Data are read before any weight is loaded, so that their errors come at once.
    """
    with ExitStack() as ending:
        return _built(resolved, checkpoint, ending, learning=learning, encoding=encoding)


def _built(
    resolved: ResolvedConfig, checkpoint: Path | None, ending: ExitStack, *, learning: bool, encoding: bool
) -> Parts:
    run = resolved.run
    task = build_task(resolved)
    ending.callback(task.environments.close)
    task.examples("held_out")
    if learning:
        task.examples("train")
    algorithm: Algorithm = resolved.algorithm.create()
    if learning:
        _check_overlap(resolved, algorithm)
    else:
        resolved = _without_overlap(resolved)
    observation = _first_observation(task, run.training.seed)
    # Nobody acts by a critic with a trunk of its own.
    declared = {name: head for name, head in algorithm.heads.items() if learning or not head.own_trunk}
    heads = {name: _sized(head, observation, resolved) for name, head in declared.items()}

    def policy_of(model: Resolved) -> Policy:
        # Heads take their initial values from the same stream whether or not the weights come from a checkpoint.
        seed_everything(derive(run.training.seed, WEIGHTS))
        adapter: ModelAdapter = model.create()
        weights = adapter.load()
        if isinstance(model.config, ModelConfig):
            set_trained(weights, adapter, model.config)
        trunk = copy_sharing_frozen(weights) if any(head.own_trunk for head in heads.values()) else None
        return Policy(adapter, weights, heads, run.training.temperature, trunk)

    with _reading(checkpoint):
        policy = policy_of(
            resolved.model if checkpoint is None else _from_checkpoint(resolved.model, checkpoint, learning)
        )
    copies = {name: _first(policy, policy_of, resolved, checkpoint) for name in algorithm.copies} if learning else {}
    media = MediaStore(policy.adapter)
    trainer: TrainEngine = resolved.train_engine.create(TrainSetup(policy, copies, media, run.training))
    ending.callback(close, trainer)
    if encoding:
        _encode_once(resolved.model.config, policy, media, trainer)
    sampler: RolloutEngine = resolved.rollout_engine.create(RolloutSetup(trainer.policy, media, trainer.autocast))
    ending.callback(close, sampler)
    world = trainer.world
    episodes = Episodes(policy.adapter, media, sampler, task.environments, task.limits, world=world)
    ending.callback(episodes.close)
    return Parts(task, episodes, policy.adapter, media, policy, algorithm, trainer, sampler, ending.pop_all())


def _encode_once(config: BaseModel, policy: Policy, media: MediaStore, trainer: TrainEngine) -> None:
    """Let frozen parts see every image once."""
    limit = config.encoded_bytes if isinstance(config, ModelConfig) else ENCODED_BYTES
    encode = encoder_of(policy, trainer.autocast) if limit else None
    if encode is not None:
        media.encode_by(encode, limit)


def _check_overlap(resolved: ResolvedConfig, algorithm: Algorithm) -> None:
    """Raises ConfigError for episodes sampled ahead by an algorithm that would take them for the policy's own."""
    if not overlaps(resolved.rollout_engine.config):
        return
    name = f"algorithm {resolved.algorithm.component.spec.name!r}"
    importance = getattr(resolved.algorithm.config, "importance", None)
    if algorithm.experience != "rollouts":
        problem = f"samples ahead, and {name} samples nothing"
    elif importance is None:
        problem = f"trains on what the weights of one step before have sampled, and {name} has no correction for that"
    elif importance == "none":
        problem = (
            "trains on what the weights of one step before have sampled: correct that by algorithm.importance=token, "
            "or sequence"
        )
    else:
        return
    raise ConfigError(f"engine.rollout.async: 1 {problem}; without it: engine.rollout.async=0")


def _without_overlap(resolved: ResolvedConfig) -> ResolvedConfig:
    """The same, with a rollout engine that acts by the policy itself."""
    if not overlaps(resolved.rollout_engine.config):
        return resolved
    config = resolved.rollout_engine.config.model_copy(update={"async": 0})
    return replace(resolved, rollout_engine=replace(resolved.rollout_engine, config=config))


def _first(
    policy: Policy, load: Callable[[Resolved], Policy], resolved: ResolvedConfig, checkpoint: Path | None
) -> Policy:
    """Another policy that is the one that training began with, and shares with `policy` what is not trained."""
    if checkpoint is None or _from_checkpoint(resolved.model, checkpoint, True) is resolved.model:
        return policy.copied()
    first = load(resolved.model)
    share_frozen(first, policy)
    return first


def _first_observation(task: Task, seed: int) -> Observation:
    """What the first held-out episode shows, so that an environment that cannot begin one is known at once."""
    examples = task.examples("held_out")
    start = Start(None if examples is None else examples[0], derive(seed, HELD_OUT, 0))
    [observation] = task.environments.reset([start])
    if isinstance(observation, Failure):
        raise TrainingError(f"{start.name}: the environment {observation.what}")
    return observation


def _sized(head: Head, observation: Observation, resolved: ResolvedConfig) -> Head:
    """A head with as many outputs as there are choices, where it asks for that."""
    if head.size != "choices":
        return head
    if observation.choices is None:
        raise ConfigError(
            f"algorithm {resolved.algorithm.component.spec.name!r} values each of the choices, and environment "
            f"{resolved.environment.component.spec.name!r}, as it is configured, asks for free text; set task.choices, "
            "or the environment's own option that offers choices"
        )
    return replace(head, size=len(observation.choices))


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


def _from_checkpoint(model: Resolved, checkpoint: Path, learning: bool) -> Resolved:
    """The same adapter, reading a checkpoint that it wrote itself.

    Low-rank adapters are merged in it: enough to act by. To learn on, the model that training began with is loaded, and
    the adapters themselves are restored with the rest of the run.
    """
    if not isinstance(model.config, ModelConfig):
        raise PluginError(
            f"model {model.component.qualified_name!r}: its config is no rllava_core.policy.config.ModelConfig, "
            "so its checkpoints cannot be loaded"
        )
    adapted = "lora" in (model.config.train.vision, model.config.train.connector, model.config.train.language)
    if adapted and learning:
        return model
    config = model.config.loading(str(checkpoint))
    return Resolved(model.component, config)


def device_name(policy: Policy) -> str:
    """For the manifest."""
    device = policy.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
