"""What `vs_trl.py` and `scaling.py` measure: models of chosen sizes as files, pictures, and configs of real runs.

This file is a plugin as well, which the two load beside the installed ones: the adapter `endless_qwen2vl`, whose
answers never end before the limit of tokens, the reward `token_parity` and the environment `frames`. Nothing else of
a measured run differs from `rllava train`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image
import torch
import yaml
from pydantic import Field
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rllava_core import ComponentSpec, PluginInfo, hookimpl
from rllava_core.config import Options, ResolvedConfig, load
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.plugins import Registry, load_plugins
from rllava_core.policy.scratch import byte_vocabulary
from rllava_core.specs import ENTRY_POINT_GROUP
from rllava_qwen2vl.adapter import Qwen2VL
from rllava_qwen2vl.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TEMPLATE_WORDS, tiny_model, tiny_processor

LEARNING_RATE = 1e-5
PATCH, MERGE = 14, 2
PIXELS = PATCH * MERGE
"""Side of the square of pixels that becomes one image token."""


@dataclass(frozen=True)
class Shape:
    """A model and a step.

    vocabulary, hidden, intermediate, layers, heads, key_value_heads: of the language model; vocabulary 0: the
        repository's preset `tiny`, whose patches of 4 make 16 image tokens of 32×32 pixels.
    tied: input and output embeddings are one matrix.
    vision_hidden, vision_depth, vision_heads: of the vision tower.
    image_tokens: (rows, columns) of each image.
    question: beside the image; with a tokenizer of bytes every letter is a token.
    prompts, group, new_tokens: of a step; an answer has exactly so many tokens.
    turns: of an episode, each of which shows an image of its own.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    image_tokens: tuple[int, int]
    prompts: int
    group: int
    new_tokens: int
    turns: int = 1
    question: str = "What's it?"

    @property
    def side(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        each = PIXELS if self.vocabulary else 8
        return self.image_tokens[0] * each, self.image_tokens[1] * each


BASE = Shape(
    vocabulary=8192,
    hidden=384,
    intermediate=1024,
    layers=6,
    heads=6,
    key_value_heads=2,
    tied=True,
    vision_hidden=128,
    vision_depth=2,
    vision_heads=4,
    image_tokens=(16, 16),
    prompts=1,
    group=8,
    new_tokens=32,
)
"""14 million parameters, 10 of them outside the embedding: what `scaling.py` varies one size at a time."""

SHAPES = {
    # 42 million parameters, 39 of them the embedding; prompts of 276 tokens.
    "mid": replace(
        BASE, vocabulary=151_936, hidden=256, intermediate=768, layers=3, heads=4, key_value_heads=2, prompts=2
    ),
    # 0.25 million parameters; 8 images of 32×32 pixels, 64 answers.
    "small": replace(
        BASE, vocabulary=0, image_tokens=(4, 4), prompts=8, group=8, new_tokens=16, question="What is this?"
    ),
    # 53 million parameters outside the embedding.
    "long": replace(
        BASE,
        hidden=768,
        intermediate=2048,
        layers=8,
        heads=12,
        key_value_heads=4,
        vision_hidden=192,
        vision_heads=3,
        image_tokens=(32, 32),
    ),
    # Four looks at pictures of 64 tokens, and an answer after each.
    "multiturn": replace(BASE, image_tokens=(8, 8), prompts=2, new_tokens=16, turns=4),
}


class Endless(Qwen2VL):
    """Qwen2-VL that never ends its turn, so that every answer is as long as the limit allows.

    The same is asked of TRL by `suppress_tokens`.
    """

    def load(self) -> PreTrainedModel:
        model = super().load()
        self.forbidden_tokens = (*self.forbidden_tokens, *self.end_of_turn)
        return model


class TokenParity:
    """1 if the sum of all sampled token ids is even. Costs nothing, and groups hardly ever agree."""

    def __init__(self, config: Options) -> None:
        pass

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [float(sum(sum(action.tokens) for action in item.actions) % 2 == 0) for item in trajectories]


class FramesConfig(Options):
    """Options of the environment `frames`."""

    turns: int = Field(default=4, ge=1, description="of an episode")
    height: int = Field(default=224, ge=1, description="of a frame, in pixels")
    width: int = Field(default=224, ge=1, description="of a frame, in pixels")
    question: str = Field(default="What now?", description="beside each frame")


class Frames:
    """Episodes of a fixed number of turns; what the next frame shows depends on what was answered, so that the members
    of a group part after their first answer."""

    def __init__(self, config: FramesConfig, task: object) -> None:
        self._config = config

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self._seen = [seed]
        return self._show()

    def step(self, action: Action) -> Transition:
        self._seen.append(sum(action.text.encode()))
        over = len(self._seen) > self._config.turns
        return Transition(0.0, None if over else self._show(), terminated=over)

    def _show(self) -> Observation:
        frame = picture(self._seen, (self._config.height, self._config.width))
        return Observation((Message.user(Image.from_array(frame), self._config.question),))


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="What the benchmarks measure.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="endless_qwen2vl",
            target="workloads:Endless",
            config="rllava_qwen2vl.config:Qwen2VLOptions",
            summary="Qwen2-VL whose answers never end before the limit",
            provides=frozenset({"heads"}),
        )
    ]


@hookimpl
def rllava_rewards() -> list[ComponentSpec]:
    return [ComponentSpec(name="token_parity", target="workloads:TokenParity", summary="1 if token ids sum to even")]


