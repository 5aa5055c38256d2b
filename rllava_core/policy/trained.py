"""What of a model is trained: every part of it in full, by low-rank adapters (LoRA), or not at all.

Adapters are put into the model that a family's adapter loaded (by PEFT), which stays the same class with the same
methods. Weights that are not trained are shared by every copy of the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rllava_core.errors import ConfigError, ModelError, TrainingError
from rllava_core.policy.adapter import ModelAdapter, Part
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.quantized import IS_QUANTIZED, is_quantized, plain_linear, quantize

_LORA = ".lora_"
"""In the names of all weights of PEFT's LoRA, those of DoRA included."""


def set_trained(model: PreTrainedModel, adapter: ModelAdapter, config: ModelConfig) -> None:
    """Freeze what `config.train` freezes, and add adapters where it asks for them, whose B is zero at first.

    Raises ModelError if the model has not the part, or nothing in it can be adapted; ConfigError without PEFT.
    """
    ways: dict[Part, str] = {part: getattr(config.train, part) for part in ("vision", "connector", "language")}
    found = {adapter.part_of(name) for name, _ in model.named_parameters()}
    for part in sorted(set(ways) - found):
        if ways[part] != "full":
            raise ModelError(f"model.train.{part} is {ways[part]!r}, and this model has no {part} part")
    adapted = {part for part, way in ways.items() if way == "lora"}
    if config.quantization != "none":
        quantize(model, _linear_layers(model, adapter, {"language"}))
    if adapted:
        _add_lora(model, adapter, config, adapted)
    # Afterwards, for PEFT freezes whatever is no adapter.
    for name, parameter in model.named_parameters():
        part = adapter.part_of(name.replace(".base_layer.", "."))
        parameter.requires_grad_(_LORA in name or ways[part] == "full")
        if _LORA in name:
            # In half precision most steps of a usual size would be rounded away.
            parameter.data = parameter.data.float()


def is_adapted(model: nn.Module) -> bool:
    """Whether there are low-rank adapters in the model."""
    return any(_LORA in name for name, _ in model.named_parameters())


def trained_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def part_state(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """These parameters of a module, by name."""
    parameters = dict(module.named_parameters())
    return {name: parameters[name].detach() for name in names}


@torch.no_grad()
def load_part_state(module: nn.Module, names: Iterable[str], state: Mapping[str, Tensor]) -> None:
    """Restore what `part_state` returned. Raises TrainingError if other parameters are trained than were."""
    parameters = dict(module.named_parameters())
    expected = {name: tuple(parameters[name].shape) for name in names}
    found = {name: tuple(values.shape) for name, values in state.items()}
    if found != expected:
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise TrainingError(f"other weights were trained when it was saved, {other[0]} among them; see model.train")
    for name, values in state.items():
        parameters[name].copy_(values)


def copy_sharing_frozen(module: PreTrainedModel) -> PreTrainedModel:
    """A copy that holds the very same tensors where nothing is trained."""
    frozen = {id(item): item for item in module.parameters() if not item.requires_grad}
    return copy.deepcopy(module, memo=frozen)


def share_frozen(module: nn.Module, other: nn.Module) -> None:
    """Give a module the tensors of another one of the same structure wherever the other is not trained."""
    for name, parameter in other.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)


def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint by their names in it, adapters merged and nothing quantized, for who reads them
    from memory: layer by layer, so that there are never two of all. Those that are neither adapted nor quantized are
    the model's own tensors, and one that several layers share comes once."""
    adapters: tuple[type, ...] = ()
    if is_adapted(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapters = (BaseTunerLayer,)
    inside: tuple[str, ...] = ()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        layer = module
        if isinstance(module, adapters):
            layer, inside = _merged_layer(module), (*inside, f"{name}.")
        elif is_quantized(module):
            layer = plain_linear(module)
        for own, values in layer.named_parameters(recurse=False):
            if id(values) not in seen:
                # A layer that was merged for the moment is gone before the next, which may be given its identity.
                seen.update({id(values)} if layer is module else ())
                yield f"{name}.{own}" if name else own, values.detach()


def save_model(model: PreTrainedModel, directory: Path, adapter: ModelAdapter) -> None:
    """A standard checkpoint. Low-rank adapters are merged into its weights, and lie in `directory/adapter` (PEFT)."""
    if not is_adapted(model):
        adapter.save(model, directory)
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter.save(_merged(model), directory)
    own = directory / "adapter"
    own.mkdir()
    config = model.peft_config["default"]
    config.save_pretrained(str(own))
    weights = get_peft_model_state_dict(model)
    tensors = {f"base_model.model.{name}": values.contiguous().cpu() for name, values in weights.items()}
    save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})


def _add_lora(model: PreTrainedModel, adapter: ModelAdapter, config: ModelConfig, parts: set[Part]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"model.train asks for LoRA, which needs PEFT ({error}): pip install 'rllava-core[lora]'"
        ) from None
    targets = {part: _linear_layers(model, adapter, {part}) for part in parts}
    wanted = config.lora.targets
    if wanted is not None:
        targets = {part: [name for name in names if name.split(".")[-1] in wanted] for part, names in targets.items()}
    for part, names in targets.items():
        if not names:
            which = "no linear layer" if wanted is None else f"no linear layer named {' or '.join(wanted)}"
            raise ModelError(f"model.train.{part} is 'lora', and {which} is in the {part} part of this model")
    names = [name for found in targets.values() for name in found]
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        use_dora=config.lora.dora,
        lora_dropout=0.0,
        target_modules=names,
    )
    inject_adapter_in_model(lora, model)


def _linear_layers(model: PreTrainedModel, adapter: ModelAdapter, parts: set[Part]) -> list[str]:
    """Names of the linear layers of these parts. The language head is none of them: it stays as embeddings do."""
    head = adapter.lm_head(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and adapter.part_of(f"{name}.weight") in parts
    ]


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without adapters that computes the same, and holds nothing quantized. Weights that are neither adapted nor
    quantized are shared, not copied; the others go to the host one by one, for an accelerator may have no room."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name] = _merged_layer(module).cpu()
        elif is_quantized(module) and not name.endswith(".base_layer"):  # one that `lora.targets` left out
            layers[name] = plain_linear(module).cpu()
    parameters = {id(item): item for item in model.parameters()}
    plain = copy.deepcopy(model, memo=parameters)
    for name, layer in layers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(owner), attribute, layer)
    del plain.peft_config
    if hasattr(plain, IS_QUANTIZED):
        delattr(plain, IS_QUANTIZED)
    return plain


def _merged_layer(adapted: Any) -> nn.Module:
    base = adapted.get_base_layer()
    if is_quantized(base):
        plain = plain_linear(base)
        # Added in the precision of the adapters, and rounded once.
        delta = adapted.get_delta_weight("default")
        plain.weight.data = (plain.weight.to(delta.dtype) + delta).to(plain.weight.dtype)
        return plain
    layer = copy.deepcopy(adapted)
    layer.merge()
    merged: nn.Module = layer.get_base_layer()
    return merged
