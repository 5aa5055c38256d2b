"""What a step costs as one size grows, prefixes shared beside unshared: seconds of rollout and update, peak memory.

    python benchmarks/scaling.py [--only group,image_tokens,new_tokens,turns,vocabulary,logprobs,frozen] [--json FILE]

One size is varied at a time around a Qwen2-VL of 14 million parameters (`workloads.BASE`: 1 prompt, G = 8, 256 image
tokens, 32 new tokens, 8,192 words). The group is varied at 1,024 image tokens, for that is what the first bar says:

- update from G = 1 to G = 16 at 1,024 image tokens and 32-token answers: at most 2 times as long (unshared: about 16);
- the log-prob part alone at 4,096 action tokens and 152k words: at most 0.6 GB above what holds the language head, its
  gradient, the hidden states and theirs. Forward and backward of `rllava_core.policy.logprobs.chunked_logprobs`, in the
  first micro-batch of a step, which makes the gradient of the head, and in a later one, which adds to it.

Beside them, what it saves that frozen parts see an image once: 1,024 image tokens, each of four patches, a vision part
of 11 million parameters, and five times as many in the language model, as in Qwen2.5-VL-3B. Images are seen in every
pass; once, those that come for the first time; and those that came before.

The engines, the algorithm and the episodes are those that `rllava train` builds from the config; only the loop around
them is this file's, since a group of one teaches GRPO nothing and its config refuses it. Every point is a process of
its own: one step to warm up, then `--steps` measured ones, of which the median is shown. Peak memory is what was
resident at most, above what was when everything was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vs_trl import Memory, machine, versions

GROUPS = (1, 2, 4, 8, 16)
IMAGE_TOKENS = ((8, 8), (16, 16), (24, 24), (32, 32))
NEW_TOKENS = (8, 32, 128)
TURNS = (1, 2, 4, 8)
VOCABULARIES = (2048, 8192, 32_768, 151_936)
LOGPROB_TOKENS = (512, 1024, 2048, 4096)
LOGPROB_VOCABULARY = 151_936
LOGPROB_HIDDEN = (256, 1536)
"""That of `vs_trl.py --shape mid`, and that of Qwen2-VL-2B."""

FROZEN = {
    **{"hidden": 768, "intermediate": 2048, "layers": 8, "heads": 12, "key_value_heads": 4},
    **{"image_tokens": (32, 32), "vision_hidden": 384, "vision_depth": 6, "vision_heads": 6},
}
SEEN = {"in every pass": 0, "once, new images": 2**30, "once, seen before": 2**30}
"""Bytes for what frozen parts make of images."""

SIZES = ("group", "image_tokens", "new_tokens", "turns", "vocabulary")
KNOWN = (*SIZES, "logprobs", "frozen")
GROUP_BAR, LOGPROB_BAR = 2.0, 0.6e9


def points(size: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each point is called, and how its shape differs from `workloads.BASE`."""
    if size == "group":
        yield from ((str(group), {"group": group, "image_tokens": (32, 32)}) for group in GROUPS)
    elif size == "image_tokens":
        yield from ((str(rows * columns), {"image_tokens": (rows, columns)}) for rows, columns in IMAGE_TOKENS)
    elif size == "new_tokens":
        yield from ((str(count), {"new_tokens": count}) for count in NEW_TOKENS)
    elif size == "turns":
        yield from ((str(turns), {"turns": turns, "image_tokens": (8, 8), "new_tokens": 16}) for turns in TURNS)
    else:
        yield from ((str(words), {"vocabulary": words}) for words in VOCABULARIES)


