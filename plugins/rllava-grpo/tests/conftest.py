"""The toy model in float64, run plainly, and GRPO written out from the papers, decision by decision."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rllava_core.config import TrainingSection
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import TrainSetup
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.testing.tiny import END, IMAGE, PAD, START, TinyAdapter


class PreciseTinyAdapter(TinyAdapter):
    """The toy in float64."""

    def load(self) -> Any:
        model: Any = super().load().double()
        # Llama's own norm goes through float32, in which no finite difference can be taken.
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LlamaRMSNorm):
                    setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64))
        return model

    def collate(self, features: Sequence[Any]) -> dict[str, Tensor]:
        return {name: values.double() for name, values in super().collate(features).items()}


@dataclass
class Objective:
    """What the loop over decisions found: the loss, and how many decisions were clipped or not."""

    loss: Tensor
    clipped_low: int
    clipped_high: int
    decisions: int
    ratio: float


class Workbench:
    """Makes policies, trajectories, and the loss as the papers write it."""

    def policy(self) -> Policy:
        torch.manual_seed(0)
        adapter = PreciseTinyAdapter(ModelConfig(from_scratch="tiny"))
        return Policy(adapter, adapter.load())

    def perturbed(self, policy: Policy, scale: float = 0.05) -> Policy:
        """A policy that differs in every weight."""
        other = copy.deepcopy(policy)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return other

    def engine(self, policy: Policy, reference: Policy | None, micro_batch_tokens: int = 90) -> LocalTrainEngine:
        """reference: the frozen copy of that name; None for an algorithm that asks for none."""
        section = TrainingSection(steps=1, max_grad_norm=None, micro_batch_tokens=micro_batch_tokens)
        copies = {} if reference is None else {"reference": reference}
        setup = TrainSetup(policy, copies, MediaStore(policy.adapter), section)
        return LocalTrainEngine(LocalTrainConfig(device="cpu"), setup)

    def decisions(self, model: Any, trajectory: Trajectory) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs and entropies of one trajectory, from whole sequences without cache, padding or sharing."""
        logprobs, entropies = [], []
        for turn in trajectory.turns:
            action = turn.action
            tokens = [token for segment in turn.context for token in segment.tokens]
            shown = [segment for segment in turn.context if isinstance(segment, ContextSegment)]
            images = [image for segment in shown for image in segment.images]
            if action.choices is not None and action.choice is not None:
                scores = []
                for choice in action.choices:
                    table = _log_softmax(model, [*tokens, *choice], images)
                    scores.append(sum(table[len(tokens) + k - 1, token] for k, token in enumerate(choice)))
                stacked = torch.stack(scores)
                distribution = stacked - stacked.exp().sum().log()
                logprobs.append(distribution[action.choice])
                entropies.append(-(distribution.exp() * distribution).sum())
            else:
                table = _log_softmax(model, [*tokens, *action.tokens], images)
                for k, token in enumerate(action.tokens):
                    row = table[len(tokens) + k - 1]
                    possible = row[row > -torch.inf]
                    logprobs.append(row[token])
                    entropies.append(-(possible.exp() * possible).sum())
        return logprobs, entropies

    def trajectories(self, policy: Policy, kind: str) -> list[Trajectory]:
        """Three groups of three, sampled by an older policy whose log-probs lie off on both sides."""
        picture = Image.from_array(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
        other = Image.from_array(np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3) * 2)
        colour, digit, game = _context("Colour?", picture), _context("Which digit?"), _context("Go", other)
        shown = _context("on", picture)
        digits, colours = "1379", ("red", "green", "blue")
        members: dict[str, list[tuple[Segment, ...]]] = {
            "text": [
                *((colour, _text(answer)) for answer in ("red", "dark green", "")),
                *((digit, _text(answer)) for answer in ("7", "12", "7")),
                (game, _text("left"), shown, _text("take it")),
                (game, _text("up"), shown, _text("")),
                (game, _text("left"), shown, _text("go")),
            ],
            "choices": [
                *((colour, _choice(index, *colours)) for index in (0, 2, 1)),
                *((digit, _choice(index, *digits)) for index in (1, 3, 1)),
                (game, _choice(0, "left", "up"), shown, _choice(2, *colours)),
                (game, _choice(1, "left", "up"), shown, _choice(0, "u", "d")),
                (game, _choice(0, "left", "up"), shown, _choice(2, *colours)),
            ],
        }
        returns = [1.0, 0.0, 0.3, -0.5, 2.0, 0.1, 0.9, 0.2, 0.7]
        offsets = [-0.6, 0.6, 0.05, 0.5, -0.1, -0.5, -0.4, 0.1, 0.3, -0.15, 0.4, -0.9]
        made, place = [], 0
        for number, (segments, value) in enumerate(zip(members[kind], returns, strict=True)):
            group = number // 3
            trajectory = Trajectory(Example(f"example {group}"), 0, group, conversation(segments), True, score=value)
            current = [float(logprob.detach()) for logprob in self.decisions(policy.model, trajectory)[0]]
            old = []
            for logprob in current:
                old.append(min(logprob + offsets[place % len(offsets)], -0.01))
                place += 1
            made.append(replace(trajectory, turns=conversation(_recorded(segments, old))))
        return made

    def objective(
        self,
        config: Mapping[str, Any],
        everything: Sequence[Trajectory],
        chosen: Sequence[Trajectory],
        model: Any,
        reference: Any,
    ) -> Objective:
        """Equation 3 of arXiv:2402.03300, and what its variants change, as a loss of `chosen` in float64.

        everything: the trajectories of the step, over which advantages are taken.
        """
        beta, estimator = config.get("kl_coefficient", 0.0), config.get("kl_estimator", "k3")
        in_reward = config.get("kl_in") == "reward"
        low, high = config.get("clip_low", 0.2), config.get("clip_high", 0.2)
        epsilon = config.get("epsilon", 1e-4)

        def old_logprobs(trajectory: Trajectory) -> list[float]:
            return [float(value) for action in trajectory.actions for value in action.logprobs]

        def reference_logprobs(trajectory: Trajectory) -> list[float]:
            return [float(value.detach()) for value in self.decisions(reference, trajectory)[0]]

        returns = []
        for trajectory in everything:
            value = trajectory.score
            if beta and in_reward:
                pairs = zip(old_logprobs(trajectory), reference_logprobs(trajectory), strict=True)
                value -= beta * sum(_divergence(estimator, old, ref) for old, ref in pairs)
            returns.append(value)
        centred = []
        deviations = []
        for trajectory, value in zip(everything, returns, strict=True):
            group = [r for other, r in zip(everything, returns, strict=True) if other.group == trajectory.group]
            centred.append(value - statistics.fmean(group))
            deviations.append(statistics.stdev(group))
        advantages = {}
        for trajectory, value, deviation in zip(everything, centred, deviations, strict=True):
            scale = {
                "group": deviation + epsilon,
                "batch": statistics.stdev(centred) + epsilon,
                "none": 1.0,
            }[config.get("scale", "group")]
            advantages[id(trajectory)] = value / scale

        loss = torch.zeros((), dtype=torch.float64)
        clipped_low = clipped_high = decisions = 0
        ratios = 0.0
        for trajectory in chosen:
            advantage = advantages[id(trajectory)]
            logprobs, entropies = self.decisions(model, trajectory)
            references = reference_logprobs(trajectory)
            for t, old in enumerate(old_logprobs(trajectory)):
                ratio = (logprobs[t] - old).exp()
                free, bounded = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
                value = free if free <= bounded else bounded
                if free > bounded:
                    clipped_low += bool(ratio < 1)
                    clipped_high += bool(ratio > 1)
                value = value + config.get("entropy_coefficient", 0.0) * entropies[t]
                if beta and not in_reward:
                    value = value - beta * _divergence(estimator, logprobs[t], references[t])
                weight = {
                    "sequence": 1 / len(chosen) / len(logprobs),
                    "token": 1 / sum(other.decisions for other in chosen),
                    "constant": 1 / len(chosen) / config.get("aggregation_length", 1),
                }[config.get("aggregation", "sequence")]
                loss = loss - weight * value
                decisions += 1
                ratios += float(ratio.detach())
        return Objective(loss, clipped_low, clipped_high, decisions, ratios / decisions)


