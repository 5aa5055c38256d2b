"""What the probe lets through, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText, LlamaConfig

from rllava_anyvlm.adapter import AnyVLM
from rllava_anyvlm.config import AnyVLMOptions
from rllava_anyvlm.parts import beginnings, part_of
from rllava_core.cli import rllava
from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message

DTYPES = ("float32", "bfloat16", "float16")
RIGHT = ("llava_onevision", "smolvlm", "mistral3", "aya_vision", "llava_of_one_turn")


def adapter(**options: Any) -> AnyVLM:
    return AnyVLM(AnyVLMOptions(**({} if "path" in options else {"from_scratch": "tiny"}) | options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_the_adapter_computes_rightly_is_loaded(checkpoints: Any, family: str, dtype: str) -> None:
    adapter(path=checkpoints.path(family), dtype=dtype).load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_vl", r"log-probs of text and images, read in one piece, differ .* by up to \d\.\d+ nats"),
        ("gemma3", r"log-probs of text and images, read in one piece, differ .* by up to \d\.\d+ nats"),
        ("llava_hybrid", r"log-probs of text alone, read in pieces through the cache, differ .* by up to \d\.\d+ nats"),
        ("paligemma", r"the family's processor makes \d+ tokens .* the images one by one make \d+"),
        ("idefics2", r"the family's processor makes \d+ tokens .* the images one by one make \d+"),
    ],
)
def test_a_family_that_it_would_compute_wrongly_is_refused(
    checkpoints: Any, family: str, reason: str, dtype: str
) -> None:
    path = checkpoints.path(family)
    with pytest.raises(
        ModelError, match=rf"^model {path}: a '{family.removesuffix('_hybrid')}'.*{reason}.*docs/plugins\.md$"
    ):
        adapter(path=path, dtype=dtype).load()


def test_the_command_line_says_so(checkpoints: Any, tmp_path: Path) -> None:
    model = f"model={{adapter: anyvlm, path: {checkpoints.path('gemma3')}}}"
    example = Path(__file__).parents[3] / "examples" / "digits.yaml"
    done = CliRunner().invoke(rllava, ["train", str(example), model, "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "The family needs an adapter of its own" in " ".join(done.output.split())


class Counting(AnyVLM):
    """Positions that go on from the middle of an image, as M-RoPE's do."""

    def positions(self, tokens: Any, features: Any, start: int) -> Any:
        return super().positions(tokens, features, start) - (len(tokens) // 2 if start else 0)


class Confusing(AnyVLM):
    """The images of a batch in another order."""

    def collate(self, features: Any) -> Any:
        return super().collate(features[::-1])


class Forgetful(AnyVLM):
    """A mask that is to be added is taken for one of tokens."""

    def hidden_states(self, model: Any, *, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        mask = attention_mask if attention_mask.ndim == 2 else torch.ones(len(attention_mask), attention_mask.shape[-1])
        return super().hidden_states(model, attention_mask=mask, **inputs)


class Shouting(AnyVLM):
    """A head that does not give the model's logits."""

    def lm_head(self, model: Any) -> Any:
        return lambda states: 2 * super(Shouting, self).lm_head(model)(states)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Counting, "read in pieces through the cache,"),
        (Confusing, "read in one piece,"),
        (Forgetful, "two continuations of a prompt in one row,"),
        (Shouting, "read in one piece,"),
    ],
)
def test_each_way_of_reading_is_compared(kind: type[AnyVLM], what: str) -> None:
    """The ways in which a family may differ, one at a time."""
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=what):
        kind(AnyVLMOptions(from_scratch="tiny")).load()


def test_images_that_are_not_seen_prove_nothing(checkpoints: Any) -> None:
    with pytest.raises(ModelError, match="it does not see images"):
        adapter(path=checkpoints.path("mistral3", blind=True)).load()


def test_a_context_that_holds_no_image_is_refused(checkpoints: Any) -> None:
    with pytest.raises(ModelError, match="more than the 8 tokens of its context"):
        adapter(path=checkpoints.path("mistral3_short")).load()


def test_a_sliding_window_is_refused(checkpoints: Any) -> None:
    with pytest.raises(ModelError, match="a sliding window of 8 tokens"):
        adapter(path=checkpoints.path("mistral3_sliding")).load()


