"""The plan of a run: what each of its phases holds, part by part, and roughly how long a step takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rllava_core.algorithms.protocol import Batch
from rllava_core.errors import ConfigError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.planning.counting import (
    copy_bytes,
    merged_bytes,
    module_bytes,
    optimizer_bytes,
    shared_bytes,
    step_bytes,
    stepped_in,
)
from rllava_core.planning.heap import Recording, extent_of_update
from rllava_core.planning.measuring import Laboratory, Pass
from rllava_core.planning.request import Levers, Request
from rllava_core.planning.shape import planned_adapter, planned_model
from rllava_core.planning.timing import Machine, Seconds
from rllava_core.planning.tracing import GRADIENTS, LOWERED, Footprint
from rllava_core.planning.workload import Episodes, PlannedMedia
from rllava_core.policy.policy import Policy
from rllava_core.policy.trained import copy_sharing_frozen, is_adapted
from rllava_core.training.sight import EPISODES as PROBED
from rllava_core.training.storage import SHARD_BYTES

MIB = 2**20

PROCESS = 64 * MIB
"""Host memory over that of an interpreter that has imported everything: 40 MiB of the libraries' code, read as it is
used, and what Python and the threads of matrix products allocate. One run had 54 MiB after its C library had given back
what was free, and 70 MiB where every block was mapped by itself."""

CUDA_CONTEXT = 600 * MIB
"""What the driver and cuBLAS take of a card before any tensor. Not yet measured by us."""

CUDA_HOST = 2048 * MIB
"""Host memory of a process that uses CUDA, over one that does not. Not yet measured by us."""

LABELS = {
    "cache": "key-value cache",
    "logits": "logits",
    "vision": "vision",
    "activations": "activations",
    LOWERED: "weights, lowered",
}
"""What passes take for a while, by the name that it has where it is traced, and where it is shown."""

MEDIA_LIMIT = 2**30
"""`MediaStore`'s limit."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run: what is held at its worst moment, in bytes by part.

    device: on the GPU; empty if the model is on the CPU, where all is `host`.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    parameters, trained: how many weights the model has, and how many of them are trained.
    prompt_tokens, image_tokens: of a turn; the latter are among the former.
    micro_batches: of one optimizer step.
    processes: that share a step; all figures are of one of them.
    """

    model: str
    parameters: int
    trained: int
    device: str
    levers: Levers
    prompt_tokens: int
    image_tokens: int
    micro_batches: int
    phases: tuple[Phase, ...]
    seconds: Seconds
    processes: int = 1

    @property
    def device_peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.device_total)

    @property
    def host_peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.host_total)

    @property
    def needed(self) -> int:
        """Bytes of the memory that a card must have; without one, of the host's."""
        return self.device_peak.device_total if self.device == "cuda" else self.host_peak.host_total


