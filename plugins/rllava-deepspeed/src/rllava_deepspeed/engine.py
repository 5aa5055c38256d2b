"""Several processes that share gradients, states and weights by DeepSpeed's ZeRO (arXiv:1910.02054).

All else is the local engine. What is DeepSpeed's own, and must not show:

- It keeps the weights of a parameter group as one flat tensor, and steps on all of it, also where no gradient came:
  what is left of their momentum would move weights that the step has not used. So the weights that only images reach
  are a group of their own, which rests in a step without images; and a step that uses a part of a group is refused.
- It averages gradients in the order in which each process makes them, and does not compare. We do, before it steps.
- ZeRO-3 leaves the last step's gradients where they are until new ones come. We clear them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from rllava_core.algorithms.protocol import Batch
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.parallel import Make, Pass, in_step, trained
from rllava_core.engines.protocol import TrainSetup
from rllava_core.engines.updates import Update
from rllava_core.engines.world import Processes, World
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.policy.policy import Policy, PolicyOutput
from rllava_deepspeed.config import DeepSpeedConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a weight, by torch's names."""

BUCKET = 2**26
"""Gradients, in numbers, that are averaged at once. DeepSpeed allocates room for all of them."""

KEPT = 10_000
"""Weights of fewer numbers, such as those of norms, are gathered once under stage 3, and stay."""

AHEAD = 2**24
"""Weights, in numbers, that stage 3 gathers before they are needed."""

_RESTS = "rests"


class DeepSpeedTrainEngine(LocalTrainEngine):
    """The local engine, whose processes share by ZeRO; one process alone has nothing to share, and is the local one."""

    def __init__(self, config: DeepSpeedConfig, setup: TrainSetup) -> None:
        own = LocalTrainConfig(**config.model_dump(exclude={"stage"}))
        super().__init__(own, setup, lambda accelerator, policy: ZeRO(accelerator, policy, config.stage))