@pytest.fixture
def bench() -> Workbench:
    return Workbench()


def _log_softmax(model: Any, tokens: Sequence[int], images: Sequence[Image]) -> Tensor:
    """[T, V] of the next token; placeholders and padding cannot be."""
    patches = [
        torch.from_numpy(image.pixels[y : y + 4, x : x + 4].astype(np.float32) / np.float32(127.5) - 1).flatten()
        for image in images
        for y in range(0, image.size[1], 4)
        for x in range(0, image.size[0], 4)
    ]
    hidden = model.hidden(
        torch.tensor([list(tokens)]),
        torch.stack(patches).double() if patches else None,
        position_ids=torch.arange(len(tokens))[None],
        use_cache=False,
    )[0]
    logits = model.lm_head(hidden)
    impossible = torch.tensor([token in (START, PAD, IMAGE) for token in range(logits.shape[-1])])
    logits = torch.where(impossible, -torch.inf, logits)
    return logits - logits.logsumexp(-1, keepdim=True)


def _divergence(estimator: str, logprob: Any, reference: float) -> Any:
    ratio = reference - logprob
    if estimator == "k1":
        return -ratio
    if estimator == "k2":
        return ratio * ratio / 2
    return (ratio.exp() if isinstance(ratio, Tensor) else math.exp(ratio)) - 1 - ratio


def _context(text: str, image: Image | None = None) -> ContextSegment:
    count = 0 if image is None else image.size[0] * image.size[1] // 16
    return ContextSegment((START, *[IMAGE] * count, *text.encode(), END, START), () if image is None else (image,))


def _text(answer: str) -> ActionSegment:
    return ActionSegment((*answer.encode(), END), np.zeros(len(answer) + 1, np.float32), answer)


def _choice(index: int, *choices: str) -> ActionSegment:
    entries = tuple(tuple(choice.encode()) for choice in choices)
    return ActionSegment(entries[index], np.zeros(1, np.float32), choices[index], choice=index, choices=entries)


def _recorded(segments: Sequence[Segment], old: Sequence[float]) -> list[Segment]:
    """The same with these behaviour log-probs."""
    waiting = iter(old)
    return [
        replace(segment, logprobs=np.array([next(waiting) for _ in range(segment.decisions)], np.float32))
        if isinstance(segment, ActionSegment)
        else segment
        for segment in segments
    ]
