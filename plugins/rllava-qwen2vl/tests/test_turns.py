"""Episodes of many turns against plain transformers: one forward over each whole episode, images and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.pool import LocalEnvironments
from rllava_core.mdp.trajectory import ContextSegment, Segment, Trajectory
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.training.episodes import Episodes, Limits
from rllava_qwen2vl.adapter import Qwen2VL
from rllava_qwen2vl.config import Qwen2VLOptions

SIZES = ((32, 32), (32, 48), (48, 32), (64, 40))
MOVES = ("left", "up", "go on")


class Rooms:
    """Shows a room of another size in every turn, asks for a move or for a word by turns, and ends after `turns`."""

    def __init__(self, turns: int, kinds: tuple[str, ...]) -> None:
        self.turns = turns
        self.kinds = kinds

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self._generator = np.random.default_rng(seed)
        self._turn = 0
        return self._show("Find the door.")

    def step(self, action: Action) -> Transition:
        self._turn += 1
        truncated = self._turn == self.turns
        return Transition(float(len(action.text)), self._show("And now?"), terminated=False, truncated=truncated)

    def _show(self, text: str) -> Observation:
        width, height = SIZES[self._turn % len(SIZES)]
        pixels = self._generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        message = Message.user(Image.from_array(pixels), text) if self._turn else Message.user(text)
        choices = MOVES if self.kinds[self._turn % len(self.kinds)] == "choice" else None
        return Observation((message,), choices)


def make_policy(seed: int = 0) -> Policy:
    adapter = Qwen2VL(Qwen2VLOptions(from_scratch="tiny"))
    torch.manual_seed(seed)
    return Policy(adapter, adapter.load(), temperature=1.3).eval()


def play(policy: Policy, turns: int, history: int | Literal["all"], kinds: tuple[str, ...]) -> list[Trajectory]:
    media = MediaStore(policy.adapter)
    sampler = LocalRolloutEngine(LocalRolloutConfig(), RolloutSetup(policy, media, torch.no_grad))
    environments = LocalEnvironments(lambda: Rooms(turns, kinds))
    limits = Limits(max_new_tokens=5, max_turns=50, max_episode_tokens=None, history=history)
    episodes = Episodes(policy.adapter, media, sampler, environments, limits)
    return episodes.play([Start(None, 3), Start(None, 4)], 2, seed=7)


def recompute(policy: Policy, trajectories: Sequence[Trajectory]) -> Tensor:
    builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
    for trajectory in trajectories:
        builder.add_trajectory(trajectory)
    logprobs: Tensor = policy(builder.build()).logprobs
    return logprobs


def plain_logits(policy: Policy, segments: Sequence[Segment]) -> Tensor:
    """[T, V] of one forward of the transformers model, which finds its own positions."""
    adapter: Any = policy.adapter
    tokens = torch.tensor([[token for segment in segments for token in segment.tokens]])
    images = [image for segment in segments if isinstance(segment, ContextSegment) for image in segment.images]
    media = adapter.collate([adapter.preprocess(image) for image in images]) if images else {}
    if media:
        media["mm_token_type_ids"] = (tokens == adapter.image_token).long()
    logits: Tensor = policy.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **media).logits[0]
    return (logits.float() / policy.temperature).masked_fill(policy.forbidden, -torch.inf)


def plain_logprobs(policy: Policy, trajectory: Trajectory) -> list[float]:
    """Of every decision, from forwards over what the policy saw and did in each turn; a forward a choice."""
    found: list[float] = []
    for turn in trajectory.turns:
        length = sum(len(segment.tokens) for segment in turn.context)

        def of(tokens: tuple[int, ...], length: int = length, context: Any = turn.context) -> Tensor:
            logprobs = plain_logits(policy, (*context, ContextSegment(tokens))).log_softmax(-1)
            return logprobs[length - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]

        if turn.action.choices is None:
            found += of(turn.action.tokens).tolist()
        else:
            scores = torch.stack([of(choice).sum() for choice in turn.action.choices])
            found.append(scores.log_softmax(0)[turn.action.choice].item())
    return found


@pytest.mark.parametrize("history", ["all", 1, 2])
@pytest.mark.parametrize("kinds", [("text",), ("choice",), ("text", "choice")])
def test_packed_log_probs_equal_plain_forwards_over_whole_episodes(history: Any, kinds: tuple[str, ...]) -> None:
    policy = make_policy()
    trajectories = play(policy, 4, history, kinds)
    with torch.no_grad():
        packed = recompute(policy, trajectories)
        plain = [value for trajectory in trajectories for value in plain_logprobs(policy, trajectory)]
    assert len({image.size for trajectory in trajectories for image in trajectory.turns[-1].observation.images}) == 1
    assert (packed - torch.tensor(plain)).abs().max() < 1e-5


def test_with_the_whole_history_one_forward_over_the_episode_has_every_turn() -> None:
    policy = make_policy()
    [trajectory, *_] = play(policy, 4, "all", ("text",))
    last = trajectory.turns[-1]
    with torch.no_grad():
        logprobs = plain_logits(policy, (*last.context, last.action)).log_softmax(-1)
        packed = recompute(policy, [trajectory]).tolist()
    plain, end = [], 0
    for segment in (*last.context, last.action):
        if not isinstance(segment, ContextSegment):
            plain += [logprobs[end + step - 1, token].item() for step, token in enumerate(segment.tokens)]
        end += len(segment.tokens)
    assert packed == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("history", ["all", 1])
@pytest.mark.parametrize("kinds", [("text", "choice")])
def test_behaviour_log_probs_equal_recomputed_ones_over_twenty_turns(history: Any, kinds: tuple[str, ...]) -> None:
    policy = make_policy()
    trajectories = play(policy, 20, history, kinds)
    assert [len(trajectory.turns) for trajectory in trajectories] == [20] * 4
    with torch.no_grad():
        recomputed = recompute(policy, trajectories)
    behaviour = np.concatenate([trajectory.behaviour_logprobs for trajectory in trajectories])
    assert np.abs(recomputed.numpy() - behaviour).max() < 1e-4


@pytest.mark.parametrize("history", ["all", 1])
@pytest.mark.parametrize("kinds", [("text",), ("choice",)])
def test_every_action_token_of_every_turn_has_a_gradient_and_no_other_token(
    history: Any, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are made only where an action was decided, once for each of its tokens, and all of them are pushed."""
    policy = make_policy()
    trajectories = play(policy, 4, history, kinds)
    rows: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        rows.append(output)

    # The gradient of a plain linear layer is written out, and has no logits of autograd's.
    head = nn.Sequential(policy.adapter.lm_head(policy.model))
    head.register_forward_hook(keep)
    monkeypatch.setattr(policy.adapter, "lm_head", lambda model: head)
    for trajectory in trajectories:
        rows.clear()
        recompute(policy, [trajectory]).sum().backward()
        [gradients] = [row.grad for row in rows if row.grad is not None]
        if kinds == ("text",):
            decided = sum(len(action.tokens) for action in trajectory.actions)
        else:  # the first tokens of all choices share a state; "left", "up" and "go on" have 3, 1 and 4 more
            decided = 4 * (1 + 3 + 1 + 4)
        assert gradients.shape[0] == decided
        assert (gradients.abs().sum(1) > 0).all()
