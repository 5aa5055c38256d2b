"""Checks of engines that answer by a model of their own, and so can be compared with no policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from unittest import SkipTest

import numpy as np

from rllava_core.engines.protocol import RolloutEngine
from rllava_core.errors import ConfigError
from rllava_core.mdp.rewards import reported
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.hosted import Hosted
from rllava_core.policy.media import MediaStore
from rllava_core.policy.sampling import Request, numbered
from rllava_core.testing.conformance import ConformanceError, require
from rllava_core.testing.engines_base import EngineSuite
from rllava_core.testing.rollouts import Shown, picture, request

DRAWS = 300
"""How often three choices are drawn: each less than 60 times once in a million million times, and the seed is fixed."""

Answers = Sequence[Sequence[ActionSegment]]


class AnswerChecks(EngineSuite):
    """The part of the suite for engines that provide `own_model`."""

    def test_its_own_model_answers_every_request_in_order(self) -> None:
        engine = self.answerer()
        for seed in (None, 0):
            for counts in ((3, 1, 4, 2, 1), (1, 1, 1, 1, 1)):
                requests = self.conversations(counts)
                answers = engine.generate(requests, seed)
                found = [len(actions) for actions in answers]
                require(found == list(counts), f"generate() gave {found} actions for requests of {list(counts)}")
                _require_fitting(requests, answers)
            engine.forget()

    def test_its_own_model_answers_the_same_to_the_same(self) -> None:
        engine, requests = self.answerer(), self.conversations()
        for seed, which in ((None, "without a seed"), (7, "with the same seed")):
            first, again = (_said(engine.generate(requests, seed)) for _ in range(2))
            require(first == again, f"{which} two calls gave different actions: an evaluation could not be repeated")

    def test_its_own_model_draws_by_the_number_of_an_episode(self) -> None:
        """However requests are put together, or shared out over processes."""
        engine, requests = self.answerer(), numbered(self.conversations())
        together = [action for actions in _said(engine.generate(requests, 7)) for action in actions]
        singly = [replace(item, count=1, numbers=(number,)) for item in requests for number in item.numbers]
        alone = [_said(engine.generate([item], 7))[0][0] for item in reversed(singly)][::-1]
        require(together == alone, "what is drawn for an episode depends on the requests beside it, or on their order")

    def test_its_own_model_answers_alone_as_among_others(self) -> None:
        engine, requests = self.answerer(), self.conversations()
        together = _said(engine.generate(requests, None))
        alone = [_said(engine.generate([asked], None))[0] for asked in requests]
        require(together == alone, "a greedy answer depends on the requests that are answered beside it")

    def test_its_own_model_is_not_asked_where_chance_decides(self) -> None:
        """`rllava eval --random` measures the level of chance."""
        engine = self.answerer()
        [asked] = self._shown([Shown((picture(), "?"), ("a", "b", "cd"))], [DRAWS])
        [actions] = engine.generate([asked], 3, Behaviour(epsilon=1.0))
        _require_fitting([asked], [actions])
        counts = Counter(action.choice for action in actions)
        rare = min(counts[index] for index in range(3))
        require(rare >= DRAWS / 5, f"with epsilon 1, {DRAWS} draws of three choices gave one of them {rare} times")
        [text] = self._shown([Shown((picture(), "?"))], [1])
        try:
            engine.generate([text], 3, Behaviour(epsilon=1.0))
        except ConfigError:
            return
        except Exception as error:
            raise ConformanceError(
                f"acting at random without choices raised {type(error).__name__}: {error}; expected a ConfigError"
            ) from error
        require(False, "acting at random was accepted where no choices are offered: the model was asked instead")

    def test_its_own_model_reports_numbers_by_name(self) -> None:
        engine = self.answerer()
        engine.generate(self.conversations(), None)
        reported(engine, "the engine", ConformanceError)

    def answerer(self) -> RolloutEngine:
        """An engine with a model of its own. Raises SkipTest if the component samples from the policy."""
        self._require_role("rollout")
        if not self._has_own_model():
            raise SkipTest("the engine does not provide 'own_model'")
        engine: RolloutEngine = self.create(self.answer_setup())
        return engine

    def conversations(self, counts: Sequence[int] = (3, 1, 4, 2, 1)) -> list[Request]:
        """Texts and choices by turns, with an image, several and none, and a later turn; no tokens."""
        turns = [
            Shown((picture(), "Colour?"), max_tokens=5),
            Shown(("Is ", picture(8, 24, 1), " like ", picture(12, 8, 2), "?"), ("yes", "no!", "hmm")),
            Shown(("Two and two?",), max_tokens=2),
            Shown(("Up?",), ("y", "n")),
        ]
        requests = self._shown(turns, counts[:-1])
        said = ActionSegment((), np.zeros(0, np.float32), "I look.")
        history = (*requests[0].context, said)
        last = Shown((picture(12, 8, 3), "And now?"), max_tokens=7)
        adapter = Hosted()
        return [*requests, request(adapter, MediaStore(adapter), last, counts[-1], history)]

    def _shown(self, turns: Sequence[Shown], counts: Sequence[int]) -> list[Request]:
        adapter = Hosted()
        media = MediaStore(adapter)
        return [request(adapter, media, turn, count) for turn, count in zip(turns, counts, strict=True)]


def _require_fitting(requests: Sequence[Request], answers: Answers) -> None:
    """Each action is one that its request allows, and claims nothing of a policy that there is not."""
    for asked, actions in zip(requests, answers, strict=True):
        for action in actions:
            require(isinstance(action.text, str), f"an action's text is {action.text!r}; expected a string")
            require(
                isinstance(action.logprobs, np.ndarray) and action.logprobs.shape == (0,),
                f"logprobs are {action.logprobs!r}; expected none, np.zeros(0, np.float32), for nobody knows them",
            )
            if action.choice is None:
                require(not action.tokens, f"free text has the tokens {action.tokens}; expected none")
                require(action.choices is None, "an action without a choice has choices")
                cut = asked.choices is None or not action.ended
                require(cut, f"{action.text!r} is none of the choices, and yet has `ended`")
                continue
            require(asked.choices is not None, f"free text was asked for, the action is choice {action.choice}")
            assert asked.choices is not None
            require(action.choices == asked.choices, "an action's choices are not those of its request")
            index = action.choice
            require(
                type(index) is int and 0 <= index < len(asked.choices),
                f"choice {index!r} was taken of {len(asked.choices)}",
            )
            fits = (action.tokens, action.text) == (asked.choices[index], asked.choice_texts[index])
            require(fits, f"choice {index} has tokens {action.tokens} and text {action.text!r} of another")
            require(action.ended, "a choice is a whole answer, but `ended` is False")


def _said(answers: Answers) -> list[list[tuple[str, int | None, bool]]]:
    return [[(action.text, action.choice, action.ended) for action in actions] for actions in answers]
