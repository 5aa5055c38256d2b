"""A folder of pictures and a file of questions are enough to train; a bad picture is named before anything begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import Result

Run = Callable[..., Result]
Refused = Callable[..., str]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("overrides", [[], ["task.dataset.choices=options"]], ids=["text", "choices"])
def test_pictures_of_many_sizes_and_several_in_a_prompt_train(
    run_rllava: Run, picture_task: Path, tmp_path: Path, overrides: list[str]
) -> None:
    result = run_rllava("train", "task.yaml", *overrides, "--run-dir", "run")

    assert result.exit_code == 0, result.output
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    # What was sampled is what was trained on: images, positions and masks agree.
    assert all(line["policy/logprob_gap"] < 1e-4 for line in lines[1:])
    assert all(line["policy/grad_norm"] > 0 for line in lines[1:])
    assert all(abs(line["policy/ratio"] - 1) < 1e-4 for line in lines[1:])
    sample = (tmp_path / "run" / "trajectories" / "step-000001.md").read_text(encoding="utf-8")
    shown = {section.count("![image]") for section in sample.split("\n## ")[1:]}
    assert len(shown) > 1
    assert shown <= {1, 2, 3}
    if overrides:
        answers = [line.split("`")[1] for line in sample.splitlines() if line.startswith("| `")]
        assert set(answers) <= {"red", "green", "blue"}


@pytest.mark.parametrize(
    "model",
    [
        "{adapter: qwen2vl, from_scratch: tiny-qwen2.5}",
        "{adapter: qwen2vl, from_scratch: tiny-qwen3-moe}",
        "{adapter: llava, from_scratch: tiny-onevision}",
        "{adapter: smolvlm, from_scratch: tiny, split_images: true}",
    ],
)
@pytest.mark.parametrize("counts", [(0, 1, 2, 3), (0,)], ids=["mixed", "text"])
def test_no_one_and_many_pictures_in_a_batch_train(
    run_rllava: Run,
    picture_task: Path,
    tmp_path: Path,
    write_examples: Callable[..., Path],
    model: str,
    counts: tuple[int],
) -> None:
    package = f"rllava_{model.split()[1].strip(',')}"
    pytest.importorskip(package, reason=f"{package.replace('_', '-')} is not installed")
    sizes = [(40, 30), (64, 64), (33, 57), (60, 24)]
    for name in ("train.jsonl", "test.jsonl"):
        write_examples(name, [(counts[number % len(counts)], sizes[number % 4]) for number in range(8)])

    result = run_rllava("train", "task.yaml", f"model={model}", "training.steps=2", "--run-dir", "run")

    assert result.exit_code == 0, result.output
    lines = metrics(tmp_path / "run")
    assert all(line["policy/logprob_gap"] < 1e-4 for line in lines[1:])
    assert all(line["policy/grad_norm"] > 0 for line in lines[1:])
    looked = [line["image/influence"] for line in lines if "image/influence" in line]
    assert len(looked) == (2 if any(counts) else 0)
    assert all(influence > 1e-3 for influence in looked)


def test_a_folder_of_classes_trains(run_rllava: Run, tmp_path: Path) -> None:
    for name, shade in (("dark", 20), ("bright", 230)):
        (tmp_path / "shades" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((20 + 5 * number, 30, 3), shade + number, np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "shades" / name / f"{number}.png")
    (tmp_path / "shades.yaml").write_text(
        """\
model: {adapter: qwen2vl, from_scratch: tiny}
algorithm: {name: grpo, group_size: 4}
task:
  dataset: {name: folder, path: shades, held_out_fraction: 0.25, classes_as_choices: true}
  rewards: [exact_match]
