"""The sections of a config and every key of theirs, with type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Options(BaseModel):
    """Base of every section and of every component's own config: refuses unknown keys, is frozen."""

    # Constants: where a limit may be infinite, the resolved config says so and not null.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class ComponentSection(BaseModel):
    """The choice of a component, written as `name` or as `{name: name, option: value, …}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="a component, or `distribution/component` where the bare name is ambiguous")

    @model_validator(mode="before")
    @classmethod
    def _accept_a_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """What belongs to the component."""
        return dict(self.model_extra or {})


class RewardSection(ComponentSection):
    """A reward function and its weight in the sum."""

    weight: float = Field(default=1.0, description="factor of this reward in the sum", allow_inf_nan=False)
    label: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.-]+$", description="reported under this name instead of the component's"
    )

    @property
    def reported_as(self) -> str:
        return self.label or self.name.rpartition("/")[2]


class ModelSection(BaseModel):
    """The model family; everything beside `adapter` belongs to it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    adapter: str = Field(description="the model adapter component")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskSection(Options):
    """What is to be learnt: where episodes come from and what is rewarded."""

    environment: ComponentSection = Field(
        default=ComponentSection(name="single_turn"), description="where episodes happen"
    )
    dataset: ComponentSection | None = Field(default=None, description="examples, for environments that need them")
    prompt: str = Field(
        default="{question}",
        description="text of the question; `{field}` is replaced by a field of the example, `{image}` says where the "
        "next image goes (otherwise all images come first); `{{` is a brace",
    )
    choices: tuple[str, ...] | None = Field(default=None, description="the discrete action set; none: free text")
    rewards: tuple[RewardSection, ...] = Field(
        default=(), description="reward functions; the first is the primary one, which decides success"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="limit of tokens of one free-text action")
    max_turns: int = Field(default=200, ge=1, description="an episode that goes on after so many turns is truncated")
    max_episode_tokens: int | None = Field(
        default=None,
        ge=1,
        description="an episode is truncated before a turn that could bring the tokens shown and sampled in it beyond "
        "this; null: no limit but the model's own",
    )
    history: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="how many turns the policy sees, the current one included: 1 shows it the current observation "
        "only; the system messages of the first observation are always seen",
    )
    workers: int = Field(
        default=0,
        ge=0,
        description="processes that environments run in; 0: in this one, where an environment that raises ends the "
        "run, while in a worker it ends its own episode",
    )
    worker_timeout: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds that an environment in a worker may take for one reset or step",
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        switches = [item for item in value if isinstance(item, bool)]
        if switches:
            raise ValueError(f"YAML reads yes, no, on, off, true and false as {switches[0]}; put the answers in quotes")
        return tuple(str(item) if isinstance(item, (int, float)) else item for item in value)

    @field_validator("choices")
    @classmethod
    def _distinct_choices(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(value) < 2 or len(set(value)) < len(value) or "" in value):
            raise ValueError("needs at least two different, non-empty entries")
        return value

    @field_validator("rewards")
    @classmethod
    def _distinct_rewards(cls, value: tuple[RewardSection, ...]) -> tuple[RewardSection, ...]:
        names = [reward.reported_as for reward in value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} is listed twice; tell them apart with `label`")
        return value


class EngineSection(Options):
    """Who computes gradients and who samples."""

    train: ComponentSection = Field(default=ComponentSection(name="local"), description="an engine that trains")
    rollout: ComponentSection = Field(default=ComponentSection(name="local"), description="an engine that samples")

    @field_validator("train", "rollout", mode="before")
    @classmethod
    def _options_alone_are_of_the_local_engine(cls, value: Any) -> Any:
        return {"name": "local", **value} if isinstance(value, dict) else value


DecayRate = Annotated[float, Field(ge=0, lt=1)]


class TrainingSection(Options):
    """The loop."""

    steps: int = Field(ge=1, description="how many times to sample and learn")
    prompts_per_step: int = Field(default=32, ge=1, description="examples (or seeds) sampled a step; each is a group")
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of the policy's softmax while sampling and training"
    )
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False, description="AdamW's peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="AdamW's decoupled weight decay")
    adam_betas: tuple[DecayRate, DecayRate] = Field(default=(0.9, 0.999), description="AdamW's moment decay rates")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of the learning rate after the warm-up; linear and cosine end at zero"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises to its peak")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="global gradient norm limit; null: none")
    micro_batch_tokens: int = Field(
        default=16_384, ge=1, description="tokens of one forward and backward; gradients accumulate over a step"
    )
    eval_every: int = Field(default=50, ge=0, description="steps between evaluations; 0: only first and last")
    eval_episodes: int | None = Field(default=None, ge=1, description="held-out episodes; null: all")
    save_every: int = Field(default=50, ge=0, description="steps between checkpoints; 0: only the last")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints kept, beside the best one")
    sample_every: int = Field(default=50, ge=0, description="steps between readable trajectory samples; 0: none")
    max_logprob_gap: float = Field(
        default=0.5,
        gt=0,
        description="largest mean |log-prob while sampling - recomputed| (nats) before a run stops as misaligned",
    )
    max_token_gap: float | None = Field(
        default=None,
        gt=0,
        description="largest |log-prob while sampling - recomputed| (nats) of any one decision; null: no limit",
    )
    unseen_images: Literal["warn", "stop", "ignore"] = Field(
        default="warn",
        description="what to do if other images give the very same log-probs, which every evaluation looks at",
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(default=(), description="beside metrics.jsonl")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything random in the run")


class RunConfig(Options):
    """A whole run."""

    model: ModelSection
    algorithm: ComponentSection
    task: TaskSection
    engine: EngineSection = EngineSection()
    training: TrainingSection

    def to_yaml(self) -> str:
        """The config with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
