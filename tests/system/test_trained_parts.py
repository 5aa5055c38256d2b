"""`model.train`: what it names is trained, in full or by low-rank adapters; the rest stays bitwise as it was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from rllava_core.cli import rllava
from rllava_core.config import load
from rllava_core.plugins import load_plugins
from rllava_core.policy.trained import checkpoint_weights, save_model
from rllava_core.training.build import build_parts

STEPS = 10

CONFIG: dict[str, Any] = {
    "model": {"adapter": "qwen2vl", "from_scratch": "tiny"},
    "algorithm": {"name": "grpo", "group_size": 4, "entropy_coefficient": 0.01},
    "task": {
        "dataset": {"name": "digits"},
        "prompt": "{question}",
        "choices": list("0123456789"),
        "rewards": [{"name": "exact_match"}],
    },
    "training": {
        "steps": STEPS,
        "prompts_per_step": 4,
        "eval_every": 0,
        "eval_episodes": 20,
        "save_every": 5,
        "seed": 1,
    },
}

LANGUAGE = {"vision": "frozen", "connector": "frozen", "language": "lora"}
EVERYWHERE = {"vision": "lora", "connector": "lora", "language": "lora"}
MIXED = {"vision": "frozen", "connector": "full", "language": "lora"}
SEEING = {"vision": "frozen"}
FROZEN = {"vision": "frozen", "connector": "frozen"}
QUANTIZED = {"quantization": "nf4"}


@pytest.fixture(autouse=True)
def _peft() -> None:
    pytest.importorskip("peft", reason="peft is not installed")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(rllava, [str(argument) for argument in arguments])


def write(directory: Path, train: dict[str, str], **changes: Any) -> Path:
    path = directory / "task.yaml"
    config = {**CONFIG, **changes}
    lora = {"lora": {"rank": 4}} if "lora" in train.values() else {}
    config["model"] = {**CONFIG["model"], "train": train, **lora, **changes.get("model", {})}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def first_weights(config: Path) -> tuple[dict[str, Tensor], set[str], Any]:
    """Of the model that training begins with: its weights, those of them that are linear layers', its adapter."""
    path = config.with_name("plain.yaml")
    plain = yaml.safe_load(config.read_text(encoding="utf-8"))
    for key in ("train", "lora", "quantization"):
        plain["model"].pop(key, None)
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    with build_parts(load(path, (), load_plugins())) as parts:
        model = parts.policy.model
        head = parts.adapter.lm_head(model)
        linear = {
            f"{name}.weight" for name, item in model.named_modules() if isinstance(item, nn.Linear) and item is not head
        }
        return {name: item.detach().clone() for name, item in model.named_parameters()}, linear, parts.adapter


def last_checkpoint(directory: Path) -> Path:
    return directory / "checkpoints" / f"step-{STEPS:06d}"


