"""What is saved is a transformers checkpoint; what cannot be loaded is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from rllava_core.errors import ModelError
from rllava_core.mdp.messages import Message


@pytest.fixture
def checkpoint(bench: Any, tmp_path: Path) -> Path:
    """The tiny model, saved by the adapter."""
    torch.manual_seed(3)
    adapter = bench.adapter()
    adapter.save(adapter.load(), tmp_path / "model")
    return tmp_path / "model"


def test_transformers_loads_what_was_saved_and_computes_the_same_bits(bench: Any, tmp_path: Path) -> None:
    adapter = bench.adapter()
    model = adapter.load().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save(model, tmp_path)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)

    assert isinstance(loaded, Qwen2VLForConditionalGeneration)
    assert isinstance(processor, Qwen2VLProcessor)
    for messages in bench.conversations().values():
        expected = bench.processed(adapter, messages)
        adapter.processor, original = processor, adapter.processor
        inputs = bench.processed(adapter, messages)
        adapter.processor = original
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], values) for name, values in expected.items())
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**expected).logits)


@pytest.mark.parametrize("preset", ["tiny-qwen2.5", "tiny-qwen3", "tiny-qwen3-moe"])
def test_the_later_families_go_to_transformers_and_come_back(bench: Any, preset: str, tmp_path: Path) -> None:
    adapter = bench.adapter(from_scratch=preset)
    model = adapter.load().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save(model, tmp_path / "ours")

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    again = bench.adapter(path=str(tmp_path / "theirs"))
    back = again.load().eval()

    assert type(loaded) is type(model) is type(back)
    assert type(processor) is type(adapter.processor)
    for messages in bench.conversations().values():
        inputs = bench.processed(adapter, messages)
        theirs = bench.processed(again, messages)
        assert set(inputs) == set(theirs)
        assert all(torch.equal(theirs[name], values) for name, values in inputs.items())
        with torch.no_grad():
            expected = model(**inputs).logits
            assert torch.equal(loaded(**inputs).logits, expected)
            assert torch.equal(back(**inputs).logits, expected)


def test_the_checkpoint_holds_safetensors_and_no_pickle(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)


def test_generate_of_the_checkpoint_never_draws_a_placeholder(bench: Any, checkpoint: Path) -> None:
    adapter = bench.adapter()
    adapter.load()
    saved = json.loads((checkpoint / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == list(adapter.forbidden_tokens)
    assert saved["eos_token_id"] == adapter.end_of_turn[0]


def test_the_adapter_loads_what_it_saved(bench: Any, checkpoint: Path) -> None:
    original = AutoModelForImageTextToText.from_pretrained(checkpoint)
    adapter, fresh = bench.adapter(path=str(checkpoint)), bench.adapter()
    model = adapter.load()
    fresh.load()

    assert all(torch.equal(values, original.state_dict()[name]) for name, values in model.state_dict().items())
    for name in ("pad_token", "end_of_turn", "image_token", "forbidden_tokens", "context_length", "merge"):
        assert getattr(adapter, name) == getattr(fresh, name), name
    for messages in bench.conversations().values():
        assert bench.prompt(adapter, *messages) == bench.prompt(fresh, *messages)
    picture = bench.picture(33, 47)
    for name, values in fresh.preprocess(picture).items():
        assert torch.equal(adapter.preprocess(picture)[name], values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_loads_in_the_precision_asked_for(bench: Any, checkpoint: Path, dtype: str) -> None:
    model = bench.adapter(path=str(checkpoint), dtype=dtype).load()
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_a_checkpoint_loads_with_the_attention_asked_for(bench: Any, checkpoint: Path) -> None:
    for attention in ("sdpa", "eager"):
        model = bench.adapter(path=str(checkpoint), attention=attention).load()
        assert model.config._attn_implementation == attention


def test_every_end_of_turn_of_the_generation_config_counts(bench: Any, checkpoint: Path) -> None:
    path = checkpoint / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [272, 274]}))

    adapter = bench.adapter(path=str(checkpoint))
    adapter.load()

    # The first is the tokenizer's own, which the chat template writes, so that the core can end a turn that was cut.
    assert adapter.end_of_turn == (adapter.tokenizer.eos_token_id, 272) == (274, 272)


def test_ids_without_a_token_may_not_be_sampled(bench: Any, checkpoint: Path) -> None:
    """Real checkpoints pad the vocabulary: 152,064 rows for 151,657 tokens."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.resize_token_embeddings(300)
    model.save_pretrained(checkpoint)

    policy = bench.policy(path=str(checkpoint))

    assert set(range(280, 300)) <= set(policy.adapter.forbidden_tokens)
    assert policy.forbidden.shape == (300,)
    assert policy.forbidden[280:].all()
    assert not policy.forbidden[:272].any()