class Planner:
    """Plans a request, and the same one with other levers without measuring again what they do not change."""

    def __init__(self, request: Request, machine: Machine) -> None:
        self._first = request
        self._machine = machine
        self._subjects: dict[str, _Subject] = {}
        self._plans: dict[tuple[Levers, float], Plan] = {}

    def plan(self, levers: Levers | None = None, enough: float = math.inf) -> Plan:
        """The plan with these levers; the request's own if none are given.

        enough: bytes of the host's memory; what takes more without the holes of its heap is planned without them, for
            they take longest to find.
        """
        key = levers or self._first.levers, enough
        if key not in self._plans:
            self._plans[key] = self._planned(*key)
        return self._plans[key]

    def at_least(self, levers: Levers) -> Phase:
        """What weights, states and gradients alone take. Measures nothing."""
        request = self._first.with_levers(**asdict(levers))
        subject = self._subject(request)
        states = optimizer_bytes(levers, subject.trained_parameters)
        learnt = {"optimizer": states // request.share_of("states"), "gradients": 0}
        if not levers.step_in_backward:
            gradients = sum(item.nbytes for item in subject.trained_parameters)
            learnt["gradients"] = gradients // request.share_of("gradients")
        held = {"weights": subject.weights + subject.other_weights + subject.copies}
        if request.device == "cpu":
            return Phase("at least", {}, {"process": PROCESS, **held, **learnt})
        if levers.optimizer_on_cpu:
            return Phase("at least", {"context": CUDA_CONTEXT, **held}, {"process": CUDA_HOST, **learnt})
        host = {"process": CUDA_HOST, "weights": subject.weights + subject.copies}  # while they are loaded
        return Phase("at least", {"context": CUDA_CONTEXT, **held, **learnt}, host)

    def activations(self, levers: Levers) -> int:
        """Bytes that an update takes beside weights, states and gradients. Measures that alone."""
        request = self._first.with_levers(**asdict(levers))
        found = _Parts(request, self._subject(request)).update
        return found.total - found.peak.get("gradients", 0)

    def _planned(self, levers: Levers, enough: float) -> Plan:
        request = self._first.with_levers(**asdict(levers))
        subject = self._subject(request)
        parts = _Parts(request, subject)
        seconds = self._machine.seconds(parts)
        return Plan(
            model=request.options.path or str(request.options.from_scratch),
            parameters=subject.parameters,
            trained=subject.trained,
            device=request.device,
            levers=levers,
            prompt_tokens=subject.episodes.prompt_length,
            image_tokens=subject.episodes.image_tokens,
            micro_batches=parts.micro_batches,
            phases=tuple(parts.phases(enough)),
            seconds=seconds,
            processes=request.processes,
        )

    def _subject(self, request: Request) -> _Subject:
        key = f"{request.levers.dtype} {request.levers.mixed_precision}"
        if key not in self._subjects:
            self._subjects[key] = _Subject(request)
        return self._subjects[key]


class _Subject:
    """The model on the meta device, in one precision, and what was measured of it."""

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
        self._measured: dict[object, Footprint] = {}
        self._recorded: dict[object, Recording] = {}

    @cached_property
    def trained_parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def update(self, trajectories: Sequence[Trajectory], how: Pass) -> Footprint:
        key = ("update", len(trajectories), how)
        if key not in self._measured:
            self._measured[key] = self.laboratory.update(trajectories, how)
        return self._measured[key]

    def probe(self, trajectories: Sequence[Trajectory]) -> Footprint:
        key = ("probe", len(trajectories))
        if key not in self._measured:
            self._measured[key] = self.laboratory.probe(trajectories)
        return self._measured[key]

    def evaluation(self, trajectories: Sequence[Trajectory]) -> Footprint:
        key = ("evaluation", len(trajectories))
        if key not in self._measured:
            self._measured[key] = self.laboratory.evaluation(trajectories)
        return self._measured[key]

    def sampling(self, groups: int, count: int) -> Footprint:
        key = ("sampling", groups, count)
        if key not in self._measured:
            self._measured[key] = self.laboratory.sampling(groups, count)
        return self._measured[key]

    def record_update(self, trajectories: Sequence[Trajectory], how: Pass) -> Recording:
        key = ("update", len(trajectories), how)
        if key not in self._recorded:
            self._recorded[key] = self.laboratory.record_update(trajectories, how)
        return self._recorded[key]

    def record_evaluation(self, trajectories: Sequence[Trajectory]) -> Recording:
        key = ("evaluation", len(trajectories))
        if key not in self._recorded:
            self._recorded[key] = self.laboratory.record_evaluation(trajectories)
        return self._recorded[key]

    def record_sampling(self, groups: int, count: int) -> Recording:
        key = ("sampling", groups, count)
        if key not in self._recorded:
            self._recorded[key] = self.laboratory.record_sampling(groups, count)
        return self._recorded[key]


class _Parts:
    """What the phases of a run are made of."""

    def __init__(self, request: Request, subject: _Subject) -> None:
        self.request, self.subject = request, subject
        levers, workload = request.levers, request.workload
        groups = -(-workload.prompts // (request.minibatches * request.processes))
        self.batch = subject.episodes.trajectories(groups, workload.group_size)
        split = Batch(tuple(self.batch), {}).split(levers.micro_batch_tokens, shared=levers.prefix_sharing)
        self.split = [part.trajectories for part in split]
        self.micro_batches = len(self.split)
        self.micro_batch = self.split[0]
        if levers.step_in_backward and self.micro_batches > 1:
            raise ConfigError(
                f"engine.train.step_in_backward needs one micro-batch a step, and there are {self.micro_batches}: "
                "raise training.micro_batch_tokens, or sample fewer or shorter episodes"
            )
        trained = subject.trained_parameters
        self.streamed = levers.optimizer_on_cpu or levers.step_in_backward or levers.stochastic_rounding
        taken = levers.optimizer_on_cpu or levers.step_in_backward or (self.streamed and self.micro_batches > 1)
        self.how = Pass(
            sharing=levers.prefix_sharing,
            recompute=levers.checkpoint_activations,
            offload=levers.offload_activations,
            entropy=request.entropy,
            keeps_gradients=not taken and self.micro_batches == 1,
            added=self.micro_batches > 1 and not self.streamed,
        )
        self.update = subject.update(self.micro_batch, self.how)
        # Gradients of several passes are added in the precision that the optimizer steps in.
        wide = self.micro_batches > 1
        self.gradients = sum(
            item.numel() * (stepped_in(levers, item) if wide else item.element_size()) for item in trained
        )
        self.states = optimizer_bytes(levers, trained)
        self.step_needs = step_bytes(levers, trained)
        self.whole_gradients = self.gradients
        self.shared = shared_bytes(request, subject.policy)
        self.gradients //= request.share_of("gradients")
        self.states //= request.share_of("states")

    @property
    def optimizer_device(self) -> int:
        return 0 if self.request.levers.optimizer_on_cpu else self.states

    def phases(self, enough: float) -> list[Phase]:
        request, subject, workload = self.request, self.subject, self.request.workload
        before = {"weights": subject.weights, "heads and critic": subject.other_weights, "copies": subject.copies}
        before |= self.shared.held
        # A torch optimizer's gradients stay until the next step begins; streamed ones are let go by the step itself.
        kept = {**before, "optimizer": self.optimizer_device, "gradients": 0 if self.streamed else self.gradients}
        limit = request.levers.max_sequences
        found = [self._loading(before)]
        if subject.encoding is not None:
            found.append(self._phase("encoding", kept, subject.encoding))
        shown = min(workload.episodes, limit, request.evaluated or limit)
        found.append(self._phase("evaluation", kept, subject.sampling(shown, 1)))
        if request.levers.unseen_images != "ignore" and workload.image is not None and workload.images:
            # Of all that were evaluated, however few are sampled at once.
            looked_at = subject.episodes.trajectories(min(PROBED, request.evaluated or PROBED), 1)
            first = next(iter(Batch(tuple(looked_at), {}).split(request.levers.micro_batch_tokens))).trajectories
            # As `rllava_core.training.sight` computes it, which pulls none of the engine's levers.
            found.append(self._phase("image probe", kept, subject.probe(first)))
        if request.rollouts:
            sampling = subject.sampling(self._groups, workload.group_size)
            found.append(self._phase("rollout", kept, sampling))
            if request.acting_copy:
                kept["sampling meanwhile"] = sum(sampling.peak.get(label, 0) for label in LABELS)
        if request.copies:
            found.append(self._phase("reference", kept, subject.evaluation(self.micro_batch)))
        gradients, on_host = self._gradients()
        update = {**kept, **self.shared.gathered, "gradients": gradients}
        updating = self._phase("update", update, self.update, on_host)
        found.append(updating)
        whole = 0 if request.levers.optimizer_on_cpu else self.gradients
        step = {**kept, "gradients": 0 if request.levers.step_in_backward else whole}
        host = dict(self._host())
        if request.levers.optimizer_on_cpu:
            host |= {"gradients on the CPU": self.gradients, "optimizer's step": self.step_needs}
        else:
            step["optimizer's step"] = self.step_needs
        found.append(self._placed("optimizer", step, host))
        kept.pop("sampling meanwhile", None)
        found.append(self._checkpoint(kept))
        if request.device == "cpu" and max(phase.host_total for phase in found) <= enough:
            found[found.index(updating)] = self._with_holes(updating)
        return found

    def _gradients(self) -> tuple[int, int]:
        """Finished gradients at the update's worst moment, on the device and on the host.

        Those of earlier micro-batches are all there. Those of the only one grow as activations are freed, so that there
        are never all of both.
        """
        levers = self.request.levers
        if levers.optimizer_on_cpu:
            return 0, self.gradients
        if levers.step_in_backward:
            return 0, 0
        if self.micro_batches > 1 or self.gradients < self.whole_gradients:
            return self.gradients, 0
        return self.update.peak.get(GRADIENTS, 0), 0

    def _with_holes(self, update: Phase) -> Phase:
        """The update on the CPU, and what its heap holds beside what is in use."""
        played = {*LABELS.values(), "optimizer", "optimizer on the CPU", "gradients on the CPU"}
        if self.how.keeps_gradients or self.how.added:
            played.add("gradients")
        holes = self._extent() - sum(size for part, size in update.host.items() if part in played)
        return replace(update, host={**update.host, "holes of the heap": holes}) if holes > 0 else update

    def _extent(self) -> int:
        """Bytes of the heap at the worst moment of an update."""
        request, subject, levers = self.request, self.subject, self.request.levers
        before = []
        if request.rollouts:
            before.append(subject.record_sampling(self._groups, request.workload.group_size))
        # Micro-batches are alike, but for the last: more of them leave no other holes.
        parts = [self.split[0], *self.split[1:][-1:]]
        if request.copies:
            before += [subject.record_evaluation(part) for part in parts]
        first = replace(self.how, keeps_gradients=True, added=False) if self.how.added else self.how
        passes = [subject.record_update(part, self.how if number else first) for number, part in enumerate(parts)]
        trained, share = subject.trained_parameters, request.share_of("states")
        halves = [optimizer_bytes(levers, [item]) // (2 * share) for item in trained]
        always = [item.numel() * stepped_in(levers, item) for item in trained] if levers.optimizer_on_cpu else []
        return extent_of_update(before, passes, [size for half in halves for size in (half, half)], always)

    @property
    def _groups(self) -> int:
        """How many prompts are answered at once."""
        return max(
            1, min(self.request.own_prompts, self.request.levers.max_sequences // self.request.workload.group_size)
        )

    def _phase(self, name: str, kept: Mapping[str, int], footprint: Footprint, gradients: int = 0) -> Phase:
        device = {**kept, **{title: footprint.peak.get(label, 0) for label, title in LABELS.items()}}
        host = {**self._host(), "gradients on the CPU": gradients, "offloaded activations": footprint.host}
        return self._placed(name, device, host)

    def _host(self) -> dict[str, int]:
        workload, media = self.request.workload, self.subject.media
        # Every process holds the trajectories of all.
        images = workload.prompts * workload.images * workload.turns * (1 + self.request.acting_copy)
        return {
            "process": PROCESS if self.request.device == "cpu" else CUDA_HOST,
            "images": min(MEDIA_LIMIT, images * media.bytes),
            "encoded images": min(self.request.options.encoded_bytes, images * media.encoded_bytes),
            "optimizer on the CPU": self.states if self.request.levers.optimizer_on_cpu else 0,
        }

    def _loading(self, before: Mapping[str, int]) -> Phase:
        """As a run begins: copies hold what is trained alone. (One that is resumed loads them as it did the first.)"""
        whole = self.subject.weights + self.subject.copies
        if self.request.options.quantization != "none":
            whole += sum(parameter.numel() for parameter in self.subject.policy.model.parameters())
        process = self._host()["process"]
        if self.request.device == "cpu":
            return Phase("loading", {}, {"weights": whole, "process": process})
        return Phase("loading", {"context": CUDA_CONTEXT, **before}, {"weights": whole, "process": process})

    def _checkpoint(self, kept: Mapping[str, int]) -> Phase:
        """What is saved for resuming is copied file by file; low-rank adapters are merged into copies of their layers,
        on the host."""
        states = min(self.states, SHARD_BYTES)
        merged = merged_bytes(self.subject.policy.model) if self.subject.adapted else 0
        on_host = {"merged weights": merged} if merged > states else {"optimizer, to be saved": states}
        if self.request.device == "cuda":
            on_host["weights, to be saved"] = self.subject.weights
        return self._placed("checkpoint", kept, {**self._host(), **on_host})

    def _placed(self, name: str, device: Mapping[str, int], host: Mapping[str, int]) -> Phase:
        device = {part: size for part, size in device.items() if size}
        host = {part: size for part, size in host.items() if size}
        if self.request.device == "cpu":
            return Phase(name, {}, {**device, **host})
        return Phase(name, {"context": CUDA_CONTEXT, **device}, host)
