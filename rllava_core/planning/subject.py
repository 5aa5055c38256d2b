"""What is planned: the model on the meta device, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from rllava_core.errors import ConfigError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.planning.counting import copy_bytes, module_bytes
from rllava_core.planning.heap import Recording
from rllava_core.planning.measuring import Laboratory, Pass
from rllava_core.planning.request import Request
from rllava_core.planning.shape import planned_adapter, planned_model
from rllava_core.planning.tracing import Footprint
from rllava_core.planning.workload import Episodes, PlannedMedia
from rllava_core.policy.policy import Policy
from rllava_core.policy.trained import copy_sharing_frozen, is_adapted

T = TypeVar("T")


class Subject:
    """The model in one precision. Nothing is measured twice."""

    def __init__(self, request: Request) -> None:
        adapter = planned_adapter(request.model)
        model = planned_model(adapter, request.options)
        own_trunk = any(head.own_trunk for head in request.heads.values())
        trunk = copy_sharing_frozen(model) if own_trunk else None
        self.policy = Policy(adapter, model, request.heads, request.training.temperature, trunk)
        self.policy.heads.to("meta")
        self.adapter = adapter
        self.adapted = is_adapted(model)
        self.media = PlannedMedia(adapter, request.workload.image)
        self.episodes = Episodes(request.workload, adapter, self.media)
        longest = request.workload.turns * (self.episodes.prompt_length + request.workload.answer_tokens)
        if longest > adapter.context_length:
            raise ConfigError(
                f"an episode has {longest} tokens, and the model's context is {adapter.context_length}; see the sizes "
                "of the image, the prompt and the answer"
            )
        autocast = torch.bfloat16 if request.levers.mixed_precision == "bf16" else None
        self.laboratory = Laboratory(self.policy, self.media, self.episodes, autocast)
        self.encoding = self.laboratory.encoding() if request.options.encoded_bytes else None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trained = sum(parameter.numel() for parameter in self.policy.parameters() if parameter.requires_grad)
        self.weights = module_bytes(self.policy.model)
        self.other_weights = module_bytes(self.policy) - self.weights
        self.copies = (len(request.copies) + request.acting_copy) * copy_bytes(self.policy)
        self._measured: dict[tuple[object, ...], Any] = {}

    @cached_property
    def trained_parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def update(self, trajectories: Sequence[Trajectory], how: Pass) -> Footprint:
        return self._once("update", self.laboratory.update, trajectories, how)

    def probe(self, trajectories: Sequence[Trajectory]) -> Footprint:
        return self._once("probe", self.laboratory.probe, trajectories)

    def evaluation(self, trajectories: Sequence[Trajectory]) -> Footprint:
        return self._once("evaluation", self.laboratory.evaluation, trajectories)

    def sampling(self, groups: int, count: int) -> Footprint:
        return self._once("sampling", self.laboratory.sampling, groups, count)

    def recorded_update(self, trajectories: Sequence[Trajectory], how: Pass) -> Recording:
        return self._once("recorded update", self.laboratory.record_update, trajectories, how)

    def recorded_evaluation(self, trajectories: Sequence[Trajectory]) -> Recording:
        return self._once("recorded evaluation", self.laboratory.record_evaluation, trajectories)

    def recorded_sampling(self, groups: int, count: int) -> Recording:
        return self._once("recorded sampling", self.laboratory.record_sampling, groups, count)

    def _once(self, kind: str, measure: Callable[..., T], *arguments: Any) -> T:
        """What `measure` finds. All trajectories are alike, so that their number says which they are."""
        key = kind, *(item if isinstance(item, (int, Pass)) else len(item) for item in arguments)
        if key not in self._measured:
            self._measured[key] = measure(*arguments)
        found: T = self._measured[key]
        return found
