"""How vLLM takes the features of an image, family by family: as its own processors would hand them to its models.

Features go to vLLM as they are. If it were given the picture, it would preprocess it a second time, and by its own
reading of the processor's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from rllava_core.errors import ModelError
from rllava_core.policy.adapter import Features


@dataclass(frozen=True)
class Field:
    """kind: how images of a batch are put together: `flat`, one behind the other along the first axis; `batched`,
    side by side along a new one. on_cpu: read by the host, and never sent to the device."""

    kind: Literal["flat", "batched"]
    on_cpu: bool = False

    def value(self, feature: Tensor) -> Tensor:
        """Of one image, from the feature of an adapter, whose first axis is the image's where they are batched."""
        return feature if self.kind == "flat" else feature[0]


_QWEN = {"pixel_values": Field("flat"), "image_grid_thw": Field("batched", on_cpu=True)}
_LLAVA = {"pixel_values": Field("batched")}
_TILES = {"pixel_values": Field("batched"), "image_sizes": Field("batched", on_cpu=True)}

FIELDS: Mapping[str, Mapping[str, Field]] = MappingProxyType(
    {
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "qwen3_vl": _QWEN,
        "qwen3_vl_moe": _QWEN,
        "llava": _LLAVA,
        "llava_next": _TILES,
        "llava_onevision": _TILES,
    }
)
"""By the `model_type` of a config."""


def fields_of(model_type: str) -> Mapping[str, Field]:
    """Raises ModelError for a family whose images cannot be handed over."""
    if model_type not in FIELDS:
        raise ModelError(
            f"engine.rollout vllm: no way is known to hand the images of a {model_type!r} to vLLM, only of "
            f"{', '.join(FIELDS)}; use engine.rollout: local"
        )
    return FIELDS[model_type]


def values_of(features: Features, fields: Mapping[str, Field]) -> dict[str, tuple[Tensor, Field]]:
    """What vLLM's model is given of an image. Raises ModelError for a feature that the family is not known to have."""
    if features.keys() != fields.keys():
        raise ModelError(
            f"engine.rollout vllm: an image has the features {', '.join(features)}, and vLLM's model of its family "
            f"takes {', '.join(fields)}"
        )
    return {name: (field.value(features[name]), field) for name, field in fields.items()}