training: {steps: 2, prompts_per_step: 4, learning_rate: 1.0e-3}
""",
        encoding="utf-8",
    )

    result = run_rllava("train", "shades.yaml", "--run-dir", "run")

    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"]["last"]["episodes"] == 2


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def truncated(path: Path) -> None:
    PIL.Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def animated(path: Path) -> None:
    frames = [PIL.Image.fromarray(noise(16, 16)) for _ in range(3)]
    frames[0].save(path, format="GIF", save_all=True, append_images=[PIL.Image.new("L", (16, 16)), frames[2]])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated file": (truncated, "truncated or damaged ("),
    "text named .png": (lambda path: path.write_text("a cat", encoding="utf-8"), "not an image that Pillow can read"),
    "no bytes at all": (lambda path: path.write_bytes(b""), "not an image that Pillow can read"),
    "a line of pixels": (
        lambda path: PIL.Image.fromarray(noise(1, 10_000)).save(path),
        "10000x1, an aspect ratio beyond 200:1; crop it first",
    ),
    "an animation": (animated, "holds 3 frames; save the one you mean as an image of its own"),
    "no file": (lambda path: path.unlink(missing_ok=True), "no such file in "),
    "a folder": (lambda path: (path.unlink(missing_ok=True), path.mkdir()), "no such file in "),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_picture_is_named_with_file_and_line_before_the_run(
    refused: Refused, picture_task: Path, tmp_path: Path, what: str
) -> None:
    make, problem = BAD[what]
    make(tmp_path / "pictures" / "train-7-1.png")

    message = refused("train", "task.yaml")

    assert message.startswith("train.jsonl:8: image ")
    assert "pictures/train-7-1.png" in message
    assert problem in message
    assert "\n" not in message
    assert not (tmp_path / "runs").exists()


def test_a_bad_picture_that_was_not_looked_for_stops_the_run_when_it_is_needed(
    refused: Refused, picture_task: Path, tmp_path: Path
) -> None:
    for number in range(12):
        truncated(tmp_path / "pictures" / f"train-{number}-0.png")

    message = refused("train", "task.yaml", "task.dataset.verify_images=false", "--run-dir", "run")

    assert message.startswith("train.jsonl:")
    assert "truncated or damaged (" in message
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0]


GOOD: dict[str, Callable[[Path], object]] = {
    "a CMYK jpeg": lambda path: (
        PIL.Image.fromarray(noise(30, 40, 4), mode=None).convert("CMYK").save(path, format="JPEG")
    ),
    "a 16-bit png": lambda path: PIL.Image.fromarray(noise(30, 40).astype(np.uint16) * 257).save(path, format="PNG"),
    "transparency": lambda path: PIL.Image.fromarray(noise(30, 40, 4), mode=None).save(path, format="PNG"),
    "a palette": lambda path: PIL.Image.fromarray(noise(30, 40, 3)).quantize(16).save(path, format="PNG"),
    "black and white": lambda path: PIL.Image.fromarray(noise(30, 40)).convert("1").save(path, format="PNG"),
    "one pixel": lambda path: PIL.Image.fromarray(noise(1, 1, 3)).save(path, format="PNG"),
    "a picture at the limit": lambda path: PIL.Image.fromarray(noise(1, 190, 3)).save(path, format="PNG"),
}


def test_pictures_of_every_kind_are_converted_and_trained_on(
    run_rllava: Run, picture_task: Path, tmp_path: Path
) -> None:
    lines = []
    for number, (name, make) in enumerate(GOOD.items()):
        make(tmp_path / f"odd-{number}.png")
        lines.append(json.dumps({"images": f"odd-{number}.png", "problem": name, "answer": "red"}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")

    result = run_rllava("train", "task.yaml", "training.steps=1", f"training.prompts_per_step={len(GOOD)}")

    assert result.exit_code == 0, result.output
    assert metrics(tmp_path / "runs" / "task-001")[1]["policy/logprob_gap"] < 1e-4
    shown = list((tmp_path / "runs" / "task-001" / "trajectories" / "images").iterdir())
    assert all(PIL.Image.open(path).mode == "RGB" for path in shown)


def test_one_answer_alone_is_no_group(refused: Refused, picture_task: Path, tmp_path: Path) -> None:
    message = refused("train", "task.yaml", "algorithm.group_size=1")

    assert message.startswith("override 'algorithm.group_size=1': algorithm.group_size: GRPO compares the trajectories")
    assert message.endswith("needs at least 2 of them (got 1)")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_model_is_named(refused: Refused, picture_task: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()

    message = refused("train", "task.yaml", "model={adapter: qwen2vl, path: weights}")

    assert message == "model weights: the directory holds no config.json, so it is no transformers model"
    assert not (tmp_path / "runs").exists()


def test_a_file_without_examples_is_named(refused: Refused, picture_task: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n\n", encoding="utf-8")

    assert refused("train", "task.yaml").startswith("train.jsonl: no examples in it")
    assert not (tmp_path / "runs").exists()


def test_a_question_longer_than_the_context_is_named(refused: Refused, picture_task: Path) -> None:
    message = refused("train", "task.yaml", f"task.prompt={'word ' * 500}")

    assert message.startswith("test.jsonl:1: ")
    assert "tokens, the model's context is 2048; use smaller images, a shorter prompt" in message