@pytest.mark.parametrize(
    ("adapter", "preset"),
    [("qwen2vl", "tiny-qwen3"), ("llava", "tiny-next"), ("smolvlm", "tiny")],
)
def test_what_is_frozen_sees_each_image_once(adapter: str, preset: str, tmp_path: Path) -> None:
    """As in the run in which it sees them in every pass; and where nothing can be kept, to the last bit."""
    algorithm = {**CONFIG["algorithm"], "kl_coefficient": 0.01}
    training = {**CONFIG["training"], "steps": 3}
    model = {"adapter": adapter, "from_scratch": preset}
    config = write(tmp_path, FROZEN, model=model, algorithm=algorithm, training=training)
    metrics, facts = {}, {}
    for kept in (2**30, 1, 0):
        directory = tmp_path / f"{kept}"
        done = run("train", config, f"model.encoded_bytes={kept}", "--run-dir", directory)
        assert done.exit_code == 0, done.output
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics[kept] = [
            {name: value for name, value in json.loads(line).items() if not name.startswith("time/")} for line in lines
        ]
        facts[kept] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["images"]

    assert facts == {2**30: "encoded once", 1: "encoded once", 0: "encoded in every pass"}
    assert metrics[1] == metrics[2**30]
    for found, expected in zip(metrics[2**30], metrics[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_images_are_encoded_where_layers_under_adapters_are_computed_again(tmp_path: Path) -> None:
    """transformers then lets what is embedded want gradients, though no weight is there to have one."""
    training = {**CONFIG["training"], "steps": 2}
    recomputed = {"train": {"name": "local", "checkpoint_activations": True}}
    config = write(tmp_path, LANGUAGE, training=training, engine=recomputed)
    norms = []
    for kept in (2**30, 0):
        done = run("train", config, f"model.encoded_bytes={kept}", "--run-dir", tmp_path / f"{kept}")
        assert done.exit_code == 0, done.output
        lines = (tmp_path / f"{kept}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        norms.append([json.loads(line)["policy/grad_norm"] for line in lines[1:]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert all(norms[0])


def test_what_is_trained_sees_images_in_every_pass(tmp_path: Path) -> None:
    for train in (SEEING, {"vision": "lora", "connector": "frozen"}):
        config = write(tmp_path, train, training={**CONFIG["training"], "steps": 1})
        done = run("train", config, "--run-dir", tmp_path / train["vision"])
        assert done.exit_code == 0, done.output
        manifest = json.loads((tmp_path / train["vision"] / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["images"] == "encoded in every pass"


@pytest.mark.parametrize(
    ("train", "further"),
    [(LANGUAGE, {}), (EVERYWHERE, {}), (MIXED, {}), (MIXED, QUANTIZED), (SEEING, {})],
    ids=["language", "all", "mixed", "quantized", "frozen"],
)
def test_exactly_what_is_trained_changes(train: dict[str, str], further: dict[str, Any], tmp_path: Path) -> None:
    if further:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = write(tmp_path, train, model=further)
    before, linear, adapter = first_weights(config)

    done = run("train", config, "--run-dir", tmp_path / "run")

    assert done.exit_code == 0, done.output
    checkpoint = last_checkpoint(tmp_path / "run")
    after = dict(AutoModelForImageTextToText.from_pretrained(checkpoint).named_parameters())
    assert after.keys() == before.keys()
    seen = set()
    for name, values in before.items():
        way = train.get(adapter.part_of(name), "full")
        changes = way == "full" or (way == "lora" and name in linear)
        assert torch.equal(after[name], values) is not changes, (name, way)
        seen.add((way, changes))
    assert len(seen) >= 2, "a test of nothing"
    adapters = checkpoint / "adapter" / "adapter_model.safetensors"
    assert adapters.is_file() == ("lora" in train.values())
    if adapters.is_file():
        names = [name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for name in load_file(adapters)]
        assert set(names) == {name for name in linear if train.get(adapter.part_of(name)) == "lora"}


@pytest.mark.parametrize(
    ("algorithm", "train", "further"),
    [("grpo", MIXED, {}), ("grpo", LANGUAGE, {}), ("grpo", MIXED, QUANTIZED), ("ppo", MIXED, {})],
    ids=["grpo", "grpo encoded", "grpo quantized", "ppo"],
)
def test_a_run_with_adapters_is_resumed_exactly(
    algorithm: str, train: dict[str, str], further: dict[str, Any], tmp_path: Path
) -> None:
    """With a reference policy, with images that are encoded once, and with a critic that has adapters of its own."""
    chosen = {
        "grpo": {"name": "grpo", "group_size": 4, "kl_coefficient": 0.1},
        "ppo": {"name": "ppo", "group_size": 4, "kl_coefficient": 0.1, "critic": "separate"},
    }[algorithm]
    pytest.importorskip(f"rllava_{algorithm}", reason=f"rllava-{algorithm} is not installed")
    if further:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = write(tmp_path, train, algorithm=chosen, model=further)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", config, "--run-dir", whole)
    assert done.exit_code == 0, done.output
    shutil.copytree(whole, cut)
    shutil.rmtree(last_checkpoint(cut))
    (cut / "summary.json").unlink()

    resumed = run("train", config, "--run-dir", cut, "--resume")

    assert resumed.exit_code == 0, resumed.output
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "resume/policy.safetensors",
        "resume/state.safetensors",
    ):
        ours, theirs = (last_checkpoint(directory) / name for directory in (cut, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_an_evaluation_of_a_run_with_adapters_finds_what_the_run_found(tmp_path: Path) -> None:
    """`rllava eval` reads the merged weights, as anyone would."""
    training = {**CONFIG["training"], "eval_every": STEPS}
    config = write(tmp_path, {"language": "lora"}, training=training)
    assert run("train", config, "--run-dir", tmp_path / "run").exit_code == 0

    done = run("eval", tmp_path / "run")

    assert done.exit_code == 0, done.output
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(metrics[-1])
    answers = (tmp_path / "run" / "eval" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(json.loads(line)["success"] for line in answers) / 20 == last["eval/success_rate"]


def test_a_separate_critic_with_adapters_is_left_out_of_an_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("rllava_ppo", reason="rllava-ppo is not installed")
    config = write(tmp_path, MIXED, algorithm={"name": "ppo", "group_size": 4, "critic": "separate"})
    assert run("train", config, "--run-dir", tmp_path / "run").exit_code == 0

    done = run("eval", tmp_path / "run")

    assert done.exit_code == 0, done.output


def test_adapters_are_trained_in_full_precision(tmp_path: Path) -> None:
    """In bfloat16 most of their steps would be rounded away."""
    config = write(tmp_path, EVERYWHERE, model={"dtype": "bfloat16", "train": EVERYWHERE})
    with build_parts(load(config, (), load_plugins())) as parts:
        kinds = {name: item.dtype for name, item in parts.policy.model.named_parameters()}
    assert {kinds[name] for name in kinds if ".lora_" in name} == {torch.float32}
    assert {kinds[name] for name in kinds if ".base_layer." in name} == {torch.bfloat16}
    done = run("train", config, "training.steps=1", "--run-dir", tmp_path / "run")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_layers_take_a_half_byte_a_weight_and_a_merged_checkpoint_computes_what_they_do(
    dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # Of the layers, one kind has adapters and the others are quantized alone.
    model = {"train": LANGUAGE, "lora": {"rank": 4, "targets": ["q_proj"]}, "dtype": dtype, **QUANTIZED}
    config = write(tmp_path, LANGUAGE, model=model)
    torch.manual_seed(0)
    with build_parts(load(config, (), load_plugins())) as parts:
        held = parts.policy.model
        for name, item in held.named_parameters():
            if ".lora_B" in name:  # zero at first
                torch.nn.init.normal_(item, std=0.1)
        layers = [item for name, item in held.named_modules() if type(item).__name__ == "Linear4bit"]
        plain = [item for item in layers if not hasattr(item, "lora_A")]
        assert len(plain) == 7 * held.config.get_text_config().num_hidden_layers
        for layer in plain:
            state = layer.weight.quant_state
            scales = state.absmax.nbytes
            assert layer.weight.nbytes + scales <= (0.5 + 1 / 64) * layer.in_features * layer.out_features + 8
        save_model(held, tmp_path / "saved", parts.adapter)
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=dtype).eval()
        tokens = torch.randint(0, 250, (2, 12))
        with torch.no_grad():
            gap = (held(input_ids=tokens).logits - saved(input_ids=tokens).logits).abs().max()
    assert gap < {"float32": 1e-5, "bfloat16": 0.1}[dtype]  # of logits of up to 4.7


@pytest.mark.parametrize("model", [{}, {"train": MIXED}, {"train": EVERYWHERE, "lora": {"dora": True}}, QUANTIZED])
def test_the_weights_of_a_checkpoint_can_be_read_without_one(model: dict[str, Any], tmp_path: Path) -> None:
    """By an engine that has a model of its own: adapters merged, nothing quantized, no second copy of the others."""
    if "quantization" in model:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = write(tmp_path, LANGUAGE if model is QUANTIZED else {}, model=model)
    with build_parts(load(config, (), load_plugins())) as parts:
        held = parts.policy.model
        for name, item in held.named_parameters():
            if ".lora_B" in name:  # zero at first
                torch.nn.init.normal_(item, std=0.1)
        found = dict(checkpoint_weights(held))
        save_model(held, tmp_path / "saved", parts.adapter)
        own = {name: item for name, item in held.named_parameters() if not hasattr(item, "quant_state")}
    saved = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").named_parameters())
    assert found.keys() == saved.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, saved[name].detach(), rtol=0, atol=1e-6)
        assert name not in own or values.data_ptr() == own[name].data_ptr()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_copies_share_what_is_not_trained(quantization: str, tmp_path: Path) -> None:
    """The reference policy of a model with adapters is the base: it costs its own adapters, and no more."""
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    algorithm = {"name": "grpo", "group_size": 4, "kl_coefficient": 0.1}
    config = write(tmp_path, EVERYWHERE, algorithm=algorithm, model={"quantization": quantization})
    with build_parts(load(config, (), load_plugins())) as parts:
        reference = parts.trainer._copies["reference"]  # type: ignore[attr-defined]
        ours = dict(parts.policy.named_parameters())
        trained = {name for name, item in ours.items() if item.requires_grad}
        for name, item in reference.named_parameters():
            assert (item is ours[name]) == (name not in trained), name
        assert all(".lora_" in name for name in trained)
        size = sum(item.numel() for item in ours.values())
        assert quantization != "none" or sum(ours[name].numel() for name in trained) < 0.2 * size


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"train": {"vision": "frozen", "connector": "frozen", "language": "frozen"}}, "there is nothing to train"),
        ({"train": {"language": "lora"}, "lora": {"targets": ["query"]}}, "no linear layer named query"),
        ({"train": {"vison": "lora"}}, "vison"),
        ({"train": {"vision": "half"}}, "'full', 'lora' or 'frozen'"),
        ({"lora": {"rank": 0}}, "model.lora.rank"),
        ({"train": {}, "lora": {"rank": 8}}, "train asks for it in no part"),
        ({"quantization": "nf4"}, "what is quantized cannot be trained itself"),
        ({"quantization": "int4"}, "'none' or 'nf4'"),
        ({"train": LANGUAGE, "lora": {"dora": True}, "quantization": "nf4"}, "lora.dora needs weights that are not"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_message(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = write(tmp_path, {}, model=model)

    done = run("train", config, "--run-dir", tmp_path / "run")

    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("missing", "model", "extra"), [("peft", {}, "lora"), ("bitsandbytes", QUANTIZED, "qlora")], ids=["lora", "qlora"]
)
def test_what_is_not_installed(
    missing: str, model: dict[str, Any], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.nn", None)
    config = write(tmp_path, {"language": "lora"}, model=model)

    done = run("train", config, "--run-dir", tmp_path / "run")

    assert done.exit_code == 2, done.output
    assert f"pip install 'rllava-core[{extra}]'" in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()


def test_a_part_that_the_model_has_not(tmp_path: Path) -> None:
    config = write(tmp_path, {"connector": "frozen"}, model={"adapter": "toy"})

    done = run("train", config, "--run-dir", tmp_path / "run")

    assert done.exit_code == 2, done.output
    assert "model.train.connector is 'frozen', and this model has no connector part" in " ".join(done.output.split())
