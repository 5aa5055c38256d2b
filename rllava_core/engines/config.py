"""Options of the local engines. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, create_model

from rllava_core.config import Options

if TYPE_CHECKING:

    class Overlapping(Options):
        """Options of an engine that can sample while the policy is trained."""

else:
    # The key is a word of Python's, so that no class body can declare it.
    _AHEAD = Field(
        default=0,
        description="1: sample the next step's episodes while this step trains, by the weights that it began with; "
        "needs algorithm.importance",
    )
    Overlapping = create_model("Overlapping", __base__=Options, **{"async": (Literal[0, 1], _AHEAD)})


def overlaps(config: BaseModel) -> bool:
    """Whether a rollout engine's config asks for the next step's episodes while this one trains."""
    return bool(getattr(config, "async", 0))


Divided = Literal["weights", "gradients", "states", "masters"]


class TrainOptions(Options):
    """What every engine says that trains as the local one does, for it and for `rllava plan`."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: an accelerator if there is one")
    mixed_precision: Literal["no", "bf16"] = Field(
        default="no", description="bf16: forward passes in bfloat16 over weights of `model.dtype`"
    )
    timeout: float = Field(
        default=1800.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds that a process waits for the others, such as one whose episodes take longer",
    )
    prefix_sharing: bool = Field(
        default=True, description="read what trajectories share once; false: once for each of them, to compare with"
    )
    checkpoint_activations: bool = Field(
        default=False, description="keep what goes into each layer only, and compute the rest again in backward"
    )

    @property
    def divided(self) -> frozenset[Divided]:
        """Of what several processes hold a part each. masters: the weights that the optimizer steps on, where they are
        others than those that are computed with."""
        return frozenset()


class LocalTrainConfig(TrainOptions):
    """`engine: {train: {name: local, …}}`"""

    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="of several processes: ddp: all weights in each; fsdp: in each a part of the trained weights, of "
        "gradients and states, and a whole copy that acts; auto: fsdp if accelerate's own config asks for it, else ddp",
    )
    offload_activations: bool = Field(
        default=False, description="keep what backward needs in host memory until it does"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        default="adamw",
        description="adamw_8bit: states of one byte (arXiv:2110.02861, by bitsandbytes); adafactor: no first moment, "
        "and the second by rows and columns (arXiv:1804.04235)",
    )
    optimizer_on_cpu: bool = Field(
        default=False,
        description="keep the optimizer's states, and float32 masters of weights in half precision, in host memory, "
        "where every gradient goes as it is made",
    )
    stochastic_rounding: bool = Field(
        default=False, description="round bfloat16 weights at random instead of keeping float32 masters of them"
    )
    step_in_backward: bool = Field(
        default=False,
        description="step on every weight as its gradient is made, so that there are never gradients of all; needs "
        "training.max_grad_norm null, and one micro-batch a step",
    )

    @property
    def divided(self) -> frozenset[Divided]:
        return frozenset({"weights", "gradients", "states"} if self.parallel == "fsdp" else ())


class LocalRolloutConfig(Overlapping):
    """`engine: {rollout: {name: local, …}}`"""

    max_sequences: int = Field(default=512, ge=1, description="sequences decoded at once, which bounds the cache")
