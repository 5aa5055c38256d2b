"""Checks of engines that sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from rllava_core.errors import ModelError
from rllava_core.mdp.trajectory import ActionSegment, Segment, Trajectory, Turn
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy
from rllava_core.policy.sampling import Request, Sampler
from rllava_core.testing.conformance import ConformanceError, require
from rllava_core.testing.engines_base import EngineSuite, recomputed, same_weights, weights_of
from rllava_core.testing.rollouts import Shown, picture, request

DRAWS = 2000
DEVIATIONS = 5.0
"""A frequency is off by more than five standard deviations once in two million times, and the seed is fixed."""


class RolloutChecks(EngineSuite):
    """The half of the suite for engines that provide `rollout`."""

    def test_every_request_gets_its_actions_in_order(self) -> None:
        engine = self.sampler()
        for counts in ((3, 1, 4, 2, 1), (1, 1, 1, 1, 1), (1, 5, 2, 1, 9)):
            requests = self.requests(counts)
            answers = engine.generate(requests, 0)
            found = [len(actions) for actions in answers]
            require(found == list(counts), f"generate() gave {found} actions for requests of {list(counts)}")
            self._require_fitting(requests, answers)

    def test_the_same_seed_gives_the_same_actions_and_another_seed_others(self) -> None:
        engine, requests = self.sampler(), self.requests()
        first, again, other = (_tokens(engine.generate(requests, seed)) for seed in (7, 7, 8))
        require(first == again, "the same seed gave other actions: a resumed run would not be the same run")
        require(first != other, "another seed gave the same actions: every step would sample the same")
        # The global random state belongs to the algorithm.
        torch.manual_seed(99)
        require(_tokens(engine.generate(requests, 7)) == first, "actions depend on torch's global random state")

    def test_the_members_of_a_group_are_drawn_one_by_one(self) -> None:
        requests = self.requests((8, 1, 1, 8, 1))
        answers = self.sampler().generate(requests, 0)
        distinct = [len({action.tokens for action in answers[number]}) for number in (0, 3)]
        require(min(distinct) > 1, f"groups of 8 hold {distinct} different actions: one was copied to all")

    def test_without_a_seed_actions_are_the_most_probable_ones(self) -> None:
        policy = self.policy()
        engine, requests = self.sampler(policy), self.requests()
        found = _tokens(engine.generate(requests, None))
        require(found == _tokens(engine.generate(requests, None)), "without a seed two calls gave different actions")
        expected = _tokens(Sampler(self.policy(), MediaStore(policy.adapter)).sample(requests, None))
        require(found == expected, f"without a seed actions are {found}; the most probable ones are {expected}")

    def test_neighbours_do_not_change_an_answer(self) -> None:
        engine, requests = self.sampler(), self.requests()
        together = _tokens(engine.generate(requests, None))
        alone = [_tokens(engine.generate([asked], None))[0] for asked in requests]
        require(together == alone, "a greedy answer depends on the requests that are sampled beside it")

    def test_answers_end_with_the_end_of_turn_or_at_their_limit(self) -> None:
        policy = self.policy()
        media, adapter = MediaStore(policy.adapter), policy.adapter
        limits = (1, 2, 5)
        requests = [request(adapter, media, Shown(("Go on?",), max_tokens=limit), 30) for limit in limits]
        answers = self.sampler(policy).generate(requests, 3)
        for limit, actions in zip(limits, answers, strict=True):
            for action in actions:
                ended = action.tokens[-1] in adapter.end_of_turn
                count = len(action.tokens)
                require(count <= limit, f"an answer has {count} tokens, its max_tokens is {limit}")
                early = any(token in adapter.end_of_turn for token in action.tokens[:-1])
                require(not early, f"an answer goes on after the end of its turn: {action.tokens}")
                last = action.tokens[-1]
                require(action.ended == ended, f"`ended` is {action.ended} of an answer that ends with token {last}")
                require(ended or count == limit, f"an answer was cut at {count} tokens, its max_tokens is {limit}")
                text = adapter.decode(action.tokens[:-1] if ended else action.tokens)
                require(action.text == text, f"an answer's text is {action.text!r}; its tokens decode to {text!r}")

    def test_log_probs_are_those_of_the_policy(self) -> None:
        """While training, the log-probs of the sampling policy are the old ones, and are not computed again."""
        policy = self.policy()
        engine, requests = self.sampler(policy), self.requests()
        for seed in (0, None):
            self._require_logprobs(engine, requests, self.policy(), seed, "")

    def test_nothing_forbidden_is_sampled(self) -> None:
        policy = self.policy()
        asked = request(policy.adapter, MediaStore(policy.adapter), Shown((picture(), "?"), max_tokens=8), 20)
        [actions] = self.sampler(policy).generate([asked], 0)
        sampled = {token for action in actions for token in action.tokens}
        bad = sorted(sampled.intersection(policy.adapter.forbidden_tokens))
        require(not bad, f"forbidden tokens {bad[:5]} were sampled: image placeholders would be, too")

    def test_choices_come_as_often_as_the_policy_says(self) -> None:
        policy = self.policy()
        turn = Shown((picture(), "?"), ("ab", "cd", "yz", "qr"))
        asked = request(policy.adapter, MediaStore(policy.adapter), turn, DRAWS)
        assert asked.choices is not None
        builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
        builder.add_choices(builder.add_context(asked.context, "conformance"), asked.choices)
        with torch.no_grad():
            plain, batch = self.policy(), builder.build()
            probabilities = plain.choice_logprobs(batch, plain.prefill(batch))[0].exp().tolist()
        [actions] = self.sampler(policy).generate([asked], 11)
        _require_frequencies(Counter(action.choice for action in actions), dict(enumerate(probabilities)), "choice")

    def test_tokens_come_as_often_as_the_policy_says(self) -> None:
        policy = self.policy()
        turn = Shown((picture(), "?"), max_tokens=1)
        asked = request(policy.adapter, MediaStore(policy.adapter), turn, DRAWS)
        builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
        builder.add_context(asked.context, "conformance")
        with torch.no_grad():
            plain = self.policy()
            probabilities = plain.next_token_logprobs(plain.prefill(builder.build()).last)[0].exp().tolist()
        [actions] = self.sampler(policy).generate([asked], 11)
        found = Counter(action.tokens[0] for action in actions)
        # Tokens in eight classes, since most of hundreds would be seen once or never.
        classes = {number: sum(probabilities[number::8]) for number in range(8)}
        counted: Counter[int | None] = Counter()
        for token, count in found.items():
            counted[token % 8] += count
        likely = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:8]
        _require_frequencies(counted, classes, "token of class")
        singly = {token: probabilities[token] for token in likely}
        _require_frequencies(Counter({token: found[token] for token in likely}), singly, "token")

    def test_after_a_sync_the_new_weights_sample(self) -> None:
        policy, other = self.policy(), self.policy(seed=1)
        engine, requests = self.sampler(policy), self.requests()
        engine.generate(requests, 0)
        engine.sync(other)
        self._require_logprobs(engine, requests, self.policy(seed=1), 0, "after sync() with another policy, ")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.7)
        changed = self.policy(seed=1)
        changed.load_state_dict(weights_of(other))
        engine.sync(other)
        self._require_logprobs(engine, requests, changed, 0, "after a step and sync(), ")
        expected = _tokens(Sampler(changed, MediaStore(changed.adapter)).sample(requests, None))
        found = _tokens(engine.generate(requests, None))
        require(found == expected, "after a step and sync(), greedy answers are not those of the new weights")

    def test_a_later_turn_is_sampled_as_if_all_was_read_anew(self) -> None:
        """Whatever an engine keeps from one turn to the next, log-probs are those of the whole conversation."""
        policy = self.policy()
        media, adapter = MediaStore(policy.adapter), policy.adapter
        engine = self.sampler(policy)
        histories: list[tuple[Segment, ...]] = [(), (), ()]
        for turn in range(4):
            shown = [
                Shown((picture(8, 8 + 4 * turn, turn), "Where?"), ("left", "up", "on")),
                Shown((f"Turn {turn}",), max_tokens=4),
                Shown((picture(12, 8, turn),), ("a", "b")),
            ]
            # One conversation ends after two turns, and its place is taken by a new one.
            histories[2] = () if turn == 2 else histories[2]
            requests = [
                request(adapter, media, item, 1, history) for item, history in zip(shown, histories, strict=True)
            ]
            answers = engine.generate(requests, turn)
            self._require_fitting(requests, answers)
            self._compare(requests, answers, self.policy(), f"in turn {turn + 1} of a conversation ")
            histories = [(*asked.context, actions[0]) for asked, actions in zip(requests, answers, strict=True)]
        engine.forget()
        self._require_logprobs(engine, requests, self.policy(), 0, "after forget(), ")

    def test_it_acts_by_the_values_of_a_head_where_it_says_that_it_can(self) -> None:
        if not self._acts_by_values():
            raise SkipTest("the engine does not provide 'action_values'")
        policy = self.policy(heads={"q": Head(4)})
        media, adapter = MediaStore(policy.adapter), policy.adapter
        engine = self.sampler(policy)
        turns = [Shown((picture(8, 8, seed), "?"), ("a", "b", "cd", "d")[: 3 + seed % 2]) for seed in range(6)]
        requests = [request(adapter, media, turn, DRAWS // 6 if turn is turns[0] else 1) for turn in turns]
        alone = [
            Trajectory(None, 0, 0, (Turn(asked.context, actions[0]),), terminated=True)
            for asked, actions in zip(requests, engine.generate(requests, 0), strict=True)
        ]
        values = recomputed(self.policy(heads={"q": Head(4)}), alone).heads["q"]
        best = [int(row[: len(asked.choices or ())].argmax()) for row, asked in zip(values, requests, strict=True)]
        greedy = engine.generate(requests, 1, Behaviour(_values_of_q))
        found = [actions[0].choice for actions in greedy]
        require(found == best, f"choices {found} were taken; those of the greatest values are {best}")
        [mixed, *_] = engine.generate(requests, 2, Behaviour(_values_of_q, epsilon=0.6))
        share = sum(action.choice == best[0] for action in mixed) / len(mixed)
        require(abs(share - 0.6) < 0.15, f"with epsilon 0.6 and three choices the best was taken {share:.2f} of times")
        if self._returns_logprobs():
            expected = [0.6 / 3 + 0.4 * (action.choice == best[0]) for action in mixed]
            gap = float(np.abs(np.exp([action.logprobs[0] for action in mixed]) - np.array(expected)).max())
            require(gap < 1e-4, f"the log-probs of actions taken with epsilon 0.6 are off by {gap:.2g} in probability")
        [still, *_] = engine.generate(requests, None, Behaviour(_values_of_q, epsilon=0.6))
        require({action.choice for action in still} == {best[0]}, "without a seed epsilon is 0: greedy actions differ")

    def test_sampling_changes_no_weight_and_leaves_no_gradient(self) -> None:
        policy = self.policy()
        before = weights_of(policy)
        engine = self.sampler(policy)
        engine.generate(self.requests(), 0)
        require(same_weights(before, weights_of(policy)), "sampling changed the weights of the policy")
        left = [name for name, parameter in policy.named_parameters() if parameter.grad is not None]
        require(not left, f"sampling left gradients on {', '.join(left[:3])}")
        frozen = [name for name, parameter in policy.named_parameters() if not parameter.requires_grad]
        require(not frozen, f"sampling switched off the gradients of {', '.join(frozen[:3])}")

    def test_a_request_that_does_not_fit_is_refused_by_name(self) -> None:
        """Nothing is cut: not the context, and not the room for an answer."""
        policy = self.policy()
        room = policy.adapter.context_length
        asked = request(policy.adapter, MediaStore(policy.adapter), Shown(("x" * (room - 20),), max_tokens=30))
        engine = self.sampler(policy)
        try:
            engine.generate([asked], 0)
        except ModelError as error:
            require(asked.name in str(error), f"the ModelError does not name the request {asked.name!r}: {error}")
        except Exception as error:
            raise ConformanceError(
                f"a request beyond the context raised {type(error).__name__}: {error}; expected a ModelError"
            ) from error
        else:
            require(False, f"a request of more than the model's {room} tokens was accepted: something was cut")

    def _require_fitting(self, requests: Sequence[Request], answers: Sequence[Sequence[ActionSegment]]) -> None:
        """Each action is one that its request allows."""
        for asked, actions in zip(requests, answers, strict=True):
            for action in actions:
                require(action.tokens, "an action has no tokens")
                require(
                    isinstance(action.logprobs, np.ndarray)
                    and action.logprobs.dtype == np.float32
                    and action.logprobs.shape == (action.decisions,),
                    f"logprobs are {action.logprobs!r}; expected float32, one for each of {action.decisions} decisions",
                )
                if asked.choices is None:
                    free = action.choice is None and action.choices is None
                    require(free, f"free text was asked for, the action is choice {action.choice} of {action.choices}")
                    continue
                require(action.choices == asked.choices, "an action's choices are not those of its request")
                index = action.choice
                require(
                    type(index) is int and 0 <= index < len(asked.choices),
                    f"choice {index!r} was taken of {len(asked.choices)}",
                )
                assert index is not None
                fits = (action.tokens, action.text) == (asked.choices[index], asked.choice_texts[index])
                require(fits, f"choice {index} has tokens {action.tokens} and text {action.text!r} of another")
                require(action.ended, "a choice is a whole answer, but `ended` is False")

    def _require_logprobs(
        self, engine: object, requests: Sequence[Request], policy: Policy, seed: int | None, when: str
    ) -> None:
        """The log-probs of actions are those that a policy of these weights recomputes."""
        answers = engine.generate(requests, seed)  # type: ignore[attr-defined]
        self._require_fitting(requests, answers)
        self._compare(requests, answers, policy, when)

    def _compare(
        self, requests: Sequence[Request], answers: Sequence[Sequence[ActionSegment]], policy: Policy, when: str
    ) -> None:
        if not self._returns_logprobs():
            return
        for asked, actions in zip(requests, answers, strict=True):
            for action in actions:
                alone = Trajectory(None, 0, 0, (Turn(asked.context, action),), terminated=True)
                expected = recomputed(policy, [alone]).logprobs.numpy()
                gap = float(np.abs(action.logprobs - expected).max())
                require(
                    gap <= self.tolerance,
                    f"{when}log-probs differ by {gap:.2g} nats from those of the policy: other weights, another "
                    "temperature, or another prompt or image",
                )


def _values_of_q(heads: Mapping[str, Tensor]) -> Tensor:
    return heads["q"]


def _tokens(answers: Sequence[Sequence[ActionSegment]]) -> list[list[tuple[int, ...]]]:
    return [[action.tokens for action in actions] for actions in answers]


def _require_frequencies(found: Counter[int | None], probabilities: Mapping[int, float], what: str) -> None:
    """Each within five standard deviations of the binomial distribution."""
    for outcome, probability in probabilities.items():
        expected = DRAWS * probability
        deviation = (DRAWS * probability * (1 - probability)) ** 0.5
        require(
            abs(found[outcome] - expected) <= DEVIATIONS * max(deviation, 1.0),
            f"{what} {outcome} came {found[outcome]} times in {DRAWS}; the policy's probability says {expected:.0f}: "
            "other weights, another temperature, or a cut distribution",
        )
