"""What is to be planned: a model, how it is trained, and what a step computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.algorithms.protocol import Algorithm
from rllava_core.config import Resolved, ResolvedConfig, TrainingSection
from rllava_core.engines.config import Divided, LocalRolloutConfig, LocalTrainConfig, TrainOptions, overlaps
from rllava_core.errors import ConfigError
from rllava_core.planning.workload import Workload
from rllava_core.plugins import Component
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.policy import Head

PROMPT_TOKENS = 64
"""Tokens of a turn's text, unless they are told: a question and the words of the chat template."""


@dataclass(frozen=True)
class Levers:
    """What trades time for memory, by the names of the config's keys."""

    dtype: str = "float32"
    micro_batch_tokens: int = 16_384
    max_sequences: int = 512
    mixed_precision: str = "no"
    prefix_sharing: bool = True
    checkpoint_activations: bool = False
    offload_activations: bool = False
    optimizer: str = "adamw"
    optimizer_on_cpu: bool = False
    stochastic_rounding: bool = False
    step_in_backward: bool = False
    unseen_images: str = "warn"

    def overrides(self, before: Levers) -> list[str]:
        """The overrides of a config by which `before` becomes these."""
        changed = [item.name for item in fields(self) if getattr(self, item.name) != getattr(before, item.name)]
        return [f"{_SECTIONS.get(name, 'engine.train')}.{name}={_yaml(getattr(self, name))}" for name in changed]


_SECTIONS = {
    "dtype": "model",
    "micro_batch_tokens": "training",
    "unseen_images": "training",
    "max_sequences": "engine.rollout",
}


@dataclass(frozen=True)
class Request:
    """Everything that a plan is made of.

    minibatches: optimizer steps of a pass over a step's episodes; epochs: passes.
    entropy: whether the loss has a gradient through entropies.
    copies: names of the frozen copies of the policy that the algorithm keeps.
    acting_copy: one more acts while the policy is trained.
    rollouts: whether episodes are sampled, or demonstrated.
    device: where the model is.
    evaluated: held-out episodes; None: not known, many.
    processes: that share each step; what is planned is one of them. divided: of what each holds a part.
    has_levers: whether the train engine has the options that `--fit` searches.
    """

    model: Resolved
    workload: Workload
    levers: Levers
    training: TrainingSection
    heads: Mapping[str, Head] = field(default_factory=dict)
    copies: Sequence[str] = ()
    acting_copy: bool = False
    minibatches: int = 1
    epochs: int = 1
    entropy: bool = False
    rollouts: bool = True
    device: Literal["cpu", "cuda"] = "cuda"
    evaluated: int | None = None
    processes: int = 1
    divided: frozenset[Divided] = frozenset()
    has_levers: bool = True

    @property
    def own_prompts(self) -> int:
        """Of a step's prompts, how many the busiest process has."""
        return -(-self.workload.prompts // self.processes)

    def share_of(self, held: Divided) -> int:
        """By how much what a process holds of something is smaller than all of it."""
        return self.processes if held in self.divided else 1

    @property
    def options(self) -> ModelConfig:
        config = self.model.config
        if not isinstance(config, ModelConfig):
            name = self.model.component.spec.name
            raise ConfigError(f"model {name!r}: its config is no ModelConfig, so it cannot be planned")
        return config

    def with_levers(self, **changes: Any) -> Request:
        """The same run with other levers."""
        levers = replace(self.levers, **changes)
        config = self.options.model_copy(update={"dtype": levers.dtype})
        return replace(self, levers=levers, model=Resolved(self.model.component, config))


def request_of_config(resolved: ResolvedConfig, sizes: Mapping[str, Any]) -> Request:
    """The request of a run's config.

    sizes: what a config cannot say of the prompts, as fields of `Workload`.

    Raises ConfigError for an engine of which nothing is known.
    """
    train, rollout = resolved.train_engine.config, resolved.rollout_engine.config
    if not isinstance(train, TrainOptions):
        name = resolved.run.engine.train.name
        raise ConfigError(f"engine.train: {name!r} does not train as the local engine does, so it cannot be planned")
    if not isinstance(rollout, LocalRolloutConfig):
        name = resolved.run.engine.rollout.name
        raise ConfigError(f"engine.rollout: {name!r}: only runs that sample by the engine `local` can be planned")
    run, algorithm = resolved.run, resolved.algorithm
    options = resolved.model.config
    made: Algorithm = algorithm.create()
    choices = None if run.task.choices is None else len(run.task.choices)
    known: dict[str, Any] = {
        "prompts": run.training.prompts_per_step,
        "group_size": made.group_size,
        "answer_tokens": run.task.max_new_tokens,
        "choices": choices,
    }
    gradient = algorithm.config if isinstance(algorithm.config, PolicyGradientConfig) else None
    levers = {item.name: getattr(train, item.name) for item in fields(Levers) if item.name in type(train).model_fields}
    return Request(
        model=resolved.model,
        workload=Workload(**{**known, **sizes}),
        levers=Levers(
            **levers,
            dtype=options.dtype if isinstance(options, ModelConfig) else "float32",
            micro_batch_tokens=run.training.micro_batch_tokens,
            max_sequences=rollout.max_sequences,
            unseen_images=run.training.unseen_images,
        ),
        training=run.training,
        heads={
            name: replace(head, size=choices or 2) if head.size == "choices" else head
            for name, head in made.heads.items()
        },
        copies=tuple(made.copies),
        acting_copy=overlaps(rollout),
        minibatches=1 if gradient is None else gradient.minibatches,
        epochs=1 if gradient is None else gradient.epochs,
        entropy=gradient is not None and gradient.entropy_coefficient != 0,
        rollouts=made.experience == "rollouts",
        device="cpu" if train.device == "cpu" else "cuda",
        evaluated=run.training.eval_episodes,
        divided=train.divided,
        has_levers=isinstance(train, LocalTrainConfig),
    )


def request_of_model(component: Component, path: str, sizes: Mapping[str, Any]) -> Request:
    """The request of a model alone: trained in full in bfloat16, 8 prompts a step, 8 answers to each."""
    config = component.load_config()
    assert config is not None
    options = config(path=path, dtype="bfloat16")
    known: dict[str, Any] = {"prompts": 8, "group_size": 8, "answer_tokens": 256}
    return Request(
        model=Resolved(component, options),
        workload=Workload(**{**known, **sizes}),
        levers=Levers(dtype="bfloat16"),
        training=TrainingSection(steps=1),
    )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
