"""Real trajectories for the suites: what a policy answers to a few scripted conversations.

Nothing is invented: tokens and log-probs are drawn by `rllava_core.policy.sampling` from the policy itself, so whatever
is computed from them can be compared with the policy. The tiny policy is the default; any adapter can play.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy
from rllava_core.policy.sampling import Request, Sampler
from rllava_core.testing.tiny import TinyAdapter
from rllava_core.training.conversations import Renderer
from rllava_core.training.seeds import derive


@dataclass(frozen=True)
class Shown:
    """What is shown in a turn, text and images in reading order, and what may be answered.

    choices: the discrete actions; None for free text of at most `max_tokens` tokens.
    answered: off for the state that a truncated episode is left in.
    """

    parts: tuple[str | Image, ...]
    choices: tuple[str, ...] | None = None
    max_tokens: int = 6
    answered: bool = True


Script = tuple[Shown, ...]
"""One episode: its turns, in order."""


def picture(height: int = 16, width: int = 16, seed: int = 0) -> Image:
    """Random pixels, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.from_array(pixels, f"picture {seed} of {height}x{width}")


def text_scripts() -> list[Script]:
    """One turn of free text: a question with a picture, one without, and one with two pictures."""
    return [
        (Shown((picture(), "Colour?")),),
        (Shown(("Two and two?",), max_tokens=3),),
        (Shown(("Is ", picture(8, 24, 1), " like ", picture(12, 8, 2), "?"), max_tokens=9),),
    ]


def choice_scripts() -> list[Script]:
    """One turn of choices: of one token, of several, and other ones for each question."""
    return [
        (Shown((picture(8, 8), "Digit?"), tuple("0123")),),
        (Shown(("Colour of ", picture(12, 16, 1), "?"), ("red", "sky", "green")),),
        (Shown(("Up?",), ("yes", "no!")),),
    ]


def conversation_scripts(choices: bool = False) -> list[Script]:
    """Two and three turns with new pictures in later ones, the shorter one truncated; with `choices`, every answer is
    one of them."""
    moves: tuple[str, ...] | None = ("up", "on") if choices else None
    return [
        (
            Shown(("Find the key.", picture(8, 8)), ("left", "up", "on")),
            Shown((picture(12, 8, 1), "closer"), moves),
            Shown(("And?",), ("take", "drop")),
        ),
        (
            Shown(("Go!",), moves, 4),
            Shown((picture(8, 16, 2), picture(8, 8, 3)), moves, 7),
            Shown(("Still ", picture(8, 12, 4)), moves, answered=False),
        ),
    ]


def choosing_of(scripts: Sequence[Script], choices: tuple[str, ...]) -> list[Script]:
    """The same scripts with the same choices in every turn."""
    return [tuple(replace(shown, choices=choices) for shown in script) for script in scripts]


def tiny_policy(
    heads: Mapping[str, Head] | None = None,
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
    model = adapter.load()
    separate = any(head.own_trunk for head in (heads or {}).values())
    return Policy(adapter, model, heads, temperature, copy.deepcopy(model) if separate else None).eval()


def request(
    adapter: ModelAdapter, media: MediaStore, turn: Shown, count: int = 1, history: Sequence[Segment] = ()
) -> Request:
    """What a rollout engine is asked for in a turn. history: the conversation before, which ends with an action."""
    renderer = Renderer(adapter, media)
    messages = (Message.user(*turn.parts),)
    if history:
        last = history[-1]
        assert isinstance(last, ActionSegment)
        context = (*history, renderer.continuation(messages, last, "conformance"))
    else:
        context = (renderer.opening(messages, "conformance"),)
    if turn.choices is None:
        return Request(context, count, turn.max_tokens, "conformance")
    entries = tuple(adapter.encode(choice) for choice in turn.choices)
    return Request(context, count, turn.max_tokens, "conformance", entries, turn.choices)


def play(policy: Policy, scripts: Sequence[Script], group_size: int = 1, seed: int | None = 0) -> list[Trajectory]:
    """`group_size` episodes of each script, group by group; greedy without a seed.

    Later members of a group may say more, so that the answers of a group differ in length. Scores are 0, ½ and 1 in
    turn, so that every group of two or more has returns that differ.
    """
    media, sampler = MediaStore(policy.adapter), Sampler(policy, MediaStore(policy.adapter))
    members = [(group, member) for group in range(len(scripts)) for member in range(group_size)]
    histories: list[tuple[Segment, ...]] = [() for _ in members]
    for turn in range(max(map(len, scripts))):
        going = [number for number, (group, _) in enumerate(members) if turn < len(scripts[group])]
        requests: dict[int, Request] = {}
        for number in going:
            group, member = members[number]
            asked = scripts[group][turn]
            longer = replace(asked, max_tokens=asked.max_tokens + member % 3)
            continued = request(policy.adapter, media, longer, history=histories[number])
            if asked.answered:
                requests[number] = continued
            else:
                histories[number] = continued.context
        answers = sampler.sample(list(requests.values()), None if seed is None else derive(seed, turn))
        for (number, asked_for), [action] in zip(requests.items(), answers, strict=True):
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
        for number, turn in enumerate(turn for turn in script if turn.answered):
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
    """The same trajectories with these returns, over and over: scores alone, and nothing from the environment."""
    return [
        replace(
            trajectory,
            turns=tuple(replace(turn, reward=0.0) for turn in trajectory.turns),
            score=scores[number % len(scores)],
        )
        for number, trajectory in enumerate(trajectories)
    ]


def pack(
    policy: Policy, trajectories: Sequence[Trajectory], *, packed: bool = False, shared: bool = True
) -> PolicyBatch:
    """The batch that the policy's `forward` takes."""
    builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter), packed=packed, shared=shared)
    for trajectory in trajectories:
        builder.add_trajectory(trajectory)
    return builder.build().to(policy.device)


def final_heads(policy: Policy, trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """[N, size] of each head in the state that each trajectory was left in; zeros where it was not truncated."""
    rows = []
    for trajectory in trajectories:
        builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
        builder.add_context(trajectory.final or trajectory.turns[0].context, trajectory.name)
        heads = policy.context_heads(builder.build().to(policy.device))
        rows.append({name: values * (trajectory.final is not None) for name, values in heads.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in policy.heads}


def _episode(group: int, segments: tuple[Segment, ...], score: float) -> Trajectory:
    """Each turn but the last earns a tenth; one that does not end with an action was truncated there."""
    left = isinstance(segments[-1], ContextSegment)
    turns = conversation(segments)
    earned = tuple(replace(turn, reward=0.1) for turn in turns[:-1])
    return Trajectory(
        Example(f"script {group}"),
        group,
        group,
        (*earned, turns[-1]),
        terminated=not left,
        truncation="environment" if left else None,
        final=segments if left else None,
        score=score,
    )
