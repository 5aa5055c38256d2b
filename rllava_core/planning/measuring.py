"""What the policy's own code needs for a micro-batch, and for sampling, measured on the meta device.

Layers are alike, so a model of a few is traced, and what one more of each kind adds is added for all that were left
out. A piece of code is measured in stages, since which of them needs most depends on the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rllava_core.engines.offloading import SMALLEST
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.planning.heap import Recording
from rllava_core.planning.tracing import GRADIENTS, LOWERED, META, Footprint, Tracer, backward, on_meta
from rllava_core.planning.workload import Episodes, PlannedMedia
from rllava_core.policy.adapter import Features, Part
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.encoding import encoding_adapter
from rllava_core.policy.memory import Memory
from rllava_core.policy.policy import Policy

FEW = 2
"""Layers of each kind that are traced."""


SOME = 4
"""Prompts that are traced where all that is needed grows with their number."""


@dataclass(frozen=True)
class Pass:
    """How a micro-batch is computed, and what becomes of its gradients.

    sharing, recompute, offload: as the config's `engine.train` says.
    entropy: whether the loss has a gradient through entropies.
    keeps_gradients: finished gradients stay, as "gradients"; if not, they are left out.
    added: there are gradients already, to which these are added.
    """

    sharing: bool
    recompute: bool
    offload: bool
    entropy: bool
    keeps_gradients: bool
    added: bool


class Laboratory:
    """A policy on the meta device, and episodes for it to read."""

    def __init__(self, policy: Policy, media: PlannedMedia, episodes: Episodes, autocast: torch.dtype | None) -> None:
        self.policy = policy
        self._media = media
        self._episodes = episodes
        self._autocast = autocast
        self._layers = _layer_lists(policy)
        self._last: Tracer | None = None

    def encoding(self) -> Footprint | None:
        """What it takes to see one image, if that is done once; batches then hold what became of it."""
        adapter = encoding_adapter(self.policy)
        if adapter is None or not self._media.one:
            return None
        found: list[Features] = []

        def traced() -> list[Footprint]:
            tracer = self._tracer()
            tracer.label = "vision"
            with torch.no_grad(), tracer:
                found.append(adapter.encode_images(self.policy.model, self._media.collated([self._media.one])))
                return [tracer.stage()]

        footprint = self._largest(traced)
        # Of all layers, for the language model may be given what comes from one far inside.
        traced()
        self._media.show_encoded(found[-1])
        return footprint

    def update(self, trajectories: Sequence[Trajectory], how: Pass) -> Footprint:
        """Forward and backward of one micro-batch."""
        batch = self._packed(trajectories, packed=how.recompute or not how.sharing, shared=how.sharing)
        return self._largest(lambda: self._traced_update(batch, how))

    def probe(self, trajectories: Sequence[Trajectory]) -> Footprint:
        """Forward of one micro-batch, and backward to the weights of the parts that see alone."""
        few = trajectories[:SOME]
        batch = self._packed(few, packed=self.policy.recomputes, shared=True)
        found = self._largest(lambda: self._traced_probe(batch))
        # Logits come in chunks of the same size however many there are.
        return _times(found, len(trajectories) / len(few), but=("logits", LOWERED))

    def evaluation(self, trajectories: Sequence[Trajectory]) -> Footprint:
        """Forward of one micro-batch without gradients, as of a reference policy."""
        batch = self._packed(trajectories, packed=False, shared=True)
        return self._largest(lambda: self._traced_evaluation(batch))

    def sampling(self, groups: int, count: int) -> Footprint:
        """Prefill of so many prompts, and decoding of `count` answers to each."""
        few = min(groups, SOME)
        return _times(self._largest(lambda: self._traced_sampling(few, count)), groups / few, but=(LOWERED,))

    def record_update(self, trajectories: Sequence[Trajectory], how: Pass) -> Recording:
        """What `update` makes and frees, in a model of all layers."""
        batch = self._packed(trajectories, packed=how.recompute or not how.sharing, shared=how.sharing)
        return self._recorded(lambda: self._traced_update(batch, how))

    def record_evaluation(self, trajectories: Sequence[Trajectory]) -> Recording:
        """What `evaluation` makes and frees, in a model of all layers."""
        batch = self._packed(trajectories, packed=False, shared=True)
        return self._recorded(lambda: self._traced_evaluation(batch))

    def record_sampling(self, groups: int, count: int) -> Recording:
        """What `sampling` makes and frees, in a model of all layers."""
        return self._recorded(lambda: self._traced_sampling(groups, count))

    def _recorded(self, traced: Callable[[], list[Footprint]]) -> Recording:
        traced()
        assert self._last is not None
        return self._last.recording

    def _largest(self, traced: Callable[[], list[Footprint]]) -> Footprint:
        stages = self._all_layers(traced)
        largest = max(stages, key=lambda stage: stage.total)
        flops = sum(stage.flops for stage in stages)
        return replace(largest, flops=flops, host=max(stage.host for stage in stages))

    def _all_layers(self, traced: Callable[[], list[Footprint]]) -> list[Footprint]:
        """Stages of the whole model, from those of models of a few layers."""
        depths = {part: max(len(layers) for _, _, layers in lists) for part, lists in self._layers.items()}
        shallow = {part: min(depth, FEW) for part, depth in depths.items()}
        if hasattr(self.policy.model.config, "vision_feature_layer"):
            # A layer inside the tower is read, and must be there.
            shallow = {part: FEW if part == "language" and depth > FEW else depth for part, depth in depths.items()}
        with self._of_depth(shallow):
            stages = traced()
        result = stages
        for part, depth in depths.items():
            if depth > shallow[part]:
                with self._of_depth({**shallow, part: shallow[part] + 1}):
                    deeper = traced()
                more = depth - shallow[part]
                result = [
                    _added(total, few, one_more, more)
                    for total, few, one_more in zip(result, stages, deeper, strict=True)
                ]
        return result

    @contextmanager
    def _of_depth(self, depths: Mapping[Part, int]) -> Iterator[None]:
        for part, lists in self._layers.items():
            for owner, name, layers in lists:
                setattr(owner, name, nn.ModuleList(list(layers)[: depths[part]]))
        try:
            yield
        finally:
            for lists in self._layers.values():
                for owner, name, layers in lists:
                    setattr(owner, name, layers)

    def _tracer(self, batch: PolicyBatch | None = None) -> Tracer:
        """A tracer that counts what is large in a batch from the beginning."""
        head = self.policy.adapter.lm_head(self.policy.model)
        assert isinstance(head.weight, Tensor)
        self._last = tracer = Tracer(head.weight.shape[0], self._autocast)
        if batch is not None:
            for values in (*batch.prefix_media.values(), *batch.tree_media.values(), batch.tree_sees):
                if values is not None:
                    tracer.hold(values)
        return tracer

    def _traced_update(self, batch: PolicyBatch, how: Pass) -> list[Footprint]:
        """Of the forward pass, and of the backward pass up to the first gradient of a layer of the language model, from
        there to the first of the parts that see, and to its end: each is worst where it begins or where it ends."""
        policy, tracer = self.policy, self._tracer(batch)
        weights = {item.untyped_storage()._cdata for item in (*policy.parameters(), *policy.buffers())}

        def stays(saved: Tensor) -> bool:
            return saved.nbytes < SMALLEST or saved.untyped_storage()._cdata in weights

        stages: list[Footprint] = []

        def until(count: int) -> None:
            while len(stages) < count:
                stages.append(tracer.stage())

        def made(begins: int, parameter: Tensor) -> None:
            until(begins)
            assert parameter.grad is not None
            if how.keeps_gradients:
                tracer.rename(parameter.grad, GRADIENTS)
                return
            # Counted by whoever knows how long they stay.
            tracer.forget(parameter.grad)
            if not how.added:
                parameter.grad = None

        trained = {name: item for name, item in policy.named_parameters() if item.requires_grad}
        if how.added:
            for parameter in trained.values():
                parameter.grad = torch.empty_like(parameter)
        begins = self._begins()
        saving = tracer.offloading(stays) if how.offload else nullcontext()
        hooks = [
            item.register_post_accumulate_grad_hook(partial(made, begins.get(id(item), 0))) for item in trained.values()
        ]
        hooks += _label_vision(policy, tracer)
        try:
            policy.recompute(how.recompute)
            with tracer, saving:
                output = policy(batch)
                loss = output.logprobs.sum() + sum(values.sum() for values in output.heads.values())
                if how.entropy:
                    loss = loss + output.entropies.sum()
                del output
                tracer.leave_autocast()  # as the engine does, before the backward pass
                until(1)
                backward(loss)
                until(4)
                return stages
        finally:
            for parameter in trained.values():
                parameter.grad = None
            for hook in hooks:
                hook.remove()

    def _begins(self) -> dict[int, int]:
        """How many stages of an update are over when a weight gets its gradient, by its identity; 0: any number."""
        layers = {
            id(item): 2
            for part, lists in self._layers.items()
            if part == "language"
            for _, _, members in lists
            for item in members.parameters()
        }
        part_of = self.policy.adapter.part_of
        seeing = {
            id(item): 3
            for model in _models(self.policy)
            for name, item in model.named_parameters()
            if part_of(name.replace(".base_layer.", ".")) != "language"
        }
        return {**layers, **seeing}

    def _traced_probe(self, batch: PolicyBatch) -> list[Footprint]:
        policy, tracer = self.policy, self._tracer(batch)
        seeing = [
            parameter
            for name, parameter in policy.model.named_parameters()
            if parameter.requires_grad and policy.adapter.part_of(name.replace(".base_layer.", ".")) != "language"
        ]
        hooks = _label_vision(policy, tracer)
        try:
            with torch.set_grad_enabled(bool(seeing)), tracer:
                loss = policy(batch).logprobs.mean()
                forward = tracer.stage()
                if seeing:
                    backward(loss, seeing)
                return [forward, tracer.stage()]
        finally:
            for hook in hooks:
                hook.remove()

    def _traced_evaluation(self, batch: PolicyBatch) -> list[Footprint]:
        tracer = self._tracer(batch)
        hooks = _label_vision(self.policy, tracer)
        try:
            with torch.no_grad(), tracer:
                tracer.leave_autocast()  # which keeps copies of what is trained
                self.policy(batch)
                return [tracer.stage()]
        finally:
            for hook in hooks:
                hook.remove()

    def _traced_sampling(self, groups: int, count: int) -> list[Footprint]:
        policy, tracer, workload = self.policy, self._tracer(), self._episodes.workload
        hooks = _label_vision(policy, tracer)
        try:
            with torch.no_grad(), tracer:
                builder = BatchBuilder(policy.adapter, self._media)
                prompts = [builder.add_context((self._episodes.context(group),), "") for group in range(groups)]
                batch = builder.build()
                memory = policy.prefill(batch)
                prefill = tracer.stage()
                if workload.choices is not None:
                    return [prefill]
                rows = torch.tensor([prompt for prompt in prompts for _ in range(count)])
                policy.next_token_logprobs(memory.last)
                going = memory.continued(rows)
                written = workload.answer_tokens - 2
                before = (workload.turns - 1) * (self._episodes.prompt_length + workload.answer_tokens)
                _grow(going, before + written)
                width = memory.mask.shape[1] + before + written + 1
                hidden = policy.adapter.hidden_states(
                    policy.model,
                    tokens=torch.zeros(len(rows), 1, dtype=torch.long),
                    attention_mask=torch.ones(len(rows), width, dtype=torch.long),
                    positions=going.next_position.expand(batch.prefix_positions.shape[0], -1)[:, :, None],
                    media={},
                    cache=going.cache,
                )
                logprobs = policy.next_token_logprobs(hidden[:, -1])
                logprobs.exp()  # what tokens are drawn from
                return [prefill, tracer.stage()]
        finally:
            for hook in hooks:
                hook.remove()

    def _packed(self, trajectories: Sequence[Trajectory], *, packed: bool, shared: bool) -> PolicyBatch:
        """A batch, whose images have no data."""
        builder = BatchBuilder(self.policy.adapter, self._media, packed=packed, shared=shared)
        for trajectory in trajectories:
            builder.add_trajectory(trajectory)
        with self._tracer():
            batch = builder.build()
        if batch.tree_sees is None:
            return batch
        # Nobody looks into it, and it may be large.
        return replace(batch, tree_sees=on_meta(batch.tree_sees))


def _grow(memory: Memory, tokens: int) -> None:
    """Let the cache hold so many tokens more, written one by one as while decoding."""
    layers: list[Any] = memory.cache.layers
    for layer in layers:
        if not layer.is_initialized or layer.keys is None:
            continue
        left = tokens
        while left > 0:
            # Up to where the room ends nothing is allocated, so that it may as well be written at once.
            room = getattr(layer, "_room", None)
            step = 1 if room is None else max(1, min(left, room.keys.shape[-2] - layer.get_seq_length()))
            rows, heads, _, size = layer.keys.shape
            new = torch.empty(rows, heads, step, size, dtype=layer.keys.dtype, device=META)
            layer.update(new, new)
            left -= step


def _label_vision(policy: Policy, tracer: Tracer) -> list[Any]:
    """Book what the vision part and the connector allocate in the forward pass as theirs."""

    def enter(*_: Any) -> None:
        tracer.label = "vision"

    def leave(*_: Any) -> None:
        tracer.label = "activations"

    hooks: list[Any] = []
    for model in _models(policy):
        for name, module in model.named_modules():
            owner = name.rpartition(".")[0]
            part = policy.adapter.part_of
            if name and part(f"{name}.weight") != "language" and (not owner or part(f"{owner}.weight") == "language"):
                hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    return hooks


def _layer_lists(policy: Policy) -> dict[Part, list[tuple[nn.Module, str, nn.ModuleList]]]:
    """The lists of layers of the vision part and of the language model: who owns each, by which name."""
    found: dict[Part, list[tuple[nn.Module, str, nn.ModuleList]]] = {}
    for model in _models(policy):
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer):
                owner, _, attribute = name.rpartition(".")
                part = policy.adapter.part_of(f"{name}.0.weight")
                found.setdefault(part, []).append((model.get_submodule(owner), attribute, module))
    return found


def _models(policy: Policy) -> list[nn.Module]:
    return [policy.model] if policy.trunk is None else [policy.model, policy.trunk]


def _times(footprint: Footprint, factor: float, but: Sequence[str]) -> Footprint:
    def scaled(sizes: Mapping[str, int]) -> dict[str, int]:
        return {label: size if label in but else round(factor * size) for label, size in sizes.items()}

    return replace(
        footprint, peak=scaled(footprint.peak), left=scaled(footprint.left), flops=round(factor * footprint.flops)
    )


def _added(total: Footprint, few: Footprint, one_more: Footprint, count: int) -> Footprint:
    """What a further layer adds, so many times."""

    def extended(kind: str) -> dict[str, int]:
        of, low, high = getattr(total, kind), getattr(few, kind), getattr(one_more, kind)
        labels = dict.fromkeys([*of, *high])
        return {label: of.get(label, 0) + count * (high.get(label, 0) - low.get(label, 0)) for label in labels}

    return Footprint(
        extended("peak"),
        extended("left"),
        total.host + count * (one_more.host - few.host),
        total.flops + count * (one_more.flops - few.flops),
    )
