"""What is saved is a transformers checkpoint, and transformers' own are loaded; what cannot be is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from rllava_core.errors import ModelError
from rllava_llava.tiny import tiny_model, tiny_processor

PRESETS = ("tiny", "tiny-next", "tiny-onevision")


def require_equal(bench: Any, adapter: Any, model: Any, loaded: Any, processor: Any) -> None:
    """The adapter with its model, and a model and a processor of transformers alone, make the same of everything."""
    assert type(loaded) is type(model)
    for name, messages in bench.conversations().items():
        features = [adapter.preprocess(image) for image in bench.images(messages)]
        own, adapter.processor = adapter.processor, processor
        inputs = bench.processed(adapter, messages)
        adapter.processor = own
        tokens = torch.tensor([adapter.render(messages, features)])
        assert torch.equal(tokens, inputs["input_ids"]), name
        media = adapter.collate(features) if features else {}
        with torch.no_grad():
            expected = loaded(**inputs).logits
            assert torch.equal(model(**bench.processed(adapter, messages)).logits, expected), name
            found = model(input_ids=tokens, **media).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_loads_what_the_adapter_saved(bench: Any, tmp_path: Path, preset: str) -> None:
    adapter = bench.adapter(preset)
    model = adapter.load().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save(model, tmp_path)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()

    require_equal(bench, adapter, model, loaded, AutoProcessor.from_pretrained(tmp_path))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_adapter_loads_what_transformers_saved(bench: Any, tmp_path: Path, preset: str) -> None:
    processor = tiny_processor(preset)
    model = tiny_model(preset, processor.tokenizer).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    adapter = bench.adapter(path=str(tmp_path))

    require_equal(bench, adapter, adapter.load().eval(), model, processor)


def test_generate_of_the_checkpoint_never_draws_a_placeholder(bench: Any, tmp_path: Path) -> None:
    adapter = bench.adapter("tiny-onevision")
    adapter.save(adapter.load(), tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    forbidden = [adapter.tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>")]
    assert saved["suppress_tokens"] == list(adapter.forbidden_tokens) == forbidden
    assert saved["eos_token_id"] == adapter.end_of_turn[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_checkpoint_loads_with_the_attention_asked_for(
    bench: Any, towers: Any, tmp_path: Path, attention: str
) -> None:
    adapter = bench.adapter(compose=towers.compose(connector="resampler"), attention=attention)
    model = adapter.load()
    adapter.save(model, tmp_path / "saved")
    loaded = bench.adapter(path=str(tmp_path / "saved"), attention=attention).load()
    for each in (model, loaded):
        tower = each.model.vision_tower.config
        configs = (each.config, each.config.get_text_config(), each.model.language_model.config, tower)
        assert {config._attn_implementation for config in configs} == {attention}


# What cannot be loaded


def test_a_path_that_does_not_exist(bench: Any, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ModelError, match=f"^model {missing}: cannot be loaded"):
        bench.adapter(path=str(missing))


def test_a_directory_without_a_model(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^model {tmp_path}: the directory holds no config\.json"):
        bench.adapter(path=str(tmp_path))


def test_a_model_of_another_family(bench: Any, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"^model {tmp_path}: a 'llama'; this adapter loads 'llava', 'llava_next'"):
        bench.adapter(path=str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "not json"])
def test_a_damaged_config(bench: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=f"^model {tmp_path}: cannot be loaded"):
        bench.adapter(path=str(tmp_path))


def test_an_old_processor_that_cannot_count_the_tokens_of_an_image(bench: Any, tmp_path: Path) -> None:
    """As LLaVA's checkpoints had them at first."""
    adapter = bench.adapter()
    adapter.save(adapter.load(), tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": None}))
    with pytest.raises(ModelError, match=r"processor_config\.json says no patch_size"):
        bench.adapter(path=str(tmp_path))


@pytest.mark.parametrize("connector", ["mlp", "resampler"])
def test_weights_that_are_missing_are_not_made_up(bench: Any, towers: Any, tmp_path: Path, connector: str) -> None:
    adapter = bench.adapter(compose=towers.compose(connector=connector))
    adapter.save(adapter.load(), tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    kept = {name: values for name, values in load_file(path).items() if "multi_modal_projector" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^model {path.parent}: weights .*missing.*multi_modal_projector"):
        bench.adapter(path=str(path.parent)).load()
