"""From plain data to components: validate every section, find every component, match needs with what is provided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from rllava_core.config.problems import Source, describe, did_you_mean
from rllava_core.config.reading import apply_overrides, read_yaml
from rllava_core.config.sections import ComponentSection, ModelSection, Options, RewardSection, RunConfig
from rllava_core.errors import ConfigError, PluginError, RllavaError
from rllava_core.errors import describe as describe_error
from rllava_core.plugins import Component, Registry
from rllava_core.specs import CAPABILITIES, Kind


@dataclass(frozen=True)
class Resolved:
    """A component and its validated config."""

    component: Component
    config: BaseModel

    def create(self, *arguments: Any) -> Any:
        """Import the target and call it with the config. Raises PluginError for what its code did wrong."""
        target = self.component.load_target()
        try:
            return target(self.config, *arguments)
        except RllavaError:
            raise
        except Exception as error:
            made = f"{self.component.kind} {self.component.qualified_name!r}"
            what = f"making {target.__qualname__!r} from its config {describe_error(error)}"
            raise PluginError(f"{made}: {what}") from error


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


def load(path: Path, overrides: Sequence[str], registry: Registry, *, learning: bool = True) -> ResolvedConfig:
    """Read a YAML file, apply overrides, validate everything, and find every component.

    learning: off where nothing will be trained, so that what an algorithm needs to learn need not be there.

    Raises ConfigError that names the file or override, the key and what would be right; PluginError for components
    that are missing, broken or ambiguous.
    """
    data = read_yaml(path)
    overridden = apply_overrides(data, overrides)
    source = Source(str(path), overridden)
    try:
        run = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, RunConfig, (), source)) from None
    return _resolve(run, registry, source, learning)


_SECTIONS: Mapping[str, type[BaseModel]] = {"model": ModelSection, "reward": RewardSection}
"""Sections with keys of their own beside the component's; of all others, ComponentSection's `name` is the only one."""


def _resolve(run: RunConfig, registry: Registry, source: Source, learning: bool) -> ResolvedConfig:
    """Find and validate every component, and report all that is wrong at once."""
    problems: list[RllavaError] = []

    def resolve(
        kind: Kind, name: str, options: dict[str, Any], key: tuple[str, ...], role: str | None = None
    ) -> Resolved | None:
        section = _SECTIONS.get(kind, ComponentSection)
        try:
            component = registry.find(kind, name, role)
            model = component.load_config() or NoOptions
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                raise PluginError(f"{component.qualified_name!r}: its config {model!r} is no pydantic model")
            return Resolved(component, model.model_validate(options))
        except PluginError as error:
            chosen = (*key, "adapter" if kind == "model" else "name")
            named = PluginError(f"{source.of(chosen)}: {'.'.join(chosen)}: {error}")
            named.__cause__ = error
            problems.append(named)
        except ValidationError as error:
            owner = f" of {kind} {name!r}"
            problems.append(ConfigError(describe(error, model, key, source, owner, section)))
        except Exception as error:  # noqa: BLE001 - a plugin's validator: reported with the others
            owner = f"{kind} {component.qualified_name!r}"
            problem = f"{source.of(key)}: {'.'.join(key)}: {owner}: its config {describe_error(error)}"
            named = PluginError(problem)
            named.__cause__ = error
            problems.append(named)
        return None

    task, engine = run.task, run.engine
    parts = {
        "model": resolve("model", run.model.adapter, run.model.options, ("model",)),
        "algorithm": resolve("algorithm", run.algorithm.name, run.algorithm.options, ("algorithm",)),
        "environment": resolve("environment", task.environment.name, task.environment.options, ("task", "environment")),
        "dataset": resolve("dataset", task.dataset.name, task.dataset.options, ("task", "dataset"))
        if task.dataset is not None
        else None,
        "train_engine": resolve("engine", engine.train.name, engine.train.options, ("engine", "train"), "train"),
        "rollout_engine": resolve(
            "engine", engine.rollout.name, engine.rollout.options, ("engine", "rollout"), "rollout"
        ),
    }
    rewards = [
        resolve("reward", reward.name, reward.options, ("task", "rewards", str(index)))
        for index, reward in enumerate(task.rewards)
    ]
    if problems:
        first = problems[0]
        if len(problems) == 1:
            raise first
        raise type(first)("\n".join(str(problem) for problem in problems)) from first.__cause__
    resolved = ResolvedConfig(run=run, rewards=cast(tuple[Resolved, ...], tuple(rewards)), **cast(Any, parts))
    _check_needs(resolved, source, learning)
    return _with_defaults(resolved)


_TO_LEARN = frozenset({"train", "logprobs", "heads"})
"""What an algorithm needs to learn, and not to act."""


def _check_needs(resolved: ResolvedConfig, source: Source, learning: bool) -> None:
    parts = [resolved.model, resolved.train_engine, resolved.rollout_engine, resolved.environment]
    parts += [resolved.dataset] if resolved.dataset is not None else []
    provided = frozenset().union(*(part.component.spec.provides for part in parts))
    if resolved.dataset is not None:
        provided |= {"dataset"}
    if resolved.run.task.choices is not None:
        provided |= {"choices"}
    sampler = resolved.rollout_engine.component.spec
    if learning and "own_model" in sampler.provides:
        raise ConfigError(
            f"{source.path}: engine {sampler.name!r} answers by a model of its own, so nothing that is trained here "
            "would ever act: it is for `rllava eval`; choose another engine.rollout to train"
        )
    for part in [resolved.algorithm, *parts]:
        spared = _TO_LEARN if part is resolved.algorithm and not learning else frozenset()
        missing = sorted(part.component.spec.needs - provided - spared)
        if missing:
            chosen = ", ".join(f"{other.component.kind} {other.component.spec.name!r}" for other in parts)
            hints = [did_you_mean(name, CAPABILITIES) for name in missing if name not in CAPABILITIES]
            raise ConfigError(
                f"{source.path}: {part.component.kind} {part.component.spec.name!r} needs {', '.join(missing)}, which "
                f"none of the chosen parts provides ({chosen}{'' if resolved.dataset else ', no task.dataset'})"
                f"{''.join(hints)}"
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
    return replace(resolved, run=RunConfig.model_validate(data))
