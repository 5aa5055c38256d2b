"""Nothing is trained on that does not fit together; the error names the trajectory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.errors import InvariantError, ModelError
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Turn
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.checks import check_length, check_recomputed
from rllava_core.policy.media import MediaStore
from rllava_core.testing.tiny import END, IMAGE, PAD, START

WHERE = r"train\.jsonl:12"
QUESTION = ContextSegment((START, ord("?"), END, START))


def refuse(toy: Any, *segments: Segment, match: str, error: type[Exception] = InvariantError) -> None:
    """A good trajectory is taken; the one of these segments is refused with its name."""
    policy = toy.policy()
    builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
    builder.add_trajectory(toy.episode(toy.context("?", toy.picture(8, 8)), toy.text("yes"), name="another"))
    with pytest.raises(error, match=f"^{WHERE}.*{match}"):
        builder.add_trajectory(toy.episode(*segments, name="train.jsonl:12"))


def refuse_changed(toy: Any, match: str, **changes: Any) -> None:
    """A good trajectory with these changes is refused with its name."""
    good = toy.episode(QUESTION, action(), QUESTION, action(), name="train.jsonl:12")
    toy.pack(toy.policy(), [good])
    with pytest.raises(InvariantError, match=f"^{WHERE}.*{match}"):
        toy.pack(toy.policy(), [replace(good, **changes)])


def action(tokens: tuple[int, ...] = (ord("a"), END), logprobs: Any = None, **options: Any) -> ActionSegment:
    recorded = np.full(len(tokens), -1.0) if logprobs is None else np.array(logprobs)
    return ActionSegment(tokens, recorded.astype(np.float32), "a", **options)


@pytest.mark.parametrize("placeholders", [0, 3, 5, 8])
def test_image_tokens_that_are_not_the_image_features(toy: Any, placeholders: int) -> None:
    """As after a truncation through an image, or with a placeholder in the text."""
    prompt = ContextSegment((START, *[IMAGE] * placeholders, END, START), (toy.picture(8, 8),))
    refuse(toy, prompt, action(), match=rf": {placeholders} image tokens for 1 images with 4 features")


def test_a_placeholder_without_an_image(toy: Any) -> None:
    prompt = ContextSegment((START, IMAGE, END, START))
    refuse(toy, prompt, action(), match=": 1 image tokens for 0 images with 0 features")


def test_a_later_observation_whose_image_does_not_fit(toy: Any) -> None:
    later = ContextSegment((START, *[IMAGE] * 4, END, START), (toy.picture(8, 12),))
    refuse(toy, QUESTION, action(), later, action(), match=": 4 image tokens for 1 images with 6 features")


def test_a_context_to_sample_from_is_checked_alike(toy: Any) -> None:
    policy = toy.policy()
    builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
    with pytest.raises(InvariantError, match=f"^{WHERE}: 1 image tokens"):
        builder.add_context([ContextSegment((START, IMAGE))], "train.jsonl:12")


def test_a_trajectory_that_is_longer_than_the_context(toy: Any) -> None:
    fits = toy.context("x" * 240)
    room = toy.adapter().context_length - len(fits.tokens)
    toy.pack(toy.policy(), [toy.episode(fits, action((ord("a"),) * room))])

    too_long = action((ord("a"),) * (room + 1))
    refuse(toy, fits, too_long, match=": 257 tokens, the model's context is 256", error=ModelError)


def test_the_limit_itself_is_allowed(toy: Any) -> None:
    adapter = toy.adapter()
    check_length(adapter.context_length, adapter, "it")
    with pytest.raises(ModelError, match=r"^it: 257 tokens"):
        check_length(adapter.context_length + 1, adapter, "it")


def test_a_prompt_without_tokens(toy: Any) -> None:
    """There would be no state to decide in."""
    refuse(toy, ContextSegment(()), action(), match=": a prompt or observation without tokens")


def test_a_trajectory_that_begins_with_an_action(toy: Any) -> None:
    refuse(toy, action(), QUESTION, action(), match="turn 1: what the policy sees begins and ends with what the")


def test_a_turn_that_begins_with_an_action(toy: Any) -> None:
    turns = (Turn((QUESTION,), action()), Turn((action(), QUESTION), action()))
    refuse_changed(toy, "turn 2: what the policy sees begins and ends with what the", turns=turns)


def test_a_turn_in_which_nothing_new_is_shown(toy: Any) -> None:
    turns = (Turn((QUESTION,), action()), Turn((QUESTION, action()), action()))
    refuse_changed(toy, "turn 2: what the policy sees begins and ends with what the", turns=turns)


def test_a_trajectory_without_turns(toy: Any) -> None:
    refuse_changed(toy, ": a trajectory without turns", turns=())


def test_a_terminated_episode_that_was_left_in_a_state(toy: Any) -> None:
    refuse_changed(toy, ": a terminated episode has no state in which it was left", final=(QUESTION,))


@pytest.mark.parametrize("final", [(), (QUESTION, action())])
def test_a_state_that_shows_nothing_new(toy: Any, final: tuple[Segment, ...]) -> None:
    refuse_changed(toy, ": what the policy sees begins and ends with", final=final, terminated=False)


def test_a_state_that_is_longer_than_the_context(toy: Any) -> None:
    """Nothing is sampled in it, so it may fill the context to the last token."""
    room = toy.adapter().context_length - len(toy.context("").tokens)
    for more in (0, 1):
        final = (toy.context("x" * (room + more)),)
        left = replace(toy.episode(QUESTION, action(), name="train.jsonl:12"), terminated=False, final=final)
        if more == 0:
            toy.pack(toy.policy(), [left])
        else:
            with pytest.raises(ModelError, match=f"^{WHERE}: 257 tokens"):
                toy.pack(toy.policy(), [left])


def test_an_action_without_tokens(toy: Any) -> None:
    refuse(toy, QUESTION, action(), QUESTION, action(()), match="turn 2: an action without tokens")


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, -1.0, -1.0], [[-1.0, -1.0]], []])
def test_another_number_of_logprobs_than_decisions(toy: Any, logprobs: Any) -> None:
    refuse(toy, QUESTION, action(logprobs=logprobs), match="turn 1: .* log-probs for 2 decisions")


def test_a_choice_has_one_logprob(toy: Any) -> None:
    chosen = action((1, 2), choice=0, choices=((1, 2), (3,)))
    refuse(toy, QUESTION, chosen, match=r"turn 1: \(2,\) log-probs for 1 decisions")


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf, 0.01])
def test_a_logprob_that_is_none(toy: Any, value: float) -> None:
    refuse(toy, QUESTION, action(logprobs=[-1.0, value]), match="turn 1: .*finite and not positive")


def test_a_logprob_of_certainty_may_be_off_by_rounding(toy: Any) -> None:
    toy.pack(toy.policy(), [toy.episode(QUESTION, action(logprobs=[0.0, 1e-6]))])


@pytest.mark.parametrize(("choice", "choices"), [(2, ((1,), (2,))), (-1, ((1,), (2,))), (0, None)])
def test_a_choice_that_is_not_among_the_choices(toy: Any, choice: int, choices: Any) -> None:
    refuse(toy, QUESTION, action((1,), choice=choice, choices=choices), match=f"turn 1: choice {choice} of ")


def test_a_choice_with_the_tokens_of_another(toy: Any) -> None:
    chosen = action((1,), choice=1, choices=((1,), (2,)))
    refuse(toy, QUESTION, chosen, match="turn 1: the tokens are not those of choice 1")


@pytest.mark.parametrize("token", [IMAGE, PAD, START])
def test_a_token_that_may_not_be_sampled(toy: Any, token: int) -> None:
    sampled = action((ord("a"), token, END))
    refuse(toy, QUESTION, action(), QUESTION, sampled, match=rf"turn 2: .*may not be sampled: \[{token}\]")


def test_an_episode_without_an_example_is_named_by_its_seed(toy: Any) -> None:
    trajectory = replace(toy.episode(QUESTION, action(())), example=None, seed=41)
    with pytest.raises(InvariantError, match=r"^episode with seed 41"):
        toy.pack(toy.policy(), [trajectory])


def test_recomputed_logprobs_that_agree_give_their_mean_gap(toy: Any) -> None:
    trajectories = [
        toy.episode(QUESTION, action(logprobs=[-1.0, -2.0])),
        toy.episode(QUESTION, action((ord("b"), ord("c"), END), logprobs=[-0.5, -0.5, -3.0])),
    ]
    recomputed = torch.tensor([-1.1, -2.0, -0.5, -0.1, -3.5], requires_grad=True)

    gaps = check_recomputed(trajectories, recomputed, toy.policy().adapter, limit=0.21)

    assert gaps.mean == pytest.approx((0.1 + 0.4 + 0.5) / 5, abs=1e-6)
    assert gaps.largest == pytest.approx(0.5, abs=1e-6)
    assert gaps.ratio == pytest.approx((math.exp(0.1) + 2 + math.exp(0.4) + math.exp(0.5)) / 5, abs=1e-6)
    with pytest.raises(
        InvariantError, match=r"differ by up to 0\.5 nats \(training\.max_token_gap is 0\.45\); worst on"
    ):
        check_recomputed(trajectories, recomputed, toy.policy().adapter, 0.21, 0.45)


# Decisions of three trajectories: 0 and 1, 2 to 4, 5 and 6.
@pytest.mark.parametrize(("worst", "culprit"), [(0, "a"), (1, "a"), (2, "b"), (4, "b"), (5, "c"), (6, "c")])
@pytest.mark.parametrize("gap", [9.0, -9.0])
def test_recomputed_logprobs_that_differ_name_the_worst_trajectory(
    toy: Any, worst: int, culprit: str, gap: float
) -> None:
    trajectories = [
        toy.episode(QUESTION, action(), name="a"),
        toy.episode(QUESTION, action((ord("b"), ord("c"), END)), name="b"),
        toy.episode(QUESTION, action(), name="c"),
    ]
    recomputed = torch.full((7,), -1.2)
    recomputed[worst] += gap

    place = worst - {"a": 0, "b": 2, "c": 5}[culprit] + 1
    expected = rf"worst on {culprit}, token {place} '.*': -1\.0000 sampled, {recomputed[worst]:.4f} recomputed; "
    with pytest.raises(InvariantError, match=expected):
        check_recomputed(trajectories, recomputed, toy.policy().adapter, limit=0.5)


@pytest.mark.parametrize("broken", [[1], [0, 1]])
def test_recomputed_logprobs_that_are_not_numbers_are_refused(toy: Any, broken: list[int]) -> None:
    recomputed = torch.full((2,), -1.0)
    recomputed[broken] = torch.nan
    with pytest.raises(InvariantError, match="worst on train"):
        check_recomputed(
            [toy.episode(QUESTION, action(), name="train.jsonl:12")], recomputed, toy.policy().adapter, 0.5
        )