@hookimpl
def rllava_environments() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="frames",
            target="workloads:Frames",
            config="workloads:FramesConfig",
            summary="a new frame in each of a fixed number of turns",
        )
    ]


def registry() -> Registry:
    """The installed plugins and this file."""
    own = EntryPoint("workloads", "workloads", ENTRY_POINT_GROUP)
    return load_plugins([*entry_points(group=ENTRY_POINT_GROUP), own], strict=True)


def picture(seed: Sequence[int], side: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] coloured blots."""
    small = np.random.default_rng(list(seed)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(small).resize((side[1], side[0]), PIL.Image.Resampling.BICUBIC))


def write_model(shape: Shape, directory: Path) -> dict[str, int]:
    """A Qwen2-VL with random weights and its processor, as any framework loads them. Returns its numbers of
    parameters."""
    torch.manual_seed(0)
    if shape.vocabulary:
        processor = _processor(shape)
        model = _model(shape, processor.tokenizer)
    else:
        processor = tiny_processor("tiny")
        model = tiny_model("tiny", processor.tokenizer)
    processor.save_pretrained(directory)
    model.save_pretrained(directory)
    total = sum(parameter.numel() for parameter in model.parameters())
    weights = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    return {"parameters": total, "outside_embeddings": total - sum(weight.numel() for weight in weights.values())}


def never_sampled(directory: Path) -> list[int]:
    """Token ids that no framework may draw: ends of a turn, and what stands for media."""
    tokenizer = Qwen2Tokenizer.from_pretrained(directory)
    return sorted(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


def write_data(shape: Shape, directory: Path, steps: int) -> Path:
    """Pictures, other ones for every step, and the JSONL file that lists them."""
    (directory / "images").mkdir(parents=True)
    lines = []
    for number in range(steps * shape.prompts):
        name = f"images/{number:04}.png"
        PIL.Image.fromarray(picture([number], shape.side)).save(directory / name)
        lines.append(json.dumps({"image": name, "question": shape.question}))
    path = directory / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    directory.joinpath("held_out.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    return path


def write_config(
    shape: Shape,
    model: Path,
    data: Path | None,
    path: Path,
    steps: int,
    *,
    shared: bool,
    seed: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """The config of a run of `rllava train`. Evaluation and what is written besides metrics are kept to a minimum.

    data: the JSONL file; None for episodes of several turns, which need none.
    options: more of the section `model`.
    """
    task: dict[str, Any] = {"rewards": [{"name": "token_parity"}], "max_new_tokens": shape.new_tokens}
    if shape.turns == 1:
        assert data is not None
        held_out = str(data.with_name("held_out.jsonl"))
        task["dataset"] = {"name": "jsonl", "path": str(data), "held_out_path": held_out, "answer": None}
    else:
        height, width = shape.side
        task["environment"] = {"name": "frames", "turns": shape.turns, "height": height, "width": width}
    config: Mapping[str, Any] = {
        "model": {"adapter": "endless_qwen2vl", "path": str(model), **options},
        # A group of one has nothing to compare, and costs what it costs: `scaling.py` samples it all the same.
        "algorithm": {"name": "grpo", "group_size": max(2, shape.group)},
        "task": task,
        "engine": {"train": {"name": "local"} if shared else {"name": "local", "prefix_sharing": False}},
        "training": {
            "steps": steps,
            "prompts_per_step": shape.prompts,
            "learning_rate": LEARNING_RATE,
            "eval_every": 0,
            "eval_episodes": 1,
            "save_every": 0,
            "sample_every": 0,
            "unseen_images": "ignore",
            "seed": seed,
        },
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def resolve(path: Path) -> tuple[ResolvedConfig, Registry]:
    known = registry()
    return load(path, [], known), known


def describe(shape: Shape) -> dict[str, Any]:
    """For reports."""
    return asdict(shape)


def _processor(shape: Shape) -> Qwen2VLProcessor:
    """As the preset's, with words that nobody writes to fill the vocabulary."""
    vocabulary, merges = byte_vocabulary(TEMPLATE_WORDS)
    for number in range(shape.vocabulary - len(vocabulary) - len(SPECIAL_TOKENS)):
        vocabulary[f"w{number}"] = len(vocabulary)
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    end, pad = "<|im_end|>", "<|endoftext|>"
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token=end,
        pad_token=pad,
        unk_token=pad,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (end, pad)],
    )
    size = {"shortest_edge": PIXELS**2, "longest_edge": shape.side[0] * shape.side[1]}
    patches = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )


def _model(shape: Shape, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    identifier = tokenizer.convert_tokens_to_ids
    special = {
        "bos_token_id": identifier("<|endoftext|>"),
        "eos_token_id": identifier("<|im_end|>"),
        "pad_token_id": identifier("<|endoftext|>"),
    }
    half = shape.hidden // shape.heads // 2
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]  # 16, 24, 24 of 64, as Qwen2-VL has them
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": section},
        "tie_word_embeddings": shape.tied,
        **special,
    }
    vision = {
        "depth": shape.vision_depth,
        "embed_dim": shape.vision_hidden,
        "hidden_size": shape.hidden,
        "num_heads": shape.vision_heads,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=identifier("<|image_pad|>"),
            video_token_id=identifier("<|video_pad|>"),
            vision_start_token_id=identifier("<|vision_start|>"),
            vision_end_token_id=identifier("<|vision_end|>"),
            tie_word_embeddings=shape.tied,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model
