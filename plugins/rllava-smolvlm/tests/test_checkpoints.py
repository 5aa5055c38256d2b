"""Checkpoints are those of transformers, both ways; what cannot be loaded is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)

from rllava_core.errors import ModelError

FAMILIES = {
    "tiny": (SmolVLMForConditionalGeneration, SmolVLMProcessor),
    "tiny-idefics3": (Idefics3ForConditionalGeneration, Idefics3Processor),
}


@pytest.fixture
def checkpoint(bench: Any, tmp_path: Path) -> Path:
    """The tiny SmolVLM, saved by the adapter."""
    torch.manual_seed(3)
    adapter = bench.adapter()
    adapter.save(adapter.load(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("preset", FAMILIES)
def test_transformers_loads_what_was_saved_and_computes_the_same_bits(
    bench: Any, tmp_path: Path, preset: str, split: bool
) -> None:
    adapter = bench.adapter(from_scratch=preset, split_images=split)
    model = adapter.load().eval()
    adapter.save(model, tmp_path)

    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)

    assert (type(loaded), type(processor)) == FAMILIES[preset]
    for messages in bench.conversations().values():
        tokens, features = bench.rendered(adapter, messages)
        inputs = bench.processed(processor, messages)
        assert inputs["input_ids"][0].tolist() == tokens
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokens]), **(adapter.collate(features) if features else {})).logits
            assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_adapter_loads_what_transformers_saved(bench: Any, tmp_path: Path, preset: str) -> None:
    fresh = bench.adapter(from_scratch=preset)
    model = fresh.load().eval()
    model.save_pretrained(tmp_path)
    fresh.processor.save_pretrained(tmp_path)

    adapter = bench.adapter(path=str(tmp_path))
    loaded = adapter.load().eval()

    for name in ("pad_token", "end_of_turn", "image_token", "forbidden_tokens", "context_length"):
        assert getattr(adapter, name) == getattr(fresh, name), name
    for messages in bench.conversations().values():
        tokens, features = bench.rendered(adapter, messages)
        inputs = bench.processed(fresh.processor, messages)
        assert tokens == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            found = loaded(input_ids=torch.tensor([tokens]), **(adapter.collate(features) if features else {})).logits
            assert torch.equal(found, model(**inputs).logits)


def test_tiles_are_those_of_the_processor_that_is_saved(bench: Any, tmp_path: Path) -> None:
    adapter = bench.adapter(split_images=True, longest_edge=96)
    adapter.save(adapter.load(), tmp_path)
    picture = bench.picture(40, 20)

    again = bench.adapter(path=str(tmp_path))
    whole = bench.adapter(path=str(tmp_path), split_images=False)

    assert again.preprocess(picture)["grid"].tolist() == [[2, 3]]
    assert whole.preprocess(picture)["grid"].tolist() == [[0, 0]]


def test_the_turn_ends_as_the_template_says_and_as_the_tokenizer_says(bench: Any, checkpoint: Path) -> None:
    """Idefics3's tokenizer is Llama's, whose end of a text is another token than that of an utterance."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.eos_token = "<|endoftext|>"
    processor.save_pretrained(checkpoint)

    adapter = bench.adapter(path=str(checkpoint))
    adapter.load()

    names = [adapter.tokenizer.convert_ids_to_tokens(token) for token in adapter.end_of_turn]
    assert names == ["<end_of_utterance>", "<|endoftext|>"]
    later = bench.conversations()["an image alone"]
    features = [adapter.preprocess(later[0].parts[0].image)]
    assert adapter.decode(adapter.render(later, features, continues=True)).startswith("\nUser:")


# What cannot be loaded


def test_a_path_that_does_not_exist(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model {tmp_path}/nowhere: "):
        bench.adapter(path=str(tmp_path / "nowhere"))


def test_a_directory_without_a_model(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"model {tmp_path}: the directory holds no config\.json"):
        bench.adapter(path=str(tmp_path))


def test_a_model_of_another_family(bench: Any, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"model {tmp_path}: a 'llama'; this adapter loads 'smolvlm', 'idefics3'"):
        bench.adapter(path=str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["", "{", "not json"])
def test_a_damaged_file_beside_the_weights(bench: Any, checkpoint: Path, name: str, content: str) -> None:
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_text(content)
    with pytest.raises(ModelError, match=f"model {checkpoint}: "):
        bench.adapter(path=str(checkpoint))


def test_damaged_weights(bench: Any, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"model {checkpoint}: cannot be loaded"):
        bench.adapter(path=str(checkpoint)).load()


def test_a_processor_that_writes_other_tiles_than_the_model_makes(bench: Any, checkpoint: Path) -> None:
    path = checkpoint / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_seq_len": 25}))
    with pytest.raises(ModelError, match=rf"model {checkpoint}: its processor writes 25 image tokens .* makes 16 of"):
        bench.adapter(path=str(checkpoint)).load()


def test_a_tokenizer_without_the_image_token(bench: Any, checkpoint: Path) -> None:
    for path in checkpoint.glob("*token*"):
        path.write_text(path.read_text().replace("<image>", "<picture>"))
    with pytest.raises(ModelError, match="no token '<image>'; is it one of smolvlm, idefics3"):
        bench.adapter(path=str(checkpoint))
