"""A LLaVA made of a pretrained vision tower, a new connector and a pretrained language model.

In the manner of TinyLLaVA (arXiv:2402.14289). With the connectors `mlp` and `linear` the result is a plain
`LlavaForConditionalGeneration` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    SiglipVisionModel,
)

from rllava_core.errors import ModelError
from rllava_llava.config import LlavaOptions
from rllava_llava.resampler import ResampledLlava, ResampledLlavaConfig, ResampledLlavaProcessor
from rllava_llava.templates import chat_template

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    model: the class of transformers that loads it.
    extra_tokens: features that are no patch, which come first: a class token, registers.
    """

    model: Any
    extra_tokens: int

    @property
    def strategy(self) -> str:
        """LLaVA's word for leaving out the class token, or for taking all features."""
        return "default" if self.extra_tokens else "full"


TOWERS = {
    "clip": Tower(CLIPVisionModel, 1),
    "siglip": Tower(SiglipVisionModel, 0),
    "dinov2": Tower(Dinov2Model, 1),
    "dinov2_with_registers": Tower(Dinov2WithRegistersModel, 5),
}
"""By the beginning of the `model_type`: that of the whole model of images and text, or of its vision part alone."""


def composed_processor(config: LlavaOptions) -> LlavaProcessor:
    """LLaVA's processor around the tower's image processor and the language model's tokenizer, placeholder added."""
    options = config.compose
    assert options is not None
    vision, tower = _tower(config)
    tokenizer = _read("language", AutoTokenizer.from_pretrained, options.language, config, **_gguf(config))
    # Both calls leave a token alone that is there already.
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.eos_token is None:
        raise ModelError(f"compose.language {options.language}: its tokenizer names no eos_token; set it")
    images = _read("vision", AutoImageProcessor.from_pretrained, options.vision, config)
    if options.connector == "resampler":
        return ResampledLlavaProcessor(images, tokenizer, options.queries, chat_template(tokenizer))
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=tower.strategy,
        num_additional_image_tokens=tower.extra_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template(tokenizer),
    )


def composed_model(config: LlavaOptions, tokenizer: Any) -> PreTrainedModel:
    """Pretrained weights at both ends, random ones between them from torch's global random state."""
    options = config.compose
    assert options is not None
    vision_config, tower = _tower(config)
    precision = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attention}
    vision = _weights("vision", tower.model, options.vision, config, config=vision_config, **precision)
    language = _weights("language", AutoModelForCausalLM, options.language, config, **precision, **_gguf(config))
    if len(tokenizer) > language.config.vocab_size:
        # The placeholder's embedding is never read, and its logit never counts: no need to make it like the others.
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    shared: dict[str, Any] = {
        "vision_config": vision.config,
        "text_config": language.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": options.feature_layer,
        "vision_feature_select_strategy": tower.strategy,
    }
    # Without memory for weights that are about to be replaced.
    with torch.device("meta"):
        if options.connector == "resampler":
            model: Any = ResampledLlava(
                ResampledLlavaConfig(
                    **shared,
                    queries=options.queries,
                    resampler_layers=options.layers,
                    resampler_heads=_heads(vision_config.hidden_size),
                )
            )
        else:
            act = "linear" if options.connector == "linear" else "gelu"
            model = LlavaForConditionalGeneration(LlavaConfig(**shared, projector_hidden_act=act))
    if type(language.base_model) is not type(model.model.language_model):
        raise ModelError(
            f"compose.language {options.language}: a {language.config.model_type!r} is not built as a language model "
            "with a head, so no LLaVA can be made of it"
        )
    _check_head(language, options.language)
    model.model.vision_tower = vision
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    _reset(model.model.multi_modal_projector.to_empty(device="cpu"), options.connector)
    model.to(precision["dtype"])
    model.set_attn_implementation(config.attention)
    model.generation_config = language.generation_config
    composed: PreTrainedModel = model.eval()
    return composed


def require_all(origin: str, report: Mapping[str, Any]) -> None:
    """transformers fills what is missing with random numbers and goes on. Raises ModelError."""
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{origin}: weights that its config asks for are missing: {shown}")


def _check_head(language: Any, where: str) -> None:
    """LLaVA's head is a linear map of the last hidden states, and nothing more. Raises ModelError."""
    head, tokens = language.get_output_embeddings(), torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        own = language.eval()(input_ids=tokens).logits
        plain = nn.functional.linear(language.base_model(input_ids=tokens).last_hidden_state, head.weight)
    if getattr(head, "bias", None) is not None or not torch.allclose(own.float(), plain.float(), rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"compose.language {where}: a {language.config.model_type!r} does more with its logits than LLaVA's "
            "linear head (a bias, a scale or a cap), so a LLaVA of it would be another language model"
        )


def _reset(connector: Any, kind: str) -> None:
    if kind == "resampler":
        connector.reset_parameters()
        return
    connector.linear_1.reset_parameters()
    connector.linear_2.reset_parameters()
    if kind == "linear":
        # LLaVA's config has two maps and a function between them; the function is none, and so is the second at first.
        nn.init.eye_(connector.linear_2.weight)
        nn.init.zeros_(connector.linear_2.bias)


def _heads(width: int) -> int:
    """Of 64 numbers each, as in the towers, or one."""
    return width // 64 if width % 64 == 0 else 1


def _tower(config: LlavaOptions) -> tuple[Any, Tower]:
    """The config of the vision tower, and its kind."""
    assert config.compose is not None
    where = config.compose.vision
    found = _read("vision", AutoConfig.from_pretrained, where, config)
    vision = getattr(found, "vision_config", found)
    tower = TOWERS.get(vision.model_type.removesuffix("_vision_model"))
    if tower is None:
        raise ModelError(f"compose.vision {where}: a {found.model_type!r}; expected one of {', '.join(TOWERS)}")
    if hasattr(vision, "vision_use_head"):
        # SigLIP's pooling, which no LLaVA reads.
        vision.vision_use_head = False
    if not -vision.num_hidden_layers <= config.compose.feature_layer + 1 <= vision.num_hidden_layers + 1:
        raise ModelError(
            f"compose.vision {where}: has {vision.num_hidden_layers} layers, no layer {config.compose.feature_layer}"
        )
    return vision, tower


def _gguf(config: LlavaOptions) -> dict[str, str]:
    assert config.compose is not None
    return {} if config.compose.language_file is None else {"gguf_file": config.compose.language_file}


def _weights(part: str, kind: Any, where: str, trusted: LlavaOptions, **options: Any) -> Any:
    model, report = _read(part, kind.from_pretrained, where, trusted, output_loading_info=True, **options)
    require_all(f"compose.{part} {where}", report)
    return model


def _read(part: str, loader: Callable[..., Any], where: str, trusted: LlavaOptions, **options: Any) -> Any:
    try:
        return loader(where, trust_remote_code=trusted.trust_remote_code, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"compose.{part} {where}: cannot be loaded: {error}") from None
