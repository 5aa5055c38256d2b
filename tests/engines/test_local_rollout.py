"""The local rollout engine: samples of the very weights that are trained, a bounded number at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, Sampler


def engine_of(policy: Policy, limit: int = 512, autocast: Any = nullcontext) -> LocalRolloutEngine:
    setup = RolloutSetup(policy, MediaStore(policy.adapter), autocast)
    return LocalRolloutEngine(LocalRolloutConfig(max_sequences=limit), setup)


def requests_of(bench: Any, counts: list[int]) -> list[Request]:
    """Groups of these sizes, every second one with choices."""
    requests = []
    for number, count in enumerate(counts):
        context = (bench.context(f"Question {number}?", bench.picture(seed=number)),)
        if number % 2:
            choices = ((ord("a"),), (ord("b"), ord("c")))
            requests.append(Request(context, count, 1, f"example {number}", choices, ("a", "bc")))
        else:
            requests.append(Request(context, count, 5, f"example {number}"))
    return requests


def answers(actions: list[list[ActionSegment]]) -> list[list[tuple[int, ...]]]:
    return [[action.tokens for action in group] for group in actions]


def test_the_same_seed_gives_the_same_actions(bench: Any) -> None:
    engine = engine_of(bench.policy())
    requests = requests_of(bench, [4, 4, 4])

    assert answers(engine.generate(requests, 7)) == answers(engine.generate(requests, 7))
    assert answers(engine.generate(requests, 7)) != answers(engine.generate(requests, 8))


def test_without_a_seed_actions_are_the_greedy_ones(bench: Any) -> None:
    [group, choices] = engine_of(bench.policy()).generate(requests_of(bench, [4, 4]), None)

    assert len({action.tokens for action in group}) == len({action.choice for action in choices}) == 1
    for action in choices:
        assert action.logprobs[0] >= torch.tensor(0.5).log()  # the likelier of two


@pytest.mark.parametrize(
    ("limit", "chunks"),
    [
        (1, [[4], [3], [9], [1], [2]]),
        (7, [[4, 2], [3, 1], [9]]),
        (8, [[4, 2], [3, 1], [9]]),
        (13, [[4, 9], [3, 1], [2]]),
        (16, [[4, 9, 2], [3, 1]]),
    ],
)
def test_no_more_sequences_than_allowed_are_decoded_at_once(
    bench: Any, monkeypatch: pytest.MonkeyPatch, limit: int, chunks: list[list[int]]
) -> None:
    """Groups stay whole, so one that is larger goes alone; texts and choices are not mixed."""
    seen: list[list[int]] = []
    original = Sampler._answer

    def spy(self: Sampler, requests: list[Request], *others: Any) -> Any:
        seen.append([request.count for request in requests])
        return original(self, requests, *others)

    monkeypatch.setattr(Sampler, "_answer", spy)
    requests = requests_of(bench, [4, 3, 9, 1, 2])

    actions = engine_of(bench.policy(), limit).generate(requests, 0)

    assert seen == chunks
    assert [len(group) for group in actions] == [4, 3, 9, 1, 2]


@pytest.mark.parametrize("limit", [1, 7, 512])
def test_greedy_actions_do_not_depend_on_the_limit(bench: Any, limit: int) -> None:
    requests = requests_of(bench, [4, 3, 9, 1, 2])
    expected = engine_of(bench.policy()).generate(requests, None)

    assert answers(engine_of(bench.policy(), limit).generate(requests, None)) == answers(expected)


def test_after_a_sync_the_new_weights_sample(bench: Any) -> None:
    requests = requests_of(bench, [1, 1, 1, 1])
    engine, other = engine_of(bench.policy()), bench.policy(seed=1)
    before = answers(engine.generate(requests, None))

    engine.sync(other)

    after = answers(engine.generate(requests, None))
    assert after == answers(engine_of(other).generate(requests, None)) != before


def test_weights_that_are_trained_in_place_need_no_copy(bench: Any) -> None:
    policy = bench.policy()
    engine = engine_of(policy)
    requests = requests_of(bench, [1, 1])
    before = engine.generate(requests, None)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.5)

    after = engine.generate(requests, None)

    assert (before[0][0].logprobs != after[0][0].logprobs).all()


def test_sampling_has_the_precision_of_training(bench: Any) -> None:
    inside = [False]
    seen: list[bool] = []

    @contextmanager
    def autocast() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    policy = bench.policy()
    policy.model.lm_head.register_forward_hook(lambda *ignored: seen.append(inside[-1]))

    engine_of(policy, autocast=autocast).generate(requests_of(bench, [2, 2]), 0)

    assert seen
    assert all(seen)
    assert inside == [False, True, False]
