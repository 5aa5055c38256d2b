"""Sampling draws from the distribution that it reports, which is the one that is trained."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.errors import ModelError
from rllava_core.policy.sampling import Request
from rllava_core.testing.tiny import END, IMAGE, PAD, START

from .asking import ROUNDING, ask, ask_choices, assert_frequencies, draw


@pytest.fixture
def requests(toy: Any) -> list[Request]:
    """Text and choices, images of several sizes and none, one turn and several."""
    first, second = toy.picture(8, 8), toy.picture(12, 8, 1)
    return [
        ask(toy.context("Colour?", first), count=3),
        ask_choices(toy.context("Is it red?", first), choices=("yes", "no", "n", "maybe"), count=3),
        ask(toy.context("A much longer question, ", second, " and ", first, ", is it?"), count=2, max_tokens=3),
        ask_choices(toy.context("Digit?", second), choices=tuple("0123456789"), count=4),
        ask(toy.context("?"), count=1, max_tokens=12),
        ask(toy.context("Go.", first), toy.text("left"), toy.context(second, "closer"), count=3),
        ask_choices(toy.context("Go."), toy.choice(0, "l", "r"), toy.context(second), choices=("on", "back"), count=2),
    ]


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("seed", [3, None], ids=["drawn", "greedy"])
def test_recorded_logprobs_are_those_of_the_plain_model(
    toy: Any, requests: list[Request], precision: torch.dtype, temperature: float, seed: int | None
) -> None:
    policy = toy.policy(temperature, bias={END: 2.0}, precision=precision)
    exact = toy.policy(bias={END: 0.0}).model
    exact.load_state_dict({name: values.double() for name, values in policy.model.state_dict().items()})
    plain = toy.Plain(exact, temperature)

    answers = draw(policy, requests, seed)

    assert [len(actions) for actions in answers] == [request.count for request in requests]
    for request, actions in zip(requests, answers, strict=True):
        for action in actions:
            alone = toy.episode(*request.context, action)
            expected = plain.decisions(alone).logprobs[-action.decisions :].detach().numpy()
            assert action.logprobs.dtype == np.float32
            tolerance = {"rtol": ROUNDING, "atol": 0} if precision == torch.float64 else {"rtol": 0, "atol": 1e-5}
            np.testing.assert_allclose(action.logprobs, expected, **tolerance)


def test_greedy_text_is_the_most_probable_token_one_by_one(toy: Any) -> None:
    policy = toy.policy(bias={END: 2.5})
    plain = toy.Plain(policy.model)
    pictures = [toy.picture(4 + 4 * (seed % 3), 8, seed) for seed in range(16)]
    contexts = [toy.context(picture, "colours?"[seed % 5 :]) for seed, picture in enumerate(pictures)]
    requests = [ask(context, max_tokens=4) for context in contexts]

    answers = draw(policy, requests, None)

    expected = [plain.greedy(request.context, 4) for request in requests]
    assert [list(action.tokens) for [action] in answers] == expected
    assert {len(tokens) for tokens in expected} == {1, 2, 4}
    assert {tokens[-1] == END for tokens in expected if len(tokens) == 4} == {True, False}


def test_greedy_choices_are_the_most_probable_ones(toy: Any) -> None:
    policy = toy.policy()
    plain = toy.Plain(policy.model)
    choices = ("red", "bat", "ale", "fig")
    requests = [
        ask_choices(toy.context("colour?"[seed % 5 :], toy.picture(8, 8, seed)), choices=choices) for seed in range(12)
    ]

    chosen = [action.choice for [action] in draw(policy, requests, None)]

    entries = [choice.encode() for choice in choices]
    prompts = [request.context[0] for request in requests]
    assert chosen == [int(plain.choices(prompt.tokens, prompt.images, entries)[0].argmax()) for prompt in prompts]
    assert len(set(chosen)) > 1


def test_a_sampled_choice_says_what_was_chosen_and_among_what(toy: Any) -> None:
    [[action]] = draw(toy.policy(), [ask_choices(toy.context("?"), choices=("red", "green"))])

    assert action.choice in (0, 1)
    assert action.choices == (tuple(b"red"), tuple(b"green"))
    assert action.tokens == action.choices[action.choice]
    assert action.text == ("red", "green")[action.choice]
    assert action.ended
    assert action.decisions == 1


def test_the_same_seed_draws_the_same_and_another_seed_another(toy: Any, requests: list[Request]) -> None:
    policy = toy.policy()

    def drawn(seed: int) -> list[tuple[int, ...]]:
        return [action.tokens for actions in draw(policy, requests, seed) for action in actions]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_sampling_leaves_the_global_random_state_alone(toy: Any, requests: list[Request]) -> None:
    policy = toy.policy()
    before = torch.get_rng_state()

    draw(policy, requests, 3)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, None], ids=["drawn", "greedy"])
def test_a_sampled_image_placeholder_is_impossible_however_much_the_model_wants_it(toy: Any, seed: int | None) -> None:
    policy = toy.policy(bias={IMAGE: 60.0, PAD: 70.0, START: 65.0})

    answers = draw(policy, [ask(toy.context("?", toy.picture(8, 8)), count=40)], seed)

    sampled = {token for action in answers[0] for token in action.tokens}
    assert not sampled & {IMAGE, PAD, START}
    plain = toy.Plain(policy.model)
    for action in answers[0][:3]:
        expected = plain.decisions(toy.episode(toy.context("?", toy.picture(8, 8)), action)).logprobs.detach().numpy()
        np.testing.assert_allclose(action.logprobs, expected, rtol=ROUNDING)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_texts_come_as_often_as_their_probabilities_say(toy: Any, temperature: float) -> None:
    """Four possible tokens and answers of at most two, so that all thirteen answers can be counted."""
    letters = [ord("a"), ord("b"), ord("c"), END]
    policy = toy.policy(temperature, bias=dict.fromkeys(letters, 0.0), others=-100.0)
    prompt = toy.context("?", toy.picture(8, 8))
    plain = toy.Plain(policy.model, temperature)
    first = plain.next_token(prompt.tokens, prompt.images)[0][-1].exp().detach()
    probabilities = {(END,): float(first[END])}
    for one in letters[:3]:
        second = plain.next_token([*prompt.tokens, one], prompt.images)[0][-1].exp().detach()
        probabilities |= {(one, two): float(first[one] * second[two]) for two in letters}

    [actions] = draw(policy, [ask(prompt, count=4000, max_tokens=2)], seed=11)

    assert_frequencies(Counter(action.tokens for action in actions), probabilities)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_choices_come_as_often_as_their_probabilities_say(toy: Any, temperature: float) -> None:
    policy = toy.policy(temperature)
    choices = ("a", "bc", "d", "x", "7")
    prompt = toy.context("?", toy.picture(8, 8))
    scores, _ = toy.Plain(policy.model, temperature).choices(
        prompt.tokens, prompt.images, [choice.encode() for choice in choices]
    )

    [actions] = draw(policy, [ask_choices(prompt, choices=choices, count=4000)], seed=11)

    assert_frequencies(Counter(action.choice for action in actions), dict(enumerate(scores.exp().tolist())))


def test_an_answer_ends_with_the_end_of_turn_or_at_its_own_limit(toy: Any) -> None:
    policy = toy.policy(bias={END: 4.0})
    limits = (1, 2, 5)
    requests = [ask(toc, count=60, max_tokens=limit) for toc, limit in zip([toy.context("?")] * 3, limits, strict=True)]

    for limit, actions in zip(limits, draw(policy, requests), strict=True):
        for action in actions:
            assert 1 <= len(action.tokens) == len(action.logprobs) <= limit
            assert END not in action.tokens[:-1]
            assert action.ended == (action.tokens[-1] == END)
            assert action.ended or len(action.tokens) == limit
            shown = [token for token in action.tokens if token != END]
            assert action.text == bytes(shown).decode(errors="replace")
        at_the_limit = {action.ended for action in actions if len(action.tokens) == limit}
        assert at_the_limit == {True, False}


def test_any_of_several_end_of_turn_tokens_ends_the_answer(toy: Any) -> None:
    policy = toy.policy(bias={END: 0.0, ord("."): 0.0, ord("a"): 1.0}, others=-100.0)
    policy.adapter.end_of_turn = (END, ord("."))

    [actions] = draw(policy, [ask(toy.context("?"), count=60, max_tokens=20)])

    assert {action.tokens[-1] for action in actions} == {END, ord(".")}
    assert all(action.ended for action in actions)
    assert {character for action in actions for character in action.text} == {"a"}


def test_a_context_is_prefilled_once_for_all_its_samples(toy: Any) -> None:
    policy = toy.policy(bias={END: -100.0})
    prompt, other = toy.context("Colour?", toy.picture(8, 8)), toy.context("?", toy.picture(8, 12, 1))

    draw(policy, [ask(prompt, count=5, max_tokens=3), ask(other, count=2, max_tokens=3), ask(prompt, max_tokens=3)])

    prefill, *steps = policy.adapter.runs
    assert prefill == ((2, len(prompt.tokens)), 4 + 6)
    assert steps == [((8, 1), 0)] * 2  # the first token is the prefill's, the last is only drawn


def test_choices_of_one_token_need_one_pass_for_the_whole_group(toy: Any) -> None:
    policy = toy.policy()
    prompt = toy.context("Digit?", toy.picture(8, 8))

    draw(policy, [ask_choices(prompt, choices=tuple("0123456789"), count=16)])

    assert policy.adapter.runs == [((1, len(prompt.tokens)), 4)]


def test_answers_that_have_ended_leave_the_batch(toy: Any) -> None:
    policy = toy.policy(bias={END: 3.5})
    requests = [ask(toy.context("?"), count=30, max_tokens=6), ask(toy.context("Colour?"), count=5, max_tokens=2)]

    answers = draw(policy, requests)

    lengths = [len(action.tokens) for actions in answers for action in actions]
    _, *steps = policy.adapter.runs
    assert [rows for (rows, _), _ in steps] == [
        sum(length > step for length in lengths) for step in range(1, max(lengths))
    ]
    assert len(set(lengths)) > 3


def test_neighbours_in_the_batch_do_not_change_an_answer(toy: Any, requests: list[Request]) -> None:
    policy = toy.policy()
    together = draw(policy, requests, None)

    for request, actions in zip(requests, together, strict=True):
        [alone] = draw(policy, [request], None)
        assert [action.tokens for action in actions] == [action.tokens for action in alone]


def test_a_context_that_is_too_long_is_refused_by_name_and_never_cut(toy: Any) -> None:
    policy = toy.policy()
    prompt = toy.context("x" * 240)
    room = policy.adapter.context_length - len(prompt.tokens)

    [[action]] = draw(toy.policy(bias={END: -100.0}), [ask(prompt, max_tokens=room)])
    assert len(action.tokens) == room
    with pytest.raises(ModelError, match=r"train\.jsonl:12: 257 tokens, the model's context is 256"):
        draw(policy, [ask(toy.context("?")), ask(prompt, max_tokens=room + 1, name="train.jsonl:12")])

    fits = ("y", "n" * room)
    draw(policy, [ask_choices(prompt, choices=fits)])
    with pytest.raises(ModelError, match=r"train\.jsonl:12: 257 tokens"):
        draw(policy, [ask_choices(prompt, choices=("y", "n" * (room + 1)), name="train.jsonl:12")])


def test_a_later_turn_is_refused_for_the_length_of_the_whole_conversation(toy: Any) -> None:
    long = toy.context("x" * 120)
    with pytest.raises(ModelError, match="example 7"):
        draw(toy.policy(), [ask(long, toy.text("go"), long, max_tokens=20)])


def test_sampling_keeps_no_graph_and_changes_no_weight(toy: Any, requests: list[Request]) -> None:
    policy = toy.policy()
    before = copy.deepcopy(policy.state_dict())
    graphs: list[bool] = []
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))

    draw(policy, requests)

    assert graphs
    assert not any(graphs)
    assert all(torch.equal(before[name], values) for name, values in policy.state_dict().items())


def test_what_was_sampled_scores_the_same_in_the_training_batch(toy: Any, requests: list[Request]) -> None:
    """The same pixels, positions and masks in rollout and update; peers report gaps of 0.2 nat with images."""
    policy = toy.policy(0.7)
    answers = draw(policy, requests)
    trajectories = [
        toy.episode(*request.context, action)
        for request, actions in zip(requests, answers, strict=True)
        for action in actions
    ]
    # Later turns: earlier actions are decisions too, but were not drawn here.
    drawn = list(itertools.chain.from_iterable(actions for actions in answers))

    logprobs = policy(toy.pack(policy, trajectories)).logprobs.detach().numpy()

    ends = np.cumsum([trajectory.decisions for trajectory in trajectories])
    for action, end in zip(drawn, ends, strict=True):
        np.testing.assert_allclose(action.logprobs, logprobs[end - action.decisions : end], rtol=ROUNDING)


def test_an_answer_is_a_function_of_the_seed_and_the_number_of_its_episode(toy: Any, requests: list[Request]) -> None:
    """However requests are put together: in one call, one by one, backwards, or with groups cut in two."""
    policy = toy.policy(bias={END: 1.0})
    numbers = iter(range(100, 200, 3))
    asked = [replace(item, numbers=tuple(next(numbers) for _ in range(item.count))) for item in requests]
    together = {
        number: action
        for request, actions in zip(asked, draw(policy, asked), strict=True)
        for number, action in zip(request.numbers, actions, strict=True)
    }

    apart = [replace(item, count=1, numbers=(number,)) for item in reversed(asked) for number in item.numbers]
    for request in apart:
        [[alone]] = draw(policy, [request])
        assert alone.tokens == together[request.numbers[0]].tokens
    for request, [action] in zip(apart, draw(policy, apart), strict=True):
        assert action.tokens == together[request.numbers[0]].tokens
    others = draw(policy, [replace(item, numbers=tuple(n + 1 for n in item.numbers)) for item in asked])
    assert [[action.tokens for action in actions] for actions in others] != [
        [together[number].tokens for number in item.numbers] for item in asked
    ]


def test_numbers_are_as_many_as_actions(toy: Any) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl:12: 1 numbers for 2 actions"):
        draw(toy.policy(), [replace(ask(toy.context("?"), count=2, name="train.jsonl:12"), numbers=(4,))])