@pytest.mark.parametrize("room", [120, 80])
def test_a_short_context_is_probed_with_fewer_images(checkpoints: Any, tmp_path: Path, room: int) -> None:
    loaded = adapter(path=checkpoints.path("mistral3"))
    loaded.save(loaded.load(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = room
    path.write_text(json.dumps(config))
    adapter(path=str(tmp_path)).load()


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    before, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model = adapter().load()
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    bare = adapter().scratch_model()
    assert not torch.equal(drawn, before)
    assert torch.equal(drawn, torch.get_rng_state()), "only the weights are drawn"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, numpy)
    assert [module.training for module in model.modules()] == [module.training for module in bare.modules()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


PARTS = {
    "tiny": ("model.vision_tower.", "model.multi_modal_projector.", ("model.language_model.", "lm_head.")),
    "llava_onevision": (
        "model.vision_tower.",
        ("model.multi_modal_projector.", "model.image_newline"),
        ("model.language_model.", "lm_head."),
    ),
    "smolvlm": ("model.vision_model.", "model.connector.", ("model.text_model.", "lm_head.")),
    "mistral3": ("model.vision_tower.", "model.multi_modal_projector.", ("model.language_model.", "lm_head.")),
}


@pytest.mark.parametrize("family", PARTS)
def test_every_weight_belongs_to_its_part(checkpoints: Any, family: str) -> None:
    loaded = adapter() if family == "tiny" else adapter(path=checkpoints.path(family))
    model = loaded.load()
    vision, connector, language = PARTS[family]
    found = {name: loaded.part_of(name) for name, _ in model.named_parameters()}
    assert set(found.values()) == {"vision", "connector", "language"}
    for name, part in found.items():
        begin = {"vision": vision, "connector": connector, "language": language}[part]
        assert name.startswith(begin), (name, part)


def test_a_merger_inside_the_vision_part_connects(checkpoints: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoints.path("qwen2_vl"))
    parts = beginnings(model)
    found = {name: part_of(name, parts) for name, _ in model.named_parameters()}
    for name, part in found.items():
        visual = "connector" if ".merger." in name else "vision"
        assert part == (visual if name.startswith("model.visual.") else "language"), name
    assert set(found.values()) == {"vision", "connector", "language"}


def test_no_token_that_frames_an_image_can_be_sampled(checkpoints: Any) -> None:
    loaded = adapter(path=checkpoints.path("smolvlm"))
    loaded.load()
    names = set(loaded.tokenizer.convert_ids_to_tokens(list(loaded.forbidden_tokens)))
    assert {"<image>", "<fake_token_around_image>", "<global-img>", "<row_2_col_2>", "<pad>"} <= names
    assert "<eot>" not in names


def test_pixels_that_a_model_would_take_for_padding_are_refused(checkpoints: Any) -> None:
    loaded = adapter(path=checkpoints.path("smolvlm"))
    loaded.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"night\.png: its pixels become exactly 0"):
        loaded.preprocess(Image(np.zeros((64, 64, 3), np.uint8), "night.png"))


def test_a_chat_template_without_ends_of_turns_is_for_one_turn(checkpoints: Any) -> None:
    loaded = adapter(path=checkpoints.path("llava_of_one_turn"))
    loaded.load()
    with pytest.raises(ModelError, match=r"set task\.history to 1"):
        loaded.render([Message.user("And now?")], (), continues=True)


# What is no model for it


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^model {tmp_path}: the directory holds no config\.json"):
        adapter(path=str(tmp_path))


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^model {tmp_path / 'nowhere'}: cannot be loaded"):
        adapter(path=str(tmp_path / "nowhere"))


def test_a_model_without_images(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a 'llama', whose config\.json names no image_token_id"):
        adapter(path=str(tmp_path))


def test_a_checkpoint_without_a_chat_template(checkpoints: Any, tmp_path: Path) -> None:
    loaded = adapter(path=checkpoints.path("mistral3"))
    loaded.save(loaded.load(), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="its processor, a PixtralProcessor, has no chat_template"):
        adapter(path=str(tmp_path))