class ZeRO:
    """What one process does of a step, as `rllava_core.engines.parallel.Parallel` says.

    Under stage 2 the policy itself is trained; under stage 3 a copy of it, which DeepSpeed takes apart, while the whole
    one acts, is evaluated and is saved, as under FSDP2.
    """

    packed = True

    def __init__(self, accelerator: Accelerator, policy: Policy, stage: int) -> None:
        kinds = {parameter.dtype for parameter in trained(policy)}
        if kinds != {torch.float32}:
            named = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            raise ConfigError(
                f"engine.train: deepspeed trains float32, and is given weights of {named}: set model.dtype=float32, "
                "and engine.train.mixed_precision=bf16 for speed"
            )
        frozen = next((name for name, item in policy.named_parameters() if not item.requires_grad), None)
        if stage == 3 and frozen is not None:
            # It would take apart what the policy that acts, and every copy, hold as well.
            raise ConfigError(
                f"engine.train.stage: 3 divides all weights of a model, and {frozen} is frozen: use stage: 2, or "
                "engine.train={name: local, parallel: fsdp}, which hold frozen weights once"
            )
        self.world: World = Processes()
        self.trained = policy if stage == 2 else policy.copied()
        self.module: Callable[..., Any] = self._called
        self._policy = policy
        self._accelerator = accelerator
        self._stage = stage
        self._groups = _groups(self.trained)
        self._engine: Any = None
        self._step: _Step

    def prepare(self, make: Make | None, limit: float | None) -> Update | None:
        assert make is not None  # of options that step otherwise, this engine has none
        deepspeed = _deepspeed(self._policy.device)
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        parameters = trained(self.trained)
        # First, for DeepSpeed takes a gradient away as it comes.
        made = _Made(parameters)
        model = _Plain(self.trained, self._accelerator)
        if self._stage == 3:
            # The language head is not called: its weights are read where log-probs are computed, and again in backward.
            head = self.trained.adapter.lm_head(self.trained.model)
            for parameter in [*head.parameters(), *self.trained.heads.parameters()]:
                deepspeed.zero.register_external_parameter(model, parameter)
        total = sum(parameter.numel() for parameter in parameters)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": limit or 0.0,
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": min(BUCKET, total),
                # By its defaults it keeps the last billion numbers, in case that they are used again.
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": AHEAD,
                "stage3_param_persistence_threshold": KEPT,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = make([parameters[number] for number in self._groups[0]])
        for group in self._groups[1:]:
            optimizer.add_param_group({"params": [parameters[number] for number in group]})
        optimizer.register_step_pre_hook(_let_rest)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        names = [name for name, parameter in self._policy.named_parameters() if parameter.requires_grad]
        parts = [self._flat(number) for number in range(len(self._groups))]
        for part in (part for own in parts for part in own):
            # As torch's AdamW makes it before its first step: there must be states, even of a group that rests.
            moments = {name: torch.zeros_like(part) for name in MOMENTS}
            optimizer.state[part] = {"step": torch.zeros((), device=part.device), **moments}
        if self._stage == 2:
            for weights, own in zip(self._engine.optimizer.bit16_groups, parts, strict=True):
                lazy_init_hp_params_optimizer_state(weights, own[0], optimizer.state)
        steps = [[optimizer.state[part]["step"] for part in own] for own in parts]
        self._step = _Step(self._engine, self._groups, names, made, steps, self.world)
        return self._step

    def passes(self, micro_batches: Callable[[int], list[Batch]], batch: Batch) -> list[Pass]:
        return in_step(self.world, micro_batches, batch)

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    @torch.no_grad()
    def stepped(self) -> None:
        if self._stage == 3:
            for own, part in self._pairs():
                with self._gathered(part):
                    own.copy_(part)

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """As torch's AdamW has it, of the weights that were used. All processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = trained(self.trained)
        held = {}
        for number, steps in sorted(self._step.taken().items()):
            moments = {name: safe_get_full_optimizer_state(parameters[number], name) for name in MOMENTS}
            held[number] = {"step": torch.tensor(steps), **{name: own.cpu().clone() for name, own in moments.items()}}
        return {"state": held, "param_groups": state["param_groups"]}

    @torch.no_grad()
    def placed(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        held = {int(number): own for number, own in state["state"].items()}
        self._step.resume({number: float(own["step"]) for number, own in held.items()})
        for number, (own, part) in enumerate(self._pairs()):
            if self._stage == 3:
                with self._gathered(part, changed=True):
                    part.copy_(own)
            moments = {name: held[number][name].to(own.device) for name in MOMENTS} if number in held else {}
            self._set(part, own.detach(), moments)
        return state

    def _set(self, parameter: nn.Parameter, value: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Give the optimizer this process' part of a weight and of its moments."""
        from deepspeed import utils

        if self._stage == 2:
            utils.safe_set_full_fp32_param(parameter, value)
            for name, moment in moments.items():
                utils.safe_set_full_optimizer_state(parameter, moment, name)
            return
        # Of stage 3, those functions fail where a weight cannot be divided evenly.
        utils.safe_set_local_fp32_param(parameter, self._slice(value))
        for name, moment in moments.items():
            utils.safe_set_local_optimizer_state(parameter, self._slice(moment), name)

    def _slice(self, value: Tensor) -> Tensor:
        """Of a tensor, as stage 3 divides it: the last parts are filled up with zeros."""
        size = -(-value.numel() // self.world.size)
        padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        return padded[size * self.world.rank :][:size]

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each trained weight that acts, with the one that DeepSpeed has."""
        return zip(trained(self._policy), trained(self.trained), strict=True)

    def _flat(self, group: int) -> list[nn.Parameter]:
        """What the torch optimizer steps on for a parameter group: this process' part of its weights."""
        zero = self._engine.optimizer
        if self._stage == 2:
            return [zero.single_partition_of_fp32_groups[group]]
        parts = enumerate(zero.fp32_partitioned_groups_flat)
        return [part for number, part in parts if zero.sub_group_to_group_id[number] == group]

    def _gathered(self, parameter: nn.Parameter, *, changed: bool = False) -> AbstractContextManager[Any]:
        import deepspeed

        found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if changed else None
        )
        return found

    def _called(self, *arguments: Any, **named: Any) -> PolicyOutput:
        found = self._engine(*arguments, **named)
        widths = {name: head.out_features for name, head in self.trained.heads.items()}
        decisions = len(found) // (2 + sum(widths.values()))
        logprobs, entropies, *heads = found.split([decisions * width for width in (1, 1, *widths.values())])
        read = (values.view(decisions, width) for values, width in zip(heads, widths.values(), strict=True))
        return PolicyOutput(logprobs, entropies, dict(zip(widths, read, strict=True)))


class _Plain(nn.Module):
    """The policy with all of its output in one tensor, [D · (2 + sizes of heads)]: log-probs, entropies, each head.

    ZeRO-3 expects gradients to come back by the same tensors in every process, and not every loss uses all.
    """

    def __init__(self, policy: Policy, accelerator: Accelerator) -> None:
        super().__init__()
        self.policy = policy
        self._accelerator = accelerator

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        # Here, for DeepSpeed turns it off around the call.
        with self._accelerator.autocast():
            output = self.policy(*arguments, **named)
        return torch.cat([output.logprobs, output.entropies, *(own.float().flatten() for own in output.heads.values())])


