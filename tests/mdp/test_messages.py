"""An episode of three turns with new images in later turns: what is shown, what is decided, what it was worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, Observation, TextPart, Transition
from rllava_core.mdp.trajectory import (
    ActionSegment,
    ContextSegment,
    Segment,
    Stretch,
    Trajectory,
    Turn,
    conversation,
    group_sizes,
    stretches,
)


def picture(grey: int) -> Image:
    return Image.from_array(np.full((4, 4), grey, np.uint8))


def logprobs(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.fixture
def episode() -> Trajectory:
    """Look, zoom in on a second image, choose with a third before the eyes."""
    return Trajectory(
        example=None,
        seed=17,
        group=2,
        turns=conversation(
            [
                ContextSegment((1, 90, 90, 2), images=(picture(10),)),
                ActionSegment((5, 6, 7), logprobs(-0.1, -0.2, -0.3), text="zoom 3 4"),
                ContextSegment((3, 90, 4), images=(picture(20),)),
                ActionSegment((8, 9), logprobs(-0.5, -0.25), text="left", ended=False),
                ContextSegment((3, 90, 90, 90, 4), images=(picture(30), picture(10))),
                ActionSegment((11, 12), logprobs(-1.5), text="a cat", choice=1, choices=((10,), (11, 12))),
            ],
            (0.0, -0.5, 1.0),
        ),
        terminated=True,
        score=0.25,
    )


def test_images_of_later_turns_belong_to_their_turn(episode: Trajectory) -> None:
    contexts = [turn.observation for turn in episode.turns]
    assert [[image.pixels[0, 0, 0] for image in context.images] for context in contexts] == [[10], [20], [30, 10]]
    assert contexts[0].images[0].digest == contexts[2].images[1].digest, "one picture shown twice is one content"
    assert episode.prompt is contexts[0]


def test_every_sampled_token_is_a_decision_and_a_choice_is_one(episode: Trajectory) -> None:
    assert [action.decisions for action in episode.actions] == [3, 2, 1]
    assert episode.decisions == 6


def test_behaviour_logprobs_are_those_of_all_turns_in_order(episode: Trajectory) -> None:
    assert episode.behaviour_logprobs.dtype == np.float32
    assert episode.behaviour_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.5, -0.25, -1.5])
    assert len(episode.behaviour_logprobs) == episode.decisions


def test_the_return_sums_turns_and_score(episode: Trajectory) -> None:
    assert episode.episode_return == pytest.approx(0.75)


def test_the_answer_is_the_last_action(episode: Trajectory) -> None:
    assert episode.answer == "a cat"


def test_without_an_example_the_seed_names_the_episode(episode: Trajectory) -> None:
    assert episode.name == "episode with seed 17"


def test_groups_are_counted(episode: Trajectory) -> None:
    assert group_sizes([episode, episode]) == {2: 2}


def test_a_turn_sees_all_that_came_before_it(episode: Trajectory) -> None:
    first, second, third = episode.turns
    assert first.context == (episode.prompt,)
    assert second.context[:-1] == (*first.context, first.action)
    assert third.context[:-1] == (*second.context, second.action)
    assert third.observation is third.context[-1]
    assert episode.turns == conversation([*third.context, third.action], (0.0, -0.5, 1.0))


def test_the_last_turn_earns_what_reward_functions_give(episode: Trajectory) -> None:
    assert [turn.reward for turn in episode.turns] == [0.0, -0.5, 1.0]
    assert episode.rewards == (0.0, -0.5, 1.25)


def test_what_the_environment_said_last_is_known(episode: Trajectory) -> None:
    *earlier, last = episode.turns
    said = replace(episode, turns=(*(replace(turn, info={"k": 0}) for turn in earlier), replace(last, info={"k": 1})))
    assert (episode.info, said.info) == ({}, {"k": 1})


def test_an_episode_is_truncated_if_there_is_a_reason(episode: Trajectory) -> None:
    assert not episode.truncated
    assert replace(episode, terminated=False, truncation="turns").truncated


def test_a_conversation_needs_a_reward_for_each_turn_or_none(episode: Trajectory) -> None:
    last = episode.turns[-1]
    assert [turn.reward for turn in conversation([*last.context, last.action])] == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="shorter"):
        conversation([*last.context, last.action], [1.0])


def window(turn: Turn, *context: Segment) -> Turn:
    return replace(turn, context=context)


def test_turns_that_see_all_before_them_are_one_stretch(episode: Trajectory) -> None:
    first, second, third = episode.turns

    [whole] = stretches(episode.turns)

    rest = (first.action, second.observation, second.action, third.observation, third.action)
    assert whole == Stretch(first.context, rest)


def test_a_turn_that_sees_less_begins_a_stretch(episode: Trajectory) -> None:
    first, second, third = episode.turns
    turns = (
        first,
        window(second, second.observation),
        window(third, second.observation, second.action, third.observation),
    )

    assert stretches(turns) == [
        Stretch(first.context, (first.action,)),
        Stretch((second.observation,), (second.action, third.observation, third.action)),
    ]
    alone = [window(turn, turn.observation) for turn in episode.turns]
    assert stretches(alone) == [Stretch((turn.observation,), (turn.action,)) for turn in episode.turns]


def test_equal_segments_that_are_not_the_same_are_no_continuation(episode: Trajectory) -> None:
    """The same answer may have been given in another turn."""
    first, second, _ = episode.turns
    other = window(second, first.observation, replace(first.action), second.observation)
    assert [len(item.rest) for item in stretches((first, other))] == [1, 1]


def test_a_start_is_named_by_its_example_or_its_seed() -> None:
    assert Start(Example("train.jsonl:3"), 5).name == "train.jsonl:3"
    assert Start(None, 5).name == "episode with seed 5"


def test_a_user_message_keeps_text_and_images_in_reading_order() -> None:
    first, second = picture(1), picture(2)
    message = Message.user("Before", first, "and after", second)
    assert message.role == "user"
    assert message.parts == (TextPart("Before"), ImagePart(first), TextPart("and after"), ImagePart(second))


def test_the_images_of_an_observation_are_those_of_all_its_messages() -> None:
    first, second, third = picture(1), picture(2), picture(3)
    observation = Observation((Message.user(first, "one", second), Message("tool", (ImagePart(third),))))
    assert observation.images == (first, second, third)
    assert observation.choices is None


@pytest.mark.parametrize(
    ("terminated", "truncated", "done"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_an_episode_is_done_when_terminated_or_truncated(terminated: bool, truncated: bool, done: bool) -> None:
    assert Transition(0.0, None, terminated, truncated).done is done
