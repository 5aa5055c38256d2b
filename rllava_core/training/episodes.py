"""Episodes: environments, the policy and token ids between them.

Environment.reset ─▶ Observation ─▶ ModelAdapter.render ─▶ RolloutEngine.generate ─▶ Action ─▶ Environment.step ─▶ …
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Literal

import numpy as np
import torch

from rllava_core.engines.protocol import RolloutEngine
from rllava_core.engines.world import Alone, World, together
from rllava_core.errors import DataError, TrainingError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.mdp.pool import EnvironmentPool
from rllava_core.mdp.rewards import reported
from rllava_core.mdp.trajectory import ActionSegment, Segment, Trajectory, Truncation, Turn
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.checks import check_length
from rllava_core.policy.media import MediaStore
from rllava_core.policy.sampling import Request
from rllava_core.training.conversations import Conversation, Renderer
from rllava_core.training.recording import Recorded, Recorder, Turns, merged, turns_of, turns_state
from rllava_core.training.seeds import derive


@dataclass(frozen=True)
class Limits:
    """Where an episode is cut; the keys of the task section, and the longest sequence that the model can read."""

    max_new_tokens: int
    max_turns: int
    max_episode_tokens: int | None
    history: int | Literal["all"]


@dataclass
class Timing:
    """Seconds of each turn that episodes were stepped through together: what the policy took, and the environments."""

    policy: list[float] = field(default_factory=list)
    environment: list[float] = field(default_factory=list)


_Ask = Callable[[Sequence[Request]], list[list[ActionSegment]]]
"""An engine's actions for the requests of one turn."""

_Played = tuple[list[Trajectory], list[tuple[str, Failure]]]


@dataclass(frozen=True)
class _Ahead:
    """Episodes that are being played while the policy is trained."""

    seed: int
    playing: Future[_Played]
    recorder: Recorder


