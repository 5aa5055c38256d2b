"""The reward: a hosted model scores answers by a rubric."""

from __future__ import annotations

from collections.abc import Sequence

from rllava_core.errors import RewardError
from rllava_core.mdp.trajectory import Trajectory
from rllava_openai.asking import Asking, Question
from rllava_openai.completions import Completion
from rllava_openai.config import JudgeConfig
from rllava_openai.endpoint import NoAnswerError
from rllava_openai.rubric import form_of, messages_of, reward_of


class Judge:
    """0 to 1: where on its scale a model puts the last answer of an episode, with the images of the first observation.

    A verdict is asked for once: it is kept on disk by what was asked, so equal answers to equal questions cost nothing.

    Raises ConfigError for a key that is missing, or a cache that cannot be written to; RewardError, when called, for an
    answer that gets no verdict.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._asking = Asking(config)
        self._failures = 0

    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        form = form_of(self._config)
        questions = [Question(messages_of(item, self._config), form, item.name) for item in trajectories]
        try:
            verdicts = self._asking.ask_each(questions, self._read, self._passes_over)
        except NoAnswerError as error:
            raise RewardError(str(error)) from error
        return [self._reward(verdict) for verdict in verdicts]

    def report(self) -> dict[str, float]:
        """What was spent since the last report, and how many answers got the reward of `on_failure`."""
        failures, self._failures = self._failures, 0
        return {**self._asking.report(), "failures": float(failures)}

    def _read(self, verdict: Completion) -> float:
        return reward_of(verdict, self._config)

    def _passes_over(self, error: NoAnswerError) -> bool:
        return self._config.on_failure != "stop" and error.alone

    def _reward(self, verdict: Completion | NoAnswerError) -> float:
        if isinstance(verdict, NoAnswerError):
            self._failures += 1
            return float(self._config.on_failure)
        return self._read(verdict)
