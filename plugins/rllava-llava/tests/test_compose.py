"""A vision tower and a language model become a LLaVA, and stay what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionModel,
)

from rllava_core.cli import rllava
from rllava_core.errors import ModelError
from rllava_core.mdp.messages import Message
from rllava_core.policy.adapter import Part
from rllava_llava.resampler import ResampledLlava

PATCHES = {"clip": 16, "siglip": 16, "dinov2": 16, "dinov2_with_registers": 20}
"""Of 32×32 pixels in patches of 8; LLaVA leaves out the class token, and keeps registers."""


@pytest.mark.parametrize("connector", ["mlp", "linear", "resampler"])
@pytest.mark.parametrize("vision", PATCHES)
def test_every_image_has_as_many_tokens_as_the_model_makes_features(
    bench: Any, towers: Any, vision: str, connector: str
) -> None:
    adapter = bench.adapter(compose=towers.compose(vision, connector=connector, queries=5))
    model = adapter.load()
    features = [adapter.preprocess(bench.picture(*size)) for size in [(8, 8), (64, 32), (200, 150)]]

    made = model.model.get_image_features(**adapter.collate(features)).pooler_output

    expected = 5 if connector == "resampler" else PATCHES[vision]
    assert [len(item) for item in made] == [adapter.feature_count(item) for item in features] == [expected] * 3
    assert isinstance(model, ResampledLlava if connector == "resampler" else LlavaForConditionalGeneration)


@pytest.mark.parametrize("language", ["qwen2", "llama"])
def test_text_alone_is_to_the_language_model_what_it_was(bench: Any, towers: Any, language: str) -> None:
    composed = towers.compose(language=language)
    alone = AutoModelForCausalLM.from_pretrained(composed["language"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(composed["language"])
    adapter = bench.adapter(compose=composed)
    model = adapter.load().eval()

    tokens = torch.tensor([adapter.render([Message.user("Two and two?")], [])])

    if language == "qwen2":
        told = [{"role": "user", "content": "Two and two?"}]
        assert tokens[0].tolist() == tokenizer.apply_chat_template(told, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        found, expected = model(input_ids=tokens).logits, alone(input_ids=tokens).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)


def test_the_vision_tower_is_what_it_was(bench: Any, towers: Any) -> None:
    composed = towers.compose("siglip", feature_layer=-1)
    tower = SiglipVisionModel.from_pretrained(composed["vision"]).eval()
    adapter = bench.adapter(compose=composed)
    model = adapter.load().eval()
    seen: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    media = adapter.collate([adapter.preprocess(bench.picture(40, 30))])

    with torch.no_grad():
        model.model.get_image_features(**media)
        expected = tower(**media, output_hidden_states=True).hidden_states[-1]

    assert torch.equal(seen[0], expected)


def test_a_linear_connector_is_linear(bench: Any, towers: Any) -> None:
    connector = bench.adapter(compose=towers.compose(connector="linear")).load().model.multi_modal_projector
    one, other = torch.randn(2, 7, 64)
    with torch.no_grad():
        found, zero = connector(one + other), connector(torch.zeros(7, 64))
        torch.testing.assert_close(found + zero, connector(one) + connector(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("connector", ["mlp", "linear"])
@pytest.mark.parametrize("language", ["qwen2", "llama"])
def test_transformers_loads_what_was_saved_and_computes_the_same_bits(
    bench: Any, towers: Any, tmp_path: Path, language: str, connector: str
) -> None:
    adapter = bench.adapter(compose=towers.compose("clip", language, connector=connector))
    model = adapter.load().eval()
    adapter.save(model, tmp_path / "saved")

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")

    assert isinstance(loaded, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    for name, messages in bench.conversations().items():
        features = [adapter.preprocess(image) for image in bench.images(messages)]
        expected = bench.processed(adapter, messages)
        adapter.processor, original = processor, adapter.processor
        inputs = bench.processed(adapter, messages)
        adapter.processor = original
        assert list(adapter.render(messages, features)) == inputs["input_ids"][0].tolist(), name
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[key], values) for key, values in expected.items())
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**expected).logits)


def test_a_few_steps_of_training_and_the_checkpoint_loads(bench: Any, towers: Any, tmp_path: Path) -> None:
    composed = towers.compose("clip", "llama", connector="resampler", queries=4)
    config = {
        "model": {"adapter": "llava", "compose": composed},
        "algorithm": {"name": "grpo", "group_size": 8},
        "task": {
            "dataset": {"name": "digits"},
            "prompt": "{question}",
            "choices": list("0123456789"),
            "rewards": [{"name": "exact_match"}],
        },
        "training": {"steps": 2, "prompts_per_step": 4, "eval_every": 0, "save_every": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))

    done = CliRunner().invoke(rllava, ["train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")])

    assert done.exit_code == 0, done.output
    first, second = sorted((tmp_path / "run" / "checkpoints").iterdir())
    adapter = bench.adapter(path=str(second))
    trained, before = adapter.load(), bench.adapter(path=str(first)).load().state_dict()
    assert isinstance(trained, ResampledLlava)
    changed = {name for name, values in trained.state_dict().items() if not torch.equal(values, before[name])}
    parts: set[Part] = {adapter.part_of(name) for name in changed}
    assert parts == {"vision", "connector", "language"}
    # Afterwards the checkpoint is all that is needed.
    shutil.rmtree(towers.root)
    assert CliRunner().invoke(rllava, ["eval", str(tmp_path / "run")]).exit_code == 0


def test_a_tokenizer_without_a_padding_token_is_given_one(bench: Any, towers: Any) -> None:
    adapter = bench.adapter(compose=towers.compose(language="llama"))
    adapter.load()
    assert adapter.tokenizer.convert_ids_to_tokens([adapter.pad_token, adapter.image_token]) == ["<pad>", "<image>"]
    assert adapter.forbidden_tokens == (adapter.image_token,)


def test_images_stand_in_the_text_where_they_stood_in_the_message(bench: Any, towers: Any) -> None:
    adapter = bench.adapter(compose=towers.compose())
    messages = [Message.user("Is ", bench.picture(8, 8), "like ", bench.picture(8, 8, 1), "this?")]
    features = [adapter.preprocess(image) for image in bench.images(messages)]
    text = adapter.tokenizer.decode(adapter.render(messages, features))
    image = "<image>" * 16
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        f"<|im_start|>user\nIs {image}\nlike {image}\nthis?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_language_model_without_a_template_is_given_one(bench: Any, towers: Any) -> None:
    adapter = bench.adapter(compose=towers.compose(language="llama"))
    adapter.load()
    told = [Message.user("Hi"), Message("assistant", Message.user("So?").parts), Message.user("Go.")]
    assert adapter.tokenizer.decode(adapter.render(told, [])) == "<s> USER: Hi ASSISTANT: So?</s>USER: Go. ASSISTANT:"


# What cannot be made


def test_a_directory_that_does_not_exist(bench: Any, towers: Any, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=rf"^compose\.vision {missing}: cannot be loaded"):
        bench.adapter(compose=towers.compose() | {"vision": missing})
    with pytest.raises(ModelError, match=rf"^compose\.language {missing}: cannot be loaded"):
        bench.adapter(compose=towers.compose() | {"language": missing})


def test_a_vision_tower_that_is_none(bench: Any, towers: Any) -> None:
    composed = towers.compose()
    with pytest.raises(ModelError, match=r"^compose\.vision .*: a 'qwen2'; expected one of clip, siglip, dinov2"):
        bench.adapter(compose=composed | {"vision": composed["language"]})


def test_a_language_model_that_is_none(bench: Any, towers: Any) -> None:
    composed = towers.compose()
    shutil.copytree(composed["language"], composed["language"] + "-none")
    config = Path(composed["language"] + "-none") / "config.json"
    config.write_text((Path(composed["vision"]) / "config.json").read_text())
    adapter = bench.adapter(compose=composed | {"language": str(config.parent)})
    with pytest.raises(ModelError, match=r"^compose\.language .*: cannot be loaded"):
        adapter.load()


@pytest.mark.parametrize("kind", ["a cap", "a bias"])
def test_a_head_that_llava_does_not_have(bench: Any, towers: Any, kind: str) -> None:
    composed = towers.compose()
    size = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"pad_token_id": 256, "eos_token_id": 258, "bos_token_id": 256}
    model: Any = PhiForCausalLM(PhiConfig(**size, intermediate_size=64, **ends))
    if kind == "a cap":
        more = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 0.5}
        model = Gemma2ForCausalLM(Gemma2Config(**size, **more, **ends, initializer_range=0.15))
    model.save_pretrained(composed["language"])
    with pytest.raises(ModelError, match=r"^compose\.language .*: a '(phi|gemma2)' does more with its logits"):
        bench.adapter(compose=composed, attention="eager").load()


def test_a_layer_that_the_tower_does_not_have(bench: Any, towers: Any) -> None:
    with pytest.raises(ModelError, match=r"^compose\.vision .*: has 2 layers, no layer -4"):
        bench.adapter(compose=towers.compose(feature_layer=-4))


def test_a_gguf_file_that_is_not_there(bench: Any, towers: Any) -> None:
    with pytest.raises(ModelError, match=r"^compose\.language .*: cannot be loaded"):
        bench.adapter(compose=towers.compose(language_file="small.gguf"))


@pytest.mark.parametrize(("part", "name"), [("vision", "encoder.layers.1"), ("language", "layers.1.mlp.up_proj")])
def test_weights_that_are_missing_are_not_made_up(bench: Any, towers: Any, part: str, name: str) -> None:
    composed = towers.compose("clip")
    path = Path(composed[part]) / "model.safetensors"
    kept = {key: values for key, values in load_file(path).items() if name not in key}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"compose\.{part} .*missing: .*{name}"):
        bench.adapter(compose=composed).load()