class Episodes:
    """Plays groups of episodes with the policy, or writes them down from the examples' own answers.

    limits: where episodes are cut.
    report: told of every environment that failed, by the name of its episode.
    world: the processes that play a share of the groups each; all of them then have all episodes.
    timing: of the last `play`, of this process.
    behind: how many optimizer steps older than now the weights were that played the last episodes.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        media: MediaStore,
        sampler: RolloutEngine,
        environments: EnvironmentPool,
        limits: Limits,
        report: Callable[[str, Failure], None] | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or Alone()
        self._failures: list[tuple[str, Failure]] = []
        self._adapter = adapter
        self._sampler = sampler
        self._environments = environments
        self.limits = limits
        self._renderer = Renderer(adapter, media)
        self.report = report
        self.timing = Timing()
        self.behind = 0
        # Casts of weights are kept for a forward pass, in one place for all threads, and dropped by whoever leaves its
        # outermost autocast: not by this thread, in the middle of another's pass.
        self._thread = ThreadPoolExecutor(1, "rollout", initializer=torch.autocast_increment_nesting)
        self._closed = Event()
        self._ahead: _Ahead | None = None
        self._recorded: tuple[int, Turns] | None = None

    def play(
        self, starts: Sequence[Start], group_size: int, seed: int | None, behaviour: Behaviour | None = None
    ) -> list[Trajectory]:
        """`group_size` episodes from each start, group by group, all stepped together. Greedy if `seed` is None.

        An episode whose environment failed ends with the turn before, or is left out if there was none. One whose
        action is none of the choices that were offered ends with it.
        """
        ahead, recorded = self._ahead, self._recorded
        self.behind = 0
        if ahead is not None and ahead.seed == seed:
            self._ahead, self.behind = None, 1
            return self._of_all(ahead.playing.result)
        if recorded is not None and recorded[0] == seed:
            self._recorded, self.behind = None, 1
            engine: RolloutEngine = Recorded(recorded[1])
        else:
            engine = self._sampler
        return self._of_all(lambda: self._play(starts, group_size, seed, behaviour, engine))

    def play_ahead(self, starts: Sequence[Start], group_size: int, seed: int, behaviour: Behaviour) -> None:
        """Begin what `play` will be asked for with this seed, in a thread of its own.

        By the weights that the engine has now; until `wait`, nothing else may be asked of the engine.
        """
        recorder = Recorder(self._sampler)
        playing = self._thread.submit(self._play, starts, group_size, seed, behaviour, recorder)
        self._ahead = _Ahead(seed, playing, recorder)

    def wait(self) -> None:
        """Until the episodes of `play_ahead` are over, in all processes; what went wrong is told by `play`."""
        if self._ahead is not None:
            wait([self._ahead.playing])
            # Who gives an engine new weights may not be done before the others.
            self.world.gathered(None)

    def close(self) -> None:
        """Leave what was begun after the turn that it is in; nothing is played any more."""
        self._closed.set()
        self._thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """What was played ahead, so that it need not be played by weights that are gone. All processes must call it."""
        ahead = self._ahead
        if ahead is None:
            return {}
        # An environment that failed once would not fail again, and what an engine did not answer is not there: resuming
        # plays such episodes anew.
        broken = ahead.playing.exception() is not None or bool(ahead.playing.result()[1])
        found = self.world.gathered(None if broken else ahead.recorder.turns)
        turns = [own for own in found if own is not None]
        return {"seed": ahead.seed, "turns": turns_state(merged(turns))} if len(turns) == len(found) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._recorded = (state["seed"], turns_of(state["turns"])) if state else None

    def _of_all(self, play: Callable[[], _Played]) -> list[Trajectory]:
        """What all processes played, in the order of one."""
        played = together(self.world, play)
        for name, failure in [item for _, failures in played for item in failures]:
            if self.report is not None:
                self.report(name, failure)
        # Groups are played whole, so that this is the order of one process.
        return sorted((item for episodes, _ in played for item in episodes), key=lambda item: item.group)

    def _play(
        self,
        starts: Sequence[Start],
        group_size: int,
        seed: int | None,
        behaviour: Behaviour | None,
        engine: RolloutEngine,
    ) -> _Played:
        """The episodes of this process's groups, and what became of environments that failed."""
        self.timing = Timing()
        self._failures = []
        mine = range(self.world.rank, len(starts), self.world.size)
        members = [(group, member) for group in mine for member in range(group_size)]
        observed = self._environments.reset([starts[group] for group, _ in members])
        episodes = [
            _Episode(
                starts[group],
                group,
                group * group_size + member,
                Conversation(self._renderer, self.limits.history, starts[group].name),
            )
            for group, member in members
        ]
        for episode, observation in zip(episodes, observed, strict=True):
            if isinstance(observation, Failure):
                self._fail(episode, observation)
            else:
                episode.show(observation)
                check_length(self._needed(episode), self._adapter, episode.start.name)
        turn = 0
        try:
            while running := [number for number, episode in enumerate(episodes) if not episode.over]:
                if self._closed.is_set():
                    raise TrainingError("the run is over")
                drawn = None if seed is None else derive(seed, turn)
                self._turn(episodes, running, _asking(engine, drawn, behaviour))
                turn += 1
        finally:
            engine.forget()
            self._renderer.forget()
        return [episode.finish() for episode in episodes if episode.turns], self._failures

    def report_of_engine(self) -> dict[str, float]:
        """What the engine says of itself since it was last asked, if it says anything, as metrics."""
        found = reported(self._sampler, "the rollout engine", TrainingError)
        return {f"engine/{key}": value for key, value in found.items()}

    def demonstrate(self, starts: Sequence[Start]) -> list[Trajectory]:
        """One episode a start in which the policy gives the example's answer, with log-probs of zero.

        Raises TrainingError if an environment goes on after that.
        """
        trajectories = []
        for group, (start, observation) in enumerate(zip(starts, self._environments.reset(starts), strict=True)):
            if isinstance(observation, Failure):
                raise TrainingError(f"{start.name}: the environment {observation.what}")
            episode = _Episode(start, group, group, Conversation(self._renderer, "all", start.name))
            episode.show(observation)
            action = self._answer(start, observation)
            transition = self._environments.step({group: _as_action(action)})[group]
            if isinstance(transition, Failure):
                raise TrainingError(f"{start.name}: the environment {transition.what}")
            if not transition.done:
                raise TrainingError(
                    f"{start.name}: the environment goes on after the example's answer; demonstrations have one turn"
                )
            episode.take(action, transition)
            trajectories.append(episode.finish())
        self._renderer.forget()
        return trajectories

    def _turn(self, episodes: Sequence[_Episode], running: Sequence[int], ask: _Ask) -> None:
        began = time.perf_counter()
        actions = self._act(episodes, running, ask)
        decided = time.perf_counter()
        understood = {number: action for number, action in actions.items() if not episodes[number].offered_not(action)}
        transitions = self._environments.step({number: _as_action(action) for number, action in understood.items()})
        self.timing.policy.append(decided - began)
        self.timing.environment.append(time.perf_counter() - decided)
        for number, action in actions.items():
            episode, transition = episodes[number], transitions.get(number)
            if transition is None:
                episode.refuse(action)
            elif isinstance(transition, Failure):
                self._fail(episode, transition)
            else:
                episode.take(action, transition)
                self._limit(episode)

    def _act(self, episodes: Sequence[_Episode], running: Sequence[int], ask: _Ask) -> dict[int, ActionSegment]:
        """An action for each running episode. Those that see the same make one request."""
        alike: dict[object, list[int]] = {}
        for number in running:
            seen = tuple(map(id, episodes[number].conversation.context))
            alike.setdefault((seen, episodes[number].observation.choices), []).append(number)
        requests = [self._request([episodes[number] for number in numbers]) for numbers in alike.values()]
        answers = ask(requests)
        actions = {
            number: action
            for numbers, given in zip(alike.values(), answers, strict=True)
            for number, action in zip(numbers, given, strict=True)
        }
        for number, action in actions.items():
            if not all(logprob < math.inf for logprob in action.logprobs.tolist()):
                name = episodes[number].start.name
                raise TrainingError(f"{name}: the policy's log-probs are not finite, so its weights are damaged")
        return {number: actions[number] for number in running}

    def _request(self, alike: Sequence[_Episode]) -> Request:
        episode = alike[0]
        choices = episode.observation.choices
        return Request(
            context=episode.conversation.context,
            count=len(alike),
            max_tokens=self.limits.max_new_tokens,
            name=episode.start.name,
            choices=None if choices is None else self._renderer.choices(choices),
            choice_texts=choices or (),
            numbers=tuple(item.number for item in alike),
        )

    def _needed(self, episode: _Episode) -> int:
        """Tokens that the policy may have to read and write in the turn to come."""
        return episode.conversation.length + self._longest(episode)

    def _longest(self, episode: _Episode) -> int:
        choices = episode.observation.choices
        return self.limits.max_new_tokens if choices is None else max(map(len, self._renderer.choices(choices)))

    def _limit(self, episode: _Episode) -> None:
        """Cut an episode that goes on beyond what the task or the model allows."""
        conversation, limits = episode.conversation, self.limits
        if conversation.length > self._adapter.context_length:
            # Not even the state that it is left in could be read, so it is left one turn earlier.
            if len(episode.turns) == 1:
                check_length(conversation.length, self._adapter, f"{episode.start.name}, turn 2")
            episode.step_back()
        elif episode.over:
            return
        elif len(episode.turns) >= limits.max_turns:
            episode.truncation = "turns"
        elif limits.max_episode_tokens is not None and (
            conversation.tokens + self._longest(episode) > limits.max_episode_tokens
        ):
            episode.truncation = "tokens"
        elif self._needed(episode) > self._adapter.context_length:
            episode.truncation = "context"

    def _fail(self, episode: _Episode, failure: Failure) -> None:
        episode.truncation = "failure"
        self._failures.append((episode.start.name, failure))

    def _answer(self, start: Start, observation: Observation) -> ActionSegment:
        answer = start.example.answer if start.example is not None else None
        if answer is None:
            raise DataError(f"{start.name}: has no answer to learn from")
        if observation.choices is None:
            tokens = (*self._adapter.encode(answer), self._adapter.end_of_turn[0])
            return ActionSegment(tokens, np.zeros(len(tokens), np.float32), answer)
        if answer not in observation.choices:
            raise DataError(f"{start.name}: answer {answer!r} is none of the choices {', '.join(observation.choices)}")
        choices, index = self._renderer.choices(observation.choices), observation.choices.index(answer)
        return ActionSegment(choices[index], np.zeros(1, np.float32), answer, choice=index, choices=choices)