def measure_step(job: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of one shape."""
    import workloads

    from rllava_core.mdp.environment import Start
    from rllava_core.mdp.rewards import score
    from rllava_core.training.build import build_parts

    shape = replace(workloads.BASE, **job["changes"])
    memory = Memory()
    steps = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        count = 1 + job["steps"]
        workloads.write_model(shape, root / "model")
        data = workloads.write_data(shape, root / "data", count) if shape.turns == 1 else None
        workloads.write_config(
            shape,
            root / "model",
            data,
            root / "config.yaml",
            count,
            shared=job["shared"],
            options=job.get("options", {}),
        )
        resolved, _ = workloads.resolve(root / "config.yaml")
        with build_parts(resolved) as parts:
            examples = parts.task.examples("train")
            memory.begin()
            for number in range(count):
                first = 0 if job.get("again") else number * shape.prompts
                own = range(first, first + shape.prompts)
                starts = [Start(None if examples is None else examples[place], place) for place in own]
                began = time.perf_counter()
                trajectories = parts.episodes.play(starts, shape.group, number)
                sampled = time.perf_counter()
                trajectories = score(trajectories, parts.task.rewards)
                for batch in parts.algorithm.prepare(trajectories, parts.trainer):
                    parts.trainer.step(batch, parts.algorithm.loss, workloads.LEARNING_RATE)
                ended = time.perf_counter()
                parts.sampler.sync(parts.trainer.policy)
                steps.append({"rollout": sampled - began, "update": ended - sampled})
    decisions = sum(item.decisions for item in trajectories)
    medians = {name: statistics.median(step[name] for step in steps[1:]) for name in ("rollout", "update")}
    return {"steps": steps, **medians, "tokens": decisions, **_above(memory)}


def measure_logprobs(job: Mapping[str, Any]) -> dict[str, Any]:
    """The log-prob part alone, of one count of action tokens."""
    import torch
    from torch import nn

    from rllava_core.policy.logprobs import chunked_logprobs

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, size = job["tokens"], job["hidden"]
    head = nn.Linear(size, LOGPROB_VOCABULARY, bias=False, device=device)
    hidden = torch.randn(tokens, size, device=device, requires_grad=True)
    row = torch.arange(tokens, device=device)
    token = torch.randint(0, LOGPROB_VOCABULARY - 1, (tokens,), device=device)
    forbidden = torch.zeros(LOGPROB_VOCABULARY, dtype=torch.bool, device=device)
    forbidden[-1] = True
    # What a step holds anyway. A later micro-batch finds the gradient there and adds to it, as a train engine asks by
    # `adds_up`; the first one makes it.
    hidden.grad = torch.zeros_like(hidden)
    gradient = torch.zeros_like(head.weight)
    if job["later"]:
        head.weight.grad = gradient
    memory = Memory()
    memory.begin()
    del gradient
    began = time.perf_counter()
    logprobs, _ = chunked_logprobs(hidden, head, row, token, forbidden, 1.0, adds_up=True)
    logprobs.mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, **_above(memory)}


def _above(memory: Memory) -> dict[str, float]:
    found = memory.report()
    on_gpu = {"gpu_peak_bytes": found["gpu_peak_bytes"]} if "gpu_peak_bytes" in found else {}
    return {"above_bytes": found["peak_bytes"] - found["baseline_bytes"], **on_gpu}


def in_a_process(kind: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """What `measure_<kind>` finds in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "result.json"
        command = [sys.executable, __file__, "--worker", kind, json.dumps(job), str(answer)]
        load = os.getloadavg()[0]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode != 0:
            raise SystemExit(f"{kind} of {job} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return {**json.loads(answer.read_text(encoding="utf-8")), "load_before": load}


def scale(size: str, steps: int, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Measure and print one table."""
    print(f"\n{size:<12} {'':<8} rollout, s   update, s   above baseline, GB   tokens", flush=True)
    rows = []
    for name, changes in points(size):
        for way in ways:
            found = in_a_process("step", {"changes": changes, "shared": way == "shared", "steps": steps})
            rows.append({size: name, "way": way, **found})
            print(
                f"{name:<12} {way:<8} {found['rollout']:10.2f} {found['update']:11.2f} "
                f"{found['above_bytes'] / 1e9:20.2f} {found['tokens']:8}",
                flush=True,
            )
    for way in ways:
        own = [row for row in rows if row["way"] == way]
        growth = " ".join(f"{row['update'] / own[0]['update']:.2f}" for row in own)
        bar = f"; bar: {GROUP_BAR:.1f}" if size == "group" and way == "shared" else ""
        print(f"update, times the first: {way} {growth}{bar}", flush=True)
    return rows


def scale_logprobs() -> list[dict[str, Any]]:
    """Measure and print the memory of the log-prob part."""
    print(f"\nlog-probs alone, {LOGPROB_VOCABULARY:,} words")
    print(
        "hidden   action tokens   micro-batch   seconds   above the head, its gradient and the inputs, GB", flush=True
    )
    rows = []
    # Only the longest of the larger: it takes minutes on a laptop's cores.
    sizes = [(LOGPROB_HIDDEN[0], tokens) for tokens in LOGPROB_TOKENS] + [(LOGPROB_HIDDEN[1], LOGPROB_TOKENS[-1])]
    for hidden, tokens in sizes:
        for later in (False, True):
            found = in_a_process("logprobs", {"hidden": hidden, "tokens": tokens, "later": later})
            rows.append({"hidden": hidden, "tokens": tokens, "later": later, **found})
            bar = f" (bar: {LOGPROB_BAR / 1e9:.1f})" if tokens == LOGPROB_TOKENS[-1] else ""
            print(
                f"{hidden:<8} {tokens:<15} {'later' if later else 'first':<11} {found['seconds']:9.2f} "
                f"{found['above_bytes'] / 1e9:9.2f}{bar}",
                flush=True,
            )
    return rows


def scale_frozen(steps: int) -> list[dict[str, Any]]:
    """Measure and print what frozen parts cost."""
    print("\nfrozen parts see an image   rollout, s   update, s   above baseline, GB", flush=True)
    rows = []
    frozen = {"train": {"vision": "frozen", "connector": "frozen"}}
    for way, kept in SEEN.items():
        options, again = {**frozen, "encoded_bytes": kept}, way.endswith("before")
        job = {"changes": FROZEN, "shared": True, "steps": steps, "options": options, "again": again}
        found = in_a_process("step", job)
        rows.append({"way": way, **found})
        figures = f"{found['rollout']:10.2f} {found['update']:11.2f} {found['above_bytes'] / 1e9:20.2f}"
        print(f"{way:<27} {figures}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KNOWN), help="what to vary, with commas between")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each point")
    parser.add_argument("--ways", default="shared,unshared", help="shared, unshared, or both")
    parser.add_argument("--threads", type=int, help="of torch (OMP_NUM_THREADS); default: as many as cores")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "JOB", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, job, answer = arguments.worker
        measured = {"step": measure_step, "logprobs": measure_logprobs}[kind](json.loads(job))
        Path(answer).write_text(json.dumps(measured), encoding="utf-8")
        return
    chosen, ways = arguments.only.split(","), arguments.ways.split(",")
    for option, given, known in (("--only", chosen, KNOWN), ("--ways", ways, ("shared", "unshared"))):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{option}: {', '.join(unknown)} is none of {', '.join(known)}")
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes that measure
    others = {"logprobs": scale_logprobs, "frozen": partial(scale_frozen, arguments.steps)}
    results = {name: others[name]() if name in others else scale(name, arguments.steps, ways) for name in chosen}
    if arguments.json is not None:
        used = versions("rllava-core", "torch", "transformers")
        written = {"versions": used, "machine": machine(), "threads": arguments.threads, "results": results}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
