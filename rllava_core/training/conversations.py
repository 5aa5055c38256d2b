"""What the policy reads in each turn: observations and its own actions, as token ids of one conversation."""

from __future__ import annotations

from typing import Literal

from rllava_core.errors import DataError
from rllava_core.mdp.messages import Message, Observation
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.media import MediaStore


class Renderer:
    """Observations to token ids, equal ones once."""

    def __init__(self, adapter: ModelAdapter, media: MediaStore) -> None:
        self._adapter = adapter
        self._media = media
        self._encoded: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        self._rendered: dict[object, ContextSegment] = {}

    def forget(self) -> None:
        """Drop the observations of episodes that are over."""
        self._rendered = {}

    def opening(self, messages: tuple[Message, ...], name: str) -> ContextSegment:
        """The beginning of a conversation. The same object for equal messages, until they are forgotten."""
        return self._render(messages, None, name)

    def continuation(self, messages: tuple[Message, ...], answered: ActionSegment, name: str) -> ContextSegment:
        """What follows an action, beginning with the end of its turn where the policy did not write that itself."""
        return self._render(messages, answered.tokens[-1:] in [(end,) for end in self._adapter.end_of_turn], name)

    def choices(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each choice.

        If one begins with another ("1" and "10"), the shorter would always be the likelier, so then each ends with
        the end-of-turn token, and the scores are of whole answers.
        """
        if choices not in self._encoded:
            encoded = [self._adapter.encode(choice) for choice in choices]
            nested = any(
                first != second and longer[: len(shorter)] == shorter
                for first, shorter in enumerate(encoded)
                for second, longer in enumerate(encoded)
            )
            ending = self._adapter.end_of_turn[:1] if nested else ()
            self._encoded[choices] = tuple(tokens + ending for tokens in encoded)
        return self._encoded[choices]

    def _render(self, messages: tuple[Message, ...], ended: bool | None, name: str) -> ContextSegment:
        """ended: whether the action before ended its turn; None at the beginning of a conversation."""
        key = (messages, ended)
        if key not in self._rendered:
            images = Observation(messages).images
            try:
                features = self._media.features(images)
                tokens = self._adapter.render(messages, features, continues=ended is not None)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            closing = self._adapter.end_of_turn[:1] if ended is False else ()
            self._rendered[key] = ContextSegment(closing + tokens, images, messages)
        return self._rendered[key]


class Conversation:
    """One episode as the policy reads it.

    history: how many turns the policy sees, the current one included.
    """

    def __init__(self, renderer: Renderer, history: int | Literal["all"], name: str) -> None:
        self._renderer = renderer
        self._history = history
        self._name = name
        self._observations: list[tuple[Message, ...]] = []
        self._actions: list[ActionSegment] = []
        self._tokens = 0
        self.context: tuple[Segment, ...] = ()

    def observe(self, observation: Observation) -> None:
        """Take in an observation; `context` is then what the policy sees."""
        self._observations.append(observation.messages)
        begin = 0 if self._history == "all" else max(0, len(self._observations) - self._history)
        if begin == 0 and self._actions:
            self.context = (*self.context, self._actions[-1], self._continuation(len(self._actions)))
        else:
            self.context = self._window(begin)
        self._tokens += len(self.context[-1].tokens)

    def act(self, action: ActionSegment) -> None:
        """Take in what the policy did."""
        self._actions.append(action)
        self._tokens += len(action.tokens)

    @property
    def length(self) -> int:
        """Tokens that the policy sees."""
        return sum(len(segment.tokens) for segment in self.context)

    @property
    def tokens(self) -> int:
        """Tokens shown and sampled in the whole episode."""
        return self._tokens

    def _window(self, begin: int) -> tuple[Segment, ...]:
        """The conversation from turn number `begin` on, as if it began there; system messages stay in view."""
        pinned = tuple(message for message in self._observations[0] if message.role == "system") if begin else ()
        window: list[Segment] = [self._renderer.opening(pinned + self._observations[begin], self._name)]
        for turn in range(begin + 1, len(self._observations)):
            window += [self._actions[turn - 1], self._continuation(turn)]
        return tuple(window)

    def _continuation(self, turn: int) -> ContextSegment:
        return self._renderer.continuation(self._observations[turn], self._actions[turn - 1], self._name)