class _Made:
    """numbers: of the weights that a step's passes have made gradients for, in the order in which they came."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.numbers: list[int] = []
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(self._noting(number))

    def _noting(self, number: int) -> Callable[[Tensor], None]:
        return lambda _: self.numbers.append(number)


class _Step:
    """DeepSpeed clips, checks and steps by itself."""

    def __init__(
        self,
        engine: Any,
        groups: Sequence[Sequence[int]],
        names: Sequence[str],
        made: _Made,
        steps: Sequence[Sequence[Tensor]],
        world: World,
    ) -> None:
        self._engine = engine
        self._groups = groups
        self._names = names
        self._made = made
        self._steps = steps  # taken on each part of each group, as the optimizer counts them
        self._world = world
        self._used: list[frozenset[int]] = [frozenset() for _ in groups]

    def begin(self, backward_passes: int, learning_rate: float) -> None:
        self._made.numbers.clear()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        buffer = getattr(self._engine.optimizer, "grad_partitions_flat_buffer", None)  # stage 3 has one
        if buffer is not None:
            buffer.zero_()

    def finish(self) -> Tensor:
        made = tuple(self._made.numbers)
        if len(set(self._world.gathered(hash(made)))) > 1:
            raise TrainingError(
                "the processes made gradients in different orders, of which DeepSpeed would mix up the weights; train "
                "with engine.train={name: local, parallel: fsdp}"
            )
        for number, members in enumerate(self._groups):
            used = frozenset(made).intersection(members)
            self._check(number, used)
            self._engine.optimizer.param_groups[number][_RESTS] = not used
            self._used[number] = used or self._used[number]
        # Where a gradient is not finite, it takes no step, and the norm is infinite.
        self._engine.step()
        return torch.as_tensor(float(self._engine.get_global_grad_norm()))

    def taken(self) -> dict[int, float]:
        """How many steps were taken on each weight that was ever used."""
        return {number: float(steps[0]) for used, steps in zip(self._used, self._steps, strict=True) for number in used}

    def resume(self, taken: Mapping[int, float]) -> None:
        """Go on after so many steps on each weight. Raises ConfigError where DeepSpeed cannot."""
        for group, members in enumerate(self._groups):
            used = frozenset(taken).intersection(members)
            counts = sorted({taken[number] for number in used}) or [0.0]
            if len(counts) > 1:
                raise ConfigError(
                    f"the checkpoint's optimizer took {' and '.join(f'{count:.0f}' for count in counts)} steps on "
                    "weights that DeepSpeed steps on as one: resume with one process"
                )
            self._used[group] = used
            for steps in self._steps[group]:
                steps.fill_(counts[0])

    def state_dict(self) -> dict[str, Any]:
        # The groups differ in nothing else; one process has one of all weights.
        group = {name: value for name, value in self._engine.optimizer.param_groups[0].items() if name != _RESTS}
        return {"optimizer": {"param_groups": [{**group, "params": list(range(len(self._names)))}]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The moments were placed before; learning rates are set at every step."""

    def _check(self, group: int, used: frozenset[int]) -> None:
        """Raises TrainingError for a step on weights that it did not use."""
        expected = self._used[group]
        decays = self._engine.optimizer.param_groups[group].get("weight_decay", 0.0)
        if not expected and decays:
            expected = frozenset(self._groups[group])
        if used and expected and used != expected:
            other = min(used ^ expected)
            why = "training.weight_decay would shrink it" if decays else "not all steps use the same weights beside it"
            raise TrainingError(
                f"this step {'uses' if other in used else 'does not use'} {self._names[other]}, and DeepSpeed steps on "
                f"it in every step ({why}): freeze it by model.train, or train with engine.train={{name: local, "
                "parallel: fsdp}"
            )


def _groups(policy: Policy) -> list[list[int]]:
    """Numbers of the trained weights that every step uses, and of those that only images reach; neither is empty."""
    shown: list[int] = []
    always: list[int] = []
    names = (name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    for number, name in enumerate(names):
        owner, _, inner = name.partition(".")
        of_model = owner in ("model", "trunk")
        part = policy.adapter.part_of(inner.replace(".base_layer.", ".")) if of_model else "language"
        (always if part == "language" else shown).append(number)
    return [group for group in (always, shown) if group]


def _let_rest(optimizer: Optimizer, *_: Any) -> None:
    """Without a gradient, torch's optimizer leaves a weight and its states as they are."""
    for group in optimizer.param_groups:
        if group.get(_RESTS):
            for part in group["params"]:
                part.grad = None


def _deepspeed(device: torch.device) -> Any:
    # It looks for an accelerator of its own otherwise, and would not find that a run is to be on the CPU.
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"engine.train: deepspeed needs DeepSpeed ({error}): pip install deepspeed") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
