"""Real trajectories for the suites: what a policy answers to a few scripted conversations.

Nothing is invented: tokens and log-probs are drawn by `rllava_core.policy.sampling` from the policy itself, so whatever
is computed from them can be compared with the policy. The tiny policy is the default; any adapter can play.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, sample
from rllava_core.testing.tiny import TinyAdapter


@dataclass(frozen=True)
class Turn:
    """What is shown, text and images in reading order, and what may be answered.

    choices: the discrete actions; None for free text of at most `max_tokens` tokens.
    """

    parts: tuple[str | Image, ...]
    choices: tuple[str, ...] | None = None
    max_tokens: int = 6


Script = tuple[Turn, ...]
"""One episode: its turns, in order."""


def picture(height: int = 16, width: int = 16, seed: int = 0) -> Image:
    """Random pixels, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.from_array(pixels, f"picture {seed} of {height}x{width}")


def text_scripts() -> list[Script]:
    """One turn of free text: a question with a picture, one without, and one with two pictures."""
    return [
        (Turn((picture(), "Colour?")),),
        (Turn(("Two and two?",), max_tokens=3),),
        (Turn(("Is ", picture(8, 24, 1), " like ", picture(12, 8, 2), "?"), max_tokens=9),),
    ]


def choice_scripts() -> list[Script]:
    """One turn of choices: of one token, of several, and other ones for each question."""
    return [
        (Turn((picture(8, 8), "Digit?"), tuple("0123")),),
        (Turn(("Colour of ", picture(12, 16, 1), "?"), ("red", "sky", "green")),),
        (Turn(("Up?",), ("yes", "no!")),),
    ]


def conversation_scripts(choices: bool = False) -> list[Script]:
    """Two and three turns with new pictures in later ones; with `choices`, every answer is one of them."""
    moves: tuple[str, ...] | None = ("up", "on") if choices else None
    return [
        (
            Turn(("Find the key.", picture(8, 8)), ("left", "up", "on")),
            Turn((picture(12, 8, 1), "closer"), moves),
            Turn(("And?",), ("take", "drop")),
        ),
        (Turn(("Go!",), moves, 4), Turn((picture(8, 16, 2), picture(8, 8, 3)), moves, 7)),
    ]


def tiny_policy(
    heads: Mapping[str, int] | None = None,
    seed: int = 0,
    temperature: float = 4.0,
    *,
    end_of_turn: tuple[int, ...] = (),
    forbidden_tokens: tuple[int, ...] = (),
) -> Policy:
    """The tiny model as a policy, its random weights from the seed.

    temperature: high, or random weights would be almost sure of one of several choices and nothing could be learnt.
    end_of_turn, forbidden_tokens: in addition to the tiny adapter's own. Random weights end a turn, or touch a
        forbidden token, once in hundreds of tokens; with many such tokens both happen in every sample.
    """
    adapter = TinyAdapter(ModelConfig(from_scratch="tiny"))
    adapter.end_of_turn = adapter.end_of_turn + end_of_turn
    adapter.forbidden_tokens = adapter.forbidden_tokens + forbidden_tokens
    torch.manual_seed(seed)
    return Policy(adapter, adapter.load(), heads, temperature).eval()


def prompt(adapter: ModelAdapter, media: MediaStore, *parts: str | Image) -> ContextSegment:
    """A user message as the policy reads it."""
    images = tuple(part for part in parts if isinstance(part, Image))
    return ContextSegment(adapter.render([Message.user(*parts)], media.features(images)), images)


def request(
    adapter: ModelAdapter, media: MediaStore, turn: Turn, count: int = 1, history: Sequence[Segment] = ()
) -> Request:
    """What a rollout engine is asked for in a turn."""
    context = (*history, prompt(adapter, media, *turn.parts))
    if turn.choices is None:
        return Request(context, count, turn.max_tokens, "conformance")
    entries = tuple(adapter.encode(choice) for choice in turn.choices)
    return Request(context, count, turn.max_tokens, "conformance", entries, turn.choices)


def play(policy: Policy, scripts: Sequence[Script], group_size: int = 1, seed: int | None = 0) -> list[Trajectory]:
    """`group_size` episodes of each script, group by group; greedy without a seed.

    Later members of a group may say more, so that the answers of a group differ in length. Scores are 0, ½ and 1 in
    turn, so that every group of two or more has returns that differ.
    """
    media = MediaStore(policy.adapter)
    generator = None if seed is None else Generator(policy.device).manual_seed(seed)
    members = [(group, member) for group in range(len(scripts)) for member in range(group_size)]
    histories: list[tuple[Segment, ...]] = [() for _ in members]
    for turn in range(max(map(len, scripts))):
        going = [number for number, (group, _) in enumerate(members) if turn < len(scripts[group])]
        requests = []
        for number in going:
            group, member = members[number]
            asked = scripts[group][turn]
            longer = replace(asked, max_tokens=asked.max_tokens + member % 3)
            requests.append(request(policy.adapter, media, longer, history=histories[number]))
        for number, asked_for, [action] in zip(
            going, requests, sample(policy, media, requests, generator), strict=True
        ):
            histories[number] = (*asked_for.context, action)
    return [
        _episode(group, history, (member + group) % 3 / 2)
        for (group, member), history in zip(members, histories, strict=True)
    ]


def demonstrate(adapter: ModelAdapter, scripts: Sequence[Script]) -> list[Trajectory]:
    """One episode a script in which every turn has its right answer, with log-probs of zero, as the loop writes them.

    The right answer is the last of the choices, or a word of its own.
    """
    media = MediaStore(adapter)
    trajectories = []
    for group, script in enumerate(scripts):
        segments: tuple[Segment, ...] = ()
        for number, turn in enumerate(script):
            asked = request(adapter, media, turn, history=segments)
            answer = turn.choices[-1] if turn.choices else "yes it is"[: 3 + 2 * (group + number)]
            tokens = adapter.encode(answer)
            if asked.choices is None:
                tokens = (*tokens, adapter.end_of_turn[0])
                action = ActionSegment(tokens, np.zeros(len(tokens), np.float32), answer)
            else:
                index = len(asked.choices) - 1
                action = ActionSegment(tokens, np.zeros(1, np.float32), answer, choice=index, choices=asked.choices)
            segments = (*asked.context, action)
        trajectories.append(_episode(group, segments, 1.0))
    return trajectories


def with_scores(trajectories: Sequence[Trajectory], scores: Sequence[float]) -> list[Trajectory]:
    """The same trajectories with these scores, over and over."""
    return [replace(trajectory, score=scores[number % len(scores)]) for number, trajectory in enumerate(trajectories)]


def pack(policy: Policy, trajectories: Sequence[Trajectory]) -> PolicyBatch:
    """The batch that the policy's `forward` takes."""
    builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
    for trajectory in trajectories:
        builder.add_trajectory(trajectory)
    return builder.build().to(policy.device)


def _episode(group: int, segments: tuple[Segment, ...], score: float) -> Trajectory:
    turns = sum(isinstance(segment, ActionSegment) for segment in segments)
    return Trajectory(Example(f"script {group}"), group, group, segments, (0.0,) * turns, terminated=True, score=score)
