"""The plan of a run: its phases, and roughly how long a step takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rllava_core.planning.counting import optimizer_bytes
from rllava_core.planning.phases import CUDA_CONTEXT, CUDA_HOST, PROCESS, Parts, Phase
from rllava_core.planning.request import Levers, Request
from rllava_core.planning.subject import Subject
from rllava_core.planning.timing import Machine, Seconds
from rllava_core.planning.tracing import GRADIENTS


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
        self._subjects: dict[str, Subject] = {}
        self._plans: dict[tuple[Levers, bool], Plan] = {}

    def plan(self, levers: Levers | None = None, *, holes: bool = True) -> Plan:
        """The plan with these levers; the request's own if none are given.

        holes: those of the heap of a run on the CPU are looked for, which takes longest.
        """
        key = levers or self._first.levers, holes
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
        found = Parts(request, self._subject(request)).update
        return found.total - found.peak.get(GRADIENTS, 0)

    def _planned(self, levers: Levers, holes: bool) -> Plan:
        request = self._first.with_levers(**asdict(levers))
        subject = self._subject(request)
        parts = Parts(request, subject)
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
            phases=tuple(parts.phases(holes=holes)),
            seconds=seconds,
            processes=request.processes,
        )

    def _subject(self, request: Request) -> Subject:
        key = f"{request.levers.dtype} {request.levers.mixed_precision}"
        if key not in self._subjects:
            self._subjects[key] = Subject(request)
        return self._subjects[key]