def test_a_random_model_follows_the_seed(bench: Any) -> None:
    first, again = bench.policy().model, bench.policy().model
    torch.manual_seed(1)
    other = bench.adapter().load()
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


# What cannot be loaded


def test_a_path_that_does_not_exist(bench: Any, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ModelError, match=f"model {missing}: "):
        bench.adapter(path=str(missing))


def test_a_directory_without_a_model(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"model {tmp_path}: the directory holds no config\.json"):
        bench.adapter(path=str(tmp_path))


def test_a_model_of_another_family(bench: Any, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"model {tmp_path}: a 'llama'; this adapter loads 'qwen2_vl'"):
        bench.adapter(path=str(tmp_path))


def test_a_family_that_transformers_does_not_know(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv9_vl"}')
    with pytest.raises(ModelError, match=f"model {tmp_path}: .*rwkv9_vl"):
        bench.adapter(path=str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["", "{", "not json"])
def test_a_damaged_file_beside_the_weights(bench: Any, checkpoint: Path, name: str, content: str) -> None:
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_text(content)
    with pytest.raises(ModelError, match=f"model {checkpoint}: "):
        bench.adapter(path=str(checkpoint))


def test_a_tokenizer_that_is_missing(bench: Any, checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=f"model {checkpoint}: "):
        bench.adapter(path=str(checkpoint))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, garbage, empty, Path.unlink])
def test_damaged_weights(bench: Any, checkpoint: Path, damage: Any) -> None:
    damage(checkpoint / "model.safetensors")
    adapter = bench.adapter(path=str(checkpoint))
    with pytest.raises(ModelError, match=f"model {checkpoint}: cannot be loaded"):
        adapter.load()


def test_weights_of_another_shape(bench: Any, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] = 96
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"model {checkpoint}: .*missing or differ: .*mlp.* and 3 more"):
        bench.adapter(path=str(checkpoint)).load()


def without(checkpoint: Path, ending: str) -> None:
    """Take one tensor out of the weights."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    [name] = [name for name in weights if name.endswith(ending)]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_missing_are_not_made_up(bench: Any, checkpoint: Path, name: str) -> None:
    """transformers would fill them with random numbers and go on."""
    without(checkpoint, name)
    with pytest.raises(ModelError, match=f"model {checkpoint}: .*missing or differ: .*{name}"):
        bench.adapter(path=str(checkpoint)).load()


def test_a_language_head_that_is_the_embedding_is_not_missing(bench: Any, checkpoint: Path) -> None:
    """The smaller models of the family tie the two and save one."""
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    without(checkpoint, "lm_head.weight")

    policy = bench.policy(path=str(checkpoint))

    model = policy.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    trajectories = bench.trajectories(policy.adapter)
    with torch.no_grad():
        expected = torch.cat([bench.plain_decisions(policy, trajectory)[0] for trajectory in trajectories])
        found = policy(bench.pack(policy, trajectories)).logprobs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    policy.adapter.save(model, checkpoint.with_name("again"))
    again = bench.adapter(path=str(checkpoint.with_name("again"))).load()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_tokenizer_without_the_image_token(bench: Any, checkpoint: Path) -> None:
    for path in checkpoint.glob("*token*"):
        path.write_text(path.read_text().replace("<|image_pad|>", "<|picture|>"))
    with pytest.raises(ModelError, match=r"no token '<\|image_pad\|>'; is it one of qwen2_vl, "):
        bench.adapter(path=str(checkpoint))


def test_a_tokenizer_with_more_tokens_than_the_model(bench: Any, checkpoint: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    processor.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match="the tokenizer has 281 tokens, the model 280"):
        bench.adapter(path=str(checkpoint)).load()


def test_a_conversation_is_still_rendered_after_a_round_trip_of_a_checkpoint(bench: Any, checkpoint: Path) -> None:
    """Save, load, save, load: nothing is lost on the way."""
    second = bench.adapter(path=str(checkpoint))
    second.save(second.load(), checkpoint.with_name("again"))
    third = bench.adapter(path=str(checkpoint.with_name("again")))

    message = Message.user("Is ", bench.picture(64, 32), " it?")
    assert bench.prompt(third, message) == bench.prompt(bench.adapter(), message)
    expected = second.load().state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in third.load().state_dict().items())