def _asking(engine: RolloutEngine, seed: int | None, behaviour: Behaviour | None) -> _Ask:
    return lambda requests: engine.generate(requests, seed, behaviour)


class _Episode:
    """An episode under way; `number` is its own among all of the step."""

    def __init__(self, start: Start, group: int, number: int, conversation: Conversation) -> None:
        self.start = start
        self.group = group
        self.number = number
        self.conversation = conversation
        self.turns: list[Turn] = []
        self.terminated = False
        self.truncation: Truncation | None = None
        self.outcome: tuple[Image, ...] = ()
        self.observation = Observation(())
        self._left: tuple[Segment, ...] | None = None

    @property
    def over(self) -> bool:
        return self.terminated or self.truncation is not None

    def show(self, observation: Observation) -> None:
        self.observation = observation
        self.outcome = observation.images
        self.conversation.observe(observation)
        self._left = self.conversation.context

    def take(self, action: ActionSegment, transition: Transition) -> None:
        """A turn is done."""
        context = self.conversation.context
        self.turns.append(Turn(context, action, transition.reward, transition.parsed, transition.info))
        self.conversation.act(action)
        self.terminated = transition.terminated
        if transition.truncated and not transition.terminated:
            self.truncation = "environment"
        if not transition.terminated:
            assert transition.observation is not None
            self.show(transition.observation)
        elif transition.observation is not None:
            self.outcome = transition.observation.images

    def offered_not(self, action: ActionSegment) -> bool:
        """Whether choices were offered, and the action is none of them: an engine that answers by a model of its own
        cannot hold it to them. No environment is asked to carry that out, or to guess what was meant."""
        return self.observation.choices is not None and action.choice is None

    def refuse(self, action: ActionSegment) -> None:
        """The episode ends with an action that was not carried out, in the state that it was in."""
        self.turns.append(Turn(self.conversation.context, action, parsed=False))
        self.truncation = "unparsable"

    def step_back(self) -> None:
        """Leave the episode in the state before its last turn."""
        last = self.turns.pop()
        self.truncation = "context"
        self.outcome = last.observation.images
        self._left = last.context

    def finish(self) -> Trajectory:
        return Trajectory(
            example=self.start.example,
            seed=self.start.seed,
            group=self.group,
            turns=tuple(self.turns),
            terminated=self.terminated,
            truncation=self.truncation,
            final=None if self.terminated else self._left,
            outcome=self.outcome,
        )


def _as_action(action: ActionSegment) -> Action:
    return Action(action.text, action.choice, action.ended)
