"""The phases of a run: what each of them holds, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rllava_core.algorithms.protocol import Batch
from rllava_core.errors import ConfigError
from rllava_core.planning.counting import merged_bytes, optimizer_bytes, shared_bytes, step_bytes, stepped_in
from rllava_core.planning.heap import MAPPED, Extent, extent_of_update
from rllava_core.planning.measuring import Pass
from rllava_core.planning.request import Request
from rllava_core.planning.subject import Subject
from rllava_core.planning.tracing import GRADIENTS, LOWERED, Footprint
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


class Parts:
    """What the phases of a run are made of."""

    def __init__(self, request: Request, subject: Subject) -> None:
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
        on_card = request.device == "cuda"
        # As soon as they are finished. On the CPU those that go there stay where they are.
        self._sent = levers.optimizer_on_cpu and on_card
        taken = self._sent or levers.step_in_backward or (self.streamed and self.micro_batches > 1)
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
        self._gradient_sizes = [
            item.numel() * (stepped_in(levers, item) if wide else item.element_size()) for item in trained
        ]
        self.gradients = sum(self._gradient_sizes)
        self.states = optimizer_bytes(levers, trained)
        self.step_needs = step_bytes(levers, trained, on_card=on_card)
        self.whole_gradients = self.gradients
        self.shared = shared_bytes(request, subject.policy)
        self.gradients //= request.share_of("gradients")
        self.states //= request.share_of("states")

    @property
    def optimizer_device(self) -> int:
        return 0 if self.request.levers.optimizer_on_cpu else self.states

    def phases(self, *, holes: bool) -> list[Phase]:
        """All of them, in the order of a run. holes: those of the heap are looked for, which takes seconds."""
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
            sampling = subject.sampling(self.groups, workload.group_size)
            found.append(self._phase("rollout", kept, sampling))
            if request.acting_copy:
                kept["sampling meanwhile"] = sum(sampling.peak.get(label, 0) for label in LABELS)
        if request.copies:
            found.append(self._phase("reference", kept, subject.evaluation(self.micro_batch)))
        gradients, on_host = self._gradients()
        update = {**kept, **self.shared.gathered, "gradients": gradients}
        found.append(self._phase("update", update, self.update, on_host))
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
        # Where processes divide a step, what they send each other is not played.
        if holes and request.device == "cpu" and not request.divided:
            extent = self._extent()
            sizes = {"update": extent.worst, "optimizer": extent.left}
            found = [self._with_holes(phase, sizes[phase.name]) if phase.name in sizes else phase for phase in found]
        return found

    def _gradients(self) -> tuple[int, int]:
        """Finished gradients at the update's worst moment, on the device and on the host.

        Those of earlier micro-batches are all there. Those of the only one grow as activations are freed, so that there
        are never all of both.
        """
        levers = self.request.levers
        if levers.step_in_backward:
            return 0, 0
        whole = self._sent or self.micro_batches > 1 or self.gradients < self.whole_gradients
        size = self.gradients if whole else self.update.peak.get(GRADIENTS, 0)
        return (0, size) if levers.optimizer_on_cpu else (size, 0)

    def _with_holes(self, phase: Phase, extent: int) -> Phase:
        """A phase on the CPU, and what its heap holds beside what is in use."""
        played = {*LABELS.values(), "optimizer", "optimizer on the CPU", "gradients on the CPU"}
        if self.how.keeps_gradients or self.how.added:
            played.add("gradients")
        if self.step_needs < MAPPED:
            played.add("optimizer's step")  # finds room
        holes = extent - sum(size for part, size in phase.host.items() if part in played)
        return replace(phase, host={**phase.host, "free in the heap": holes}) if holes > 0 else phase

    def _extent(self) -> Extent:
        """Of the heap of an update."""
        request, subject, levers = self.request, self.subject, self.request.levers
        before = []
        if request.rollouts:
            before.append(subject.recorded_sampling(self.groups, request.workload.group_size))
        # Two of whatever number, of which the second finds gradients, and the last, which may be smaller.
        parts = [*self.split[:2], *self.split[2:][-1:]]
        if request.copies:
            before += [subject.recorded_evaluation(part) for part in parts]
        first = replace(self.how, keeps_gradients=True, added=False) if self.how.added else self.how
        passes = [subject.recorded_update(part, self.how if number else first) for number, part in enumerate(parts)]
        halves = [optimizer_bytes(levers, [item]) // 2 for item in subject.trained_parameters]
        states = [size for half in halves for size in (half, half)]
        added_there = levers.optimizer_on_cpu and self.micro_batches > 1
        return extent_of_update(before, passes, states, self._gradient_sizes if added_there else [])

    @property
    def groups(self) -> int:
        """How many prompts are answered at once."""
        limit = self.request.levers.max_sequences // self.request.workload.group_size
        return max(1, min(self.request.own_prompts, limit))

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
