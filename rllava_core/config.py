"""The run's config: sections, YAML files, `section.key=value` overrides, and errors that name the key.

A section that chooses a component (`model`, `algorithm`, `task.environment`, …) holds the component's name and, beside
it, the component's own options, which the component's own config model validates. Every section refuses unknown keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rllava_core.errors import ConfigError
from rllava_core.plugins import Component, Registry
from rllava_core.specs import Kind


class Options(BaseModel):
    """Base of every section and of every component's own config: refuses unknown keys, is frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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

    environment: ComponentSection = ComponentSection(name="single_turn")
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

    @field_validator("choices", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(str(item) if isinstance(item, (int, float)) and item is not True else item for item in value)
        return value

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

    train: ComponentSection = ComponentSection(name="local")
    rollout: ComponentSection = ComponentSection(name="local")


class TrainingSection(Options):
    """The loop."""

    steps: int = Field(ge=1, description="how many times to sample and learn")
    prompts_per_step: int = Field(default=32, ge=1, description="examples (or seeds) sampled a step; each is a group")
    temperature: float = Field(default=1.0, gt=0, description="of the policy's softmax while sampling and training")
    learning_rate: float = Field(default=1e-6, gt=0, description="AdamW's peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    adam_betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's moment decay rates")
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


@dataclass(frozen=True)
class Resolved:
    """A component and its validated config."""

    component: Component
    config: BaseModel

    def create(self, *arguments: Any) -> Any:
        """Import the target and call it with the config."""
        return self.component.load_target()(self.config, *arguments)


@dataclass(frozen=True)
class ResolvedConfig:
    """A config whose every component is found and whose every option is valid. Nothing heavy is imported yet."""

    run: RunConfig
    model: Resolved
    algorithm: Resolved
    environment: Resolved
    dataset: Resolved | None
    rewards: tuple[Resolved, ...]
    train_engine: Resolved
    rollout_engine: Resolved


class NoOptions(Options):
    """The config of a component without options."""


def load(path: Path, overrides: Sequence[str], registry: Registry) -> ResolvedConfig:
    """Read a YAML file, apply overrides, validate everything, and find every component.

    Raises ConfigError that names the file or override, the key and what would be right; PluginError for components
    that are missing, broken or ambiguous.
    """
    data = read_yaml(path)
    overridden = apply_overrides(data, overrides)
    source = _Source(str(path), overridden)
    try:
        run = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_describe(error, RunConfig, (), source)) from None
    return _resolve(run, registry, source)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError for a missing file, a syntax error, a repeated key or anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections (model, algorithm, task, training), found {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Set `section.key=value` in place; values are YAML. Returns which override set which key.

    Raises ConfigError for an override that is not of that form or that passes through something without keys.
    """
    applied: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        keys = tuple(key.split("."))
        if not separator or not all(keys):
            raise ConfigError(f"override {override!r}: expected section.key=value, such as training.steps=100")
        try:
            parsed = parse_yaml(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {_yaml_problem(error)}") from None
        _set(data, keys, parsed, override)
        applied[keys] = override
    return applied


def parse_yaml(text: str) -> Any:
    """Plain YAML data: no tags that build objects, no key written twice. Raises yaml.YAMLError."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent loss of a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _set(data: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    place: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                where = ".".join(keys[:depth])
                raise ConfigError(
                    f"override {override!r}: {where} is a list of {len(place)}; {key!r} is no index of it"
                )
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if not last and isinstance(place.get(key), str):
                place[key] = {"name": place[key]}  # a component written as a bare name gains options
            if not last and place.get(key) is None:
                place[key] = {}
        else:
            where = ".".join(keys[:depth])
            raise ConfigError(f"override {override!r}: {where} is {place!r}, which has no keys")
        if last:
            place[index] = value
        else:
            place = place[index]


@dataclass(frozen=True)
class _Source:
    """Where values came from, for messages."""

    path: str
    overrides: Mapping[tuple[str, ...], str]

    def of(self, key: tuple[str, ...]) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return f"override {self.overrides[key[:length]]!r}"
        return self.path


def _resolve(run: RunConfig, registry: Registry, source: _Source) -> ResolvedConfig:
    def resolve(
        kind: Kind, name: str, options: dict[str, Any], key: tuple[str, ...], role: str | None = None
    ) -> Resolved:
        component = registry.find(kind, name, role)
        model = component.load_config() or NoOptions
        try:
            return Resolved(component, model.model_validate(options))
        except ValidationError as error:
            owner = f" of {kind} {component.spec.name!r}"
            raise ConfigError(_describe(error, model, key, source, owner)) from None

    task, engine = run.task, run.engine
    resolved = ResolvedConfig(
        run=run,
        model=resolve("model", run.model.adapter, run.model.options, ("model",)),
        algorithm=resolve("algorithm", run.algorithm.name, run.algorithm.options, ("algorithm",)),
        environment=resolve("environment", task.environment.name, task.environment.options, ("task", "environment")),
        dataset=resolve("dataset", task.dataset.name, task.dataset.options, ("task", "dataset"))
        if task.dataset
        else None,
        rewards=tuple(
            resolve("reward", reward.name, reward.options, ("task", "rewards", str(index)))
            for index, reward in enumerate(task.rewards)
        ),
        train_engine=resolve("engine", engine.train.name, engine.train.options, ("engine", "train"), "train"),
        rollout_engine=resolve("engine", engine.rollout.name, engine.rollout.options, ("engine", "rollout"), "rollout"),
    )
    _check_needs(resolved, source)
    return _with_defaults(resolved)


def _check_needs(resolved: ResolvedConfig, source: _Source) -> None:
    parts = [resolved.model, resolved.train_engine, resolved.rollout_engine, resolved.environment]
    provided = frozenset().union(*(part.component.spec.provides for part in parts))
    if resolved.dataset is not None:
        provided |= {"dataset"}
    if resolved.run.task.choices is not None:
        provided |= {"choices"}
    for part in [resolved.algorithm, *parts]:
        missing = sorted(part.component.spec.needs - provided)
        if missing:
            chosen = ", ".join(f"{other.component.kind} {other.component.spec.name!r}" for other in parts)
            raise ConfigError(
                f"{source.path}: {part.component.kind} {part.component.spec.name!r} needs {', '.join(missing)}, which "
                f"none of the chosen parts provides ({chosen}{'' if resolved.dataset else ', no task.dataset'})"
            )


def _with_defaults(resolved: ResolvedConfig) -> ResolvedConfig:
    """The same, with the run config's component sections holding every default."""

    def filled(part: Resolved) -> dict[str, Any]:
        return part.config.model_dump(mode="json")

    run = resolved.run
    data = run.model_dump(mode="json")
    data["model"] = {"adapter": run.model.adapter, **filled(resolved.model)}
    data["algorithm"] = {"name": run.algorithm.name, **filled(resolved.algorithm)}
    data["task"]["environment"] = {"name": run.task.environment.name, **filled(resolved.environment)}
    if run.task.dataset is not None and resolved.dataset is not None:
        data["task"]["dataset"] = {"name": run.task.dataset.name, **filled(resolved.dataset)}
    data["task"]["rewards"] = [
        {"name": section.name, "weight": section.weight, "label": section.label, **filled(part)}
        for section, part in zip(run.task.rewards, resolved.rewards, strict=True)
    ]
    data["engine"]["train"] = {"name": run.engine.train.name, **filled(resolved.train_engine)}
    data["engine"]["rollout"] = {"name": run.engine.rollout.name, **filled(resolved.rollout_engine)}
    return ResolvedConfig(
        run=RunConfig.model_validate(data),
        model=resolved.model,
        algorithm=resolved.algorithm,
        environment=resolved.environment,
        dataset=resolved.dataset,
        rewards=resolved.rewards,
        train_engine=resolved.train_engine,
        rollout_engine=resolved.rollout_engine,
    )


def _describe(
    error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...], source: _Source, owner: str = ""
) -> str:
    """One line a problem: where, key, what is wrong and what would be right."""
    lines = []
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"])
        key = (*prefix, *location)
        name = ".".join(key) or "(top level)"
        where = source.of(key)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            message = f"unknown key{owner}{did_you_mean(location[-1], known)} (known: {', '.join(known) or 'none'})"
        elif problem["type"] == "missing":
            message = f"required key{owner} is missing"
        else:
            message = f"{problem['msg'].removeprefix('Value error, ')}"
            if not isinstance(problem["input"], (dict, BaseModel)):
                message += f" (got {problem['input']!r})"
        lines.append(f"{where}: {name}: {message}")
    return "\n".join(lines)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return sorted(model.model_fields)
