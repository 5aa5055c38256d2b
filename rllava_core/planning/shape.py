"""Models of which only the `config.json` is known: published ones by hub id, or a directory's.

A published shape is a file of the plugin that loads the family, beside the config class that names the folder
(`ModelConfig.shapes`), as `ORGANISATION/NAME/config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from rllava_core.config import Resolved
from rllava_core.errors import ModelError
from rllava_core.planning.published import find_published, published
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.trained import set_trained


@runtime_checkable
class FromShape(Protocol):
    """What an adapter of transformers' families offers, so that its models can be planned without a checkpoint."""

    def shape_processor(self, config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
        """A processor for a model with this config. Its tokenizer may be any that has the special tokens.

        images: what the checkpoint says of its image processor; empty where there is none.
        """
        ...


def planned_adapter(model: Resolved) -> ModelAdapter:
    """The adapter of a model whose `load` builds it from its config alone; to be called on the meta device.

    Raises ModelError if there is no such config, or the adapter does not know how.
    """
    options = model.config
    target = model.component.load_target()
    if not isinstance(options, ModelConfig):
        raise ModelError(f"model {model.component.spec.name!r}: its config is no ModelConfig, so it cannot be planned")
    if options.from_scratch is not None:
        adapter: ModelAdapter = model.create()
        return adapter
    if options.path is None:
        raise ModelError(f"model {model.component.spec.name!r}: only `path` and `from_scratch` can be planned")
    if not hasattr(target, "shape_processor"):
        raise ModelError(
            f"model {model.component.spec.name!r}: its adapter has no `shape_processor`, so it can be planned by "
            "`from_scratch` only"
        )
    directory = _directory(options)
    config = _read_config(directory, target, options)
    images = _image_settings(directory)

    class FromConfig(target):  # type: ignore[valid-type, misc]
        """The same family with a stand-in for its tokenizer, and its model as `config.json` has it."""

        def scratch_processor(self) -> Any:
            return self.shape_processor(config, images)

        def scratch_model(self) -> PreTrainedModel:
            # The stand-in has other ids; that of no token is as good as any for what never occurs.
            for name in ("image_token_id", "image_token_index"):
                if hasattr(config, name):
                    setattr(config, name, self.image_token)
            if hasattr(config, "video_token_id"):
                config.video_token_id = config.get_text_config().vocab_size - 1
            made: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
            return made

    return FromConfig(options.model_copy(update={"path": None, "from_scratch": options.path}))


def planned_model(adapter: ModelAdapter, options: Any) -> PreTrainedModel:
    """The model of a planned adapter, on the meta device, with what is trained set as for a run."""
    with torch.device("meta"):
        model = adapter.load()
        model.tie_weights()
        if isinstance(options, ModelConfig):
            quantized = options.quantization != "none"
            set_trained(model, adapter, options.model_copy(update={"quantization": "none"}))
            if quantized:
                _quantize(model, adapter)
    return model


def _directory(options: ModelConfig) -> Path:
    assert options.path is not None
    local = Path(options.path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"model {local}: the directory holds no config.json, so it is no transformers model")
        return local
    return find_published(options.path, published(type(options)))


def _image_settings(directory: Path) -> Mapping[str, Any]:
    """What a checkpoint says of its image processor; nothing if it does not."""
    for name in ("preprocessor_config.json", "processor_config.json"):  # before transformers 5, and since
        if (directory / name).is_file():
            try:
                found = json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"model {directory}: its {name} cannot be read: {error}") from None
            if "image_processor" in found or name.startswith("pre"):
                return dict(found.get("image_processor", found))
    return {}


def _read_config(directory: Path, target: Any, options: ModelConfig) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {options.path}: its config.json cannot be read: {error}") from None
    if config.model_type not in target.model_types:
        loads = ", ".join(map(repr, target.model_types))
        raise ModelError(f"model {options.path}: a {config.model_type!r}; this adapter loads {loads}")
    return config


class QuantizedLinear(nn.Module):
    """Stands for a layer of bitsandbytes in 4 bits, which has no kernels on the meta device.

    A weight takes half a byte, and its block of 64 one byte of scale (QLoRA's double quantization).
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.dtype = plain.weight.dtype
        size = plain.weight.numel()
        packed = torch.empty(size // 2 + size // 64, dtype=torch.uint8, device=plain.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = _Dequantized.apply(values, self.weight, (self.out_features, self.in_features), self.dtype)
        return result if self.bias is None else result + self.bias


class _Dequantized(torch.autograd.Function):
    """The plain weight is there while it is multiplied with, and made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.packed, ctx.shape, ctx.dtype = packed, shape, dtype
        return values @ packed.new_empty(shape, dtype=dtype).T.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient] = gradients
        return gradient @ ctx.packed.new_empty(ctx.shape, dtype=ctx.dtype).to(gradient.dtype), None, None, None


def _quantize(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    head = adapter.lm_head(model)
    for name, module in list(model.named_modules()):
        plain = name.replace(".base_layer", "")
        if not isinstance(module, nn.Linear) or module is head or ".lora_" in name:
            continue
        if adapter.part_of(f"{plain}.weight") == "language":
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, QuantizedLinear(module))
