"""`rllava plan`: figures that add up, of every published model, and one clear message for what cannot be planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rllava_core.cli import rllava
from rllava_core.planning.published import find_model, published
from rllava_core.plugins import load_plugins

PARAMETERS = {
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2_246_784_880,
}
"""As their checkpoints hold them."""

IMAGE_TOKENS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 16 * 16,  # patches of 14, merged 2×2
    "Qwen/Qwen3-VL-2B-Instruct": 14 * 14,  # patches of 16
    "llava-hf/llava-1.5-7b-hf": 24 * 24,  # always 336×336 in patches of 14
    "HuggingFaceTB/SmolVLM-Instruct": 17 * 81,  # 4×4 tiles and the whole
    "HuggingFaceTB/SmolVLM-256M-Instruct": 17 * 64,
}
"""Of 448×448 pixels."""

CONFIG = """\
model: {adapter: qwen2vl, from_scratch: tiny}
algorithm: {name: grpo, group_size: 4}
task:
  dataset: {name: digits}
  max_new_tokens: 8
  rewards: [{name: exact_match}]
engine: {train: {name: local, device: cpu}}
training: {steps: 3, prompts_per_step: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "task.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(rllava, ["plan", *map(str, arguments)])


def planned(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json", "--image", "32x32")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def phase(plan: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [item for item in plan["phases"] if item["name"] == name]
    assert isinstance(found, dict)
    return found


def words(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_published_shapes_have_the_published_number_of_parameters(hub_id: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    component, found = find_model(hub_id, load_plugins())
    assert found == hub_id
    config = AutoConfig.from_pretrained(published(component.load_config())[hub_id])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()

    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[hub_id]


@pytest.mark.parametrize("hub_id", IMAGE_TOKENS)
def test_images_become_as_many_tokens_as_the_family_makes_of_them(hub_id: str) -> None:
    import torch

    from rllava_core.config import Resolved
    from rllava_core.planning.shape import planned_adapter
    from rllava_core.planning.workload import Episodes, PlannedMedia, Workload

    component, _ = find_model(hub_id, load_plugins())
    options = component.load_config()(path=hub_id)  # type: ignore[misc]
    adapter = planned_adapter(Resolved(component, options))
    with torch.device("meta"):
        adapter.load()
    workload = Workload(1, 1, (448, 448), 1, 64, 8)
    episodes = Episodes(workload, adapter, PlannedMedia(adapter, workload.image))

    assert episodes.image_tokens == IMAGE_TOKENS[hub_id]


@pytest.mark.parametrize(
    ("hub_id", "levels"),
    [("Qwen/Qwen2.5-VL-3B-Instruct", 0), ("Qwen/Qwen3-VL-2B-Instruct", 3), ("llava-hf/llava-1.5-7b-hf", 0)],
)
def test_frozen_parts_of_published_models_see_an_image_apart(hub_id: str, levels: int) -> None:
    """levels: of DeepStack, whose layers lie deeper than those that are traced."""
    from rllava_core.config import Resolved
    from rllava_core.planning.measuring import Laboratory
    from rllava_core.planning.shape import planned_adapter, planned_model
    from rllava_core.planning.workload import Episodes, PlannedMedia, Workload
    from rllava_core.policy.policy import Policy

    component, _ = find_model(hub_id, load_plugins())
    options = component.load_config()(path=hub_id, train={"vision": "frozen", "connector": "frozen"})  # type: ignore[misc]
    adapter = planned_adapter(Resolved(component, options))
    policy = Policy(adapter, planned_model(adapter, options))
    workload = Workload(1, 1, (448, 448), 1, 64, 8)
    media = PlannedMedia(adapter, workload.image)
    laboratory = Laboratory(policy, media, Episodes(workload, adapter, media), None)

    footprint = laboratory.encoding()

    assert footprint is not None
    assert footprint.flops > 0
    width = policy.model.config.get_text_config().hidden_size
    assert media.encoded_bytes == (1 + levels) * IMAGE_TOKENS[hub_id] * width * 4
    assert laboratory.sampling(1, 2).flops > 0


def test_a_large_model_by_the_name_that_people_call_it() -> None:
    """No config, no checkpoint, no network."""
    result = invoke("--model", "Qwen2-VL-2B", "--image", "224x224", "--answer-tokens", 16, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)

    assert plan["model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert plan["parameters"] == PARAMETERS[plan["model"]]
    assert plan["image_tokens"] == 64
    weights = phase(plan, "update")["device"]["weights"]
    assert weights == pytest.approx(2 * plan["parameters"], rel=1e-3)
    assert phase(plan, "update")["device"]["optimizer"] == pytest.approx(4 * plan["parameters"], rel=1e-3)
    assert plan["device_peak_bytes"] == max(item["device_total"] for item in plan["phases"])
    assert plan["host_peak_bytes"] == max(item["host_total"] for item in plan["phases"])
    for item in plan["phases"]:
        assert item["device_total"] == sum(item["device"].values())
    assert "not yet measured" in plan["measured"]["device"]


def test_a_table_says_what_is_only_predicted(config: Path) -> None:
    result = invoke(config, "--image", "32x32", "--device", "cuda")

    assert result.exit_code == 0, result.output
    assert "Memory at the worst moment of each phase" in words(result)
    assert "predictions, not yet measured" in words(result)
    assert "A step takes roughly" in words(result)


def test_a_directory_that_holds_a_config_alone(config: Path, tmp_path: Path) -> None:
    component, hub_id = find_model("SmolVLM-256M", load_plugins())
    folder = published(component.load_config())[hub_id]
    shutil.copytree(folder, tmp_path / "model")

    result = invoke(
        config,
        f"model={{adapter: smolvlm, path: {tmp_path / 'model'}, split_images: false}}",
        *("training.prompts_per_step=2", "training.eval_episodes=2", "--json"),
    )

    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["parameters"] == PARAMETERS[hub_id]


def test_levers_do_what_they_promise(config: Path) -> None:
    lever = "engine.train.{}=true".format
    plain = planned(config, "--device", "cuda", "model.dtype=bfloat16")
    weights = phase(plain, "update")["device"]["weights"]
    assert phase(plain, "rollout")["device"]["gradients"] == pytest.approx(weights, rel=0.02)

    away = planned(config, "--device", "cuda", "model.dtype=bfloat16", lever("optimizer_on_cpu"))
    assert "optimizer" not in phase(away, "update")["device"]
    assert "gradients" not in phase(away, "update")["device"]
    # Two states and a master in float32, of weights in bfloat16.
    assert phase(away, "update")["host"]["optimizer on the CPU"] == pytest.approx(6 * weights, rel=0.02)

    offloaded = planned(config, "--device", "cuda", lever("offload_activations"), "training.unseen_images=ignore")
    assert phase(offloaded, "update")["device"]["activations"] < phase(plain, "update")["device"]["activations"]

    recomputed = planned(config, "--device", "cuda", lever("checkpoint_activations"))
    whole = planned(config, "--device", "cuda")
    assert phase(recomputed, "update")["device"]["activations"] < phase(whole, "update")["device"]["activations"]

    unshared = planned(config, "--device", "cuda", "engine.train.prefix_sharing=false")
    assert phase(unshared, "update")["device"]["activations"] > phase(whole, "update")["device"]["activations"]


def test_copies_adapters_and_quantization(config: Path) -> None:
    plain = planned(config)
    reference = planned(config, "algorithm.kl_coefficient=0.1")
    weights = phase(plain, "rollout")["host"]["weights"]
    assert phase(reference, "rollout")["host"]["copies"] == pytest.approx(weights, rel=0.02)
    assert phase(reference, "loading")["host"]["weights"] == pytest.approx(2 * weights, rel=0.02)

    lora = "model.train={vision: frozen, connector: frozen, language: lora}"
    adapted = planned(config, lora, "model.lora={rank: 4}", "algorithm.kl_coefficient=0.1")
    assert adapted["trained"] < 0.2 * plain["trained"]
    assert phase(adapted, "rollout")["host"]["copies"] == phase(adapted, "rollout")["host"]["gradients"]

    packed = planned(config, lora, "model.quantization=nf4")
    assert phase(packed, "rollout")["host"]["weights"] < phase(adapted, "rollout")["host"]["weights"]


def test_weights_in_lower_precision_are_there_once_for_all_prompts(config: Path) -> None:
    lowered = []
    for prompts in (4, 64):
        plan = planned(config, "engine.train.mixed_precision=bf16", f"training.prompts_per_step={prompts}")
        lowered.append(phase(plan, "rollout")["host"]["weights, lowered"])
    whole = phase(planned(config), "rollout")["host"]

    assert lowered[0] == lowered[1] <= whole["weights"] // 2
    assert "weights, lowered" not in whole


def test_frozen_parts_see_each_image_once(config: Path) -> None:
    frozen = "model.train={vision: frozen, connector: frozen}"
    every, once = planned(config, frozen, "model.encoded_bytes=0"), planned(config, frozen)
    assert "encoding" not in {item["name"] for item in every["phases"]}
    assert {item["name"] for item in once["phases"] if "vision" in item["host"]} == {"encoding"}
    assert len({item["name"] for item in every["phases"] if "vision" in item["host"]}) > 1
    # As many numbers in float32 as a prompt has tokens of its image, in the language model's width of 64.
    prompts = 4
    assert phase(once, "update")["host"]["encoded images"] == prompts * once["image_tokens"] * 64 * 4
    # Of a card, whose speed is told; that of this machine is measured anew by every plan.
    slow, fast = (
        planned(config, frozen, *more, "--device", "cuda")["seconds"]["update"]
        for more in (["model.encoded_bytes=0"], [])
    )
    assert fast < slow

    bounded = planned(config, frozen, "model.encoded_bytes=1000")
    assert phase(bounded, "update")["host"]["encoded images"] == 1000


def phases_of(config: Path, *overrides: str, holes: bool = True, **changes: Any) -> dict[str, dict[str, int]]:
    from dataclasses import replace

    from rllava_core.config import load
    from rllava_core.planning.planner import Planner
    from rllava_core.planning.request import request_of_config
    from rllava_core.planning.timing import Machine

    sizes = {"image": (32, 32), "images": 1, "prompt_tokens": 64, "turns": 1}
    request = replace(request_of_config(load(config, overrides, load_plugins()), sizes), **changes)
    plan = Planner(request, Machine.card(100, 100)).plan(holes=holes)
    return {phase.name: dict(phase.host) for phase in plan.phases}


def test_what_is_free_in_the_heap_is_looked_for_on_the_cpu(config: Path) -> None:
    small = "training.micro_batch_tokens=512"
    without, whole = phases_of(config, small, holes=False), phases_of(config, small)

    free = whole["update"]["free in the heap"]
    assert 0 < free < sum(without["update"].values())
    for phases in (whole["update"], whole["optimizer"]):
        phases.pop("free in the heap")
    assert whole == without
    assert "free in the heap" not in phases_of(config, small, device="cuda")["update"]
    # What processes send each other is not played, nor are the parts that the others hold.
    shared = {"processes": 2, "divided": frozenset({"gradients", "states"})}
    assert "free in the heap" not in phases_of(config, small, **shared)["update"]


def test_a_smaller_last_micro_batch_hides_none_of_the_others(config: Path) -> None:
    """The heap of five prompts in micro-batches of two, two and one is that of four in two and two."""
    tokens = "training.micro_batch_tokens=300"
    four, five = (phases_of(config, tokens, f"training.prompts_per_step={prompts}") for prompts in (4, 5))
    assert five["update"]["free in the heap"] == pytest.approx(four["update"]["free in the heap"], rel=0.1)


def test_sampling_while_training_takes_its_memory_beside_what_training_takes(config: Path) -> None:
    plain = planned(config, "algorithm.importance=token")
    ahead = planned(config, "algorithm.importance=token", "engine.rollout.async=1")
    weights = phase(plain, "update")["host"]["weights"]
    assert phase(ahead, "update")["host"]["copies"] == pytest.approx(weights, rel=0.02)
    sampling = phase(plain, "rollout")["host"]
    taken = sum(sampling.get(part, 0) for part in ("key-value cache", "logits", "vision", "activations"))
    assert taken > 0
    assert phase(ahead, "update")["host"]["sampling meanwhile"] == taken
    assert "sampling meanwhile" not in phase(ahead, "checkpoint")["host"]


def test_what_fits_a_card(config: Path) -> None:
    as_it_is = planned(config, "--device", "cuda", "--fit", "24GB")
    assert as_it_is["fit"] == {
        "budget_bytes": 24 * 2**30,
        "host_bytes": None,
        "fits": True,
        "overrides": [],
        "smallest_card_gb": 6,
    }
    large = (config, "--device", "cuda", "training.prompts_per_step=64", "task.max_new_tokens=128")
    needed = planned(*large)["device_peak_bytes"]
    squeezed = planned(*large, "--fit", f"{int(0.85 * needed / 2**20)}MB")
    assert squeezed["fit"]["fits"]
    assert squeezed["fit"]["overrides"]
    assert squeezed["device_peak_bytes"] < needed
    # What is printed can be typed.
    again = planned(*large, *squeezed["fit"]["overrides"])
    assert again["device_peak_bytes"] == squeezed["device_peak_bytes"]

    # What goes to the host needs room there.
    narrow = (*large, "--fit", f"{int(0.85 * needed / 2**20)}MB", "--host-memory")
    least = planned(*large)["host_peak_bytes"]
    beside = planned(*narrow, f"{least // 2**20 + 64}MB")["fit"]
    assert not any("on_cpu=true" in override or "offload" in override for override in beside["overrides"])
    assert not planned(*narrow, "1GB")["fit"]["fits"]

    never = planned(config, "--device", "cuda", "--fit", "1MB")
    assert not never["fit"]["fits"]
    assert never["fit"]["smallest_card_gb"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model with the name of a published model"),
        (["missing.yaml"], "missing.yaml: no such file"),
        (["--model", "Qwen2.5-VL-9B"], "Did you mean Qwen/Qwen2.5-VL-"),
        (["--model", "Qwen2-VL-2B", "--fit", "24XB"], "--fit '24XB': expected a size such as 24GB"),
        (["--model", "Qwen2-VL-2B", "--host-memory", "64GB"], "--host-memory limits what --fit may choose"),
        (["CONFIG", "--fit", "8GB", "--host-memory", "64GB"], "the model is on the CPU"),
        (["--model", "Qwen2-VL-2B", "--fit", "0GB"], "expected a size such as 24GB"),
        (["--model", "Qwen2-VL-2B", "--image", "448"], "--image '448': expected width and height"),
        (["--model", "Qwen2-VL-2B", "--turns", "0"], "0 is not in the range"),
        (["--model", "Qwen2-VL-2B", "--answer-tokens", "40000"], "the model's context is 32768"),
        (["--model", "Qwen2-VL-2B", "--image", "9000x10"], "an image of 9000x10"),
        (["CONFIG", "model.path=nowhere", "model.from_scratch=null"], "no published model whose shape is known"),
        (["CONFIG", "model={adapter: qwen2vl, path: EMPTY}"], "holds no config.json"),
        (["CONFIG", "model={adapter: qwen2vl, path: OTHER}"], "a 'idefics3'; this adapter loads 'qwen2_vl'"),
        (["CONFIG", "model={adapter: anyvlm, path: OTHER}"], "has no `shape_processor`"),
        (["CONFIG", "engine.train.step_in_backward=true", "training.micro_batch_tokens=64"], "needs one micro-batch"),
    ],
)
def test_bad_input_is_one_message(config: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    component, hub_id = find_model("SmolVLM-256M", load_plugins())
    (tmp_path / "empty").mkdir()
    places = {
        "CONFIG": str(config),
        "EMPTY": str(tmp_path / "empty"),
        "OTHER": str(published(component.load_config())[hub_id]),
    }
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]

    result = invoke(*arguments)

    assert result.exit_code == 2, result.output
    assert message in words(result)
    assert "Traceback" not in result.output
