"""Linear layers held in 4 bits, by bitsandbytes, under low-rank adapters (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rllava_core.errors import ConfigError

IS_QUANTIZED = "is_loaded_in_4bit"
"""The attribute of a model by which PEFT knows what its layers are put around."""


def quantize(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Put layers in 4-bit NormalFloat, in blocks of 64 whose scales are quantized again, in the place of these ones.

    They compute in the precision that they had.

    Raises ConfigError without bitsandbytes.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ConfigError(
            f"model.quantization needs bitsandbytes ({error}): pip install 'rllava-core[qlora]'"
        ) from None
    for name in list(layers):
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        layer = Linear4bit(
            plain.in_features, plain.out_features, bias=False, compute_dtype=plain.weight.dtype, device="meta"
        )
        weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        layer.weight = weight.to(plain.weight.device)
        layer.bias = plain.bias
        # Where the processor has the instructions for it, layers would be packed for inference for good in the first
        # pass without gradients, and pass none on in the next that has some.
        layer.support_avx512bf16_for_cpu = False
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer)
    setattr(model, IS_QUANTIZED, True)


def plain_linear(layer: Any) -> nn.Linear:
    """The layer that a quantized one stands for, in the precision that it computes in."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain


def is_quantized(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), torch.Tensor) and hasattr(layer.weight, "quant_state")
