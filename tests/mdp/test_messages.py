"""An episode of three turns with new images in later turns: what is shown, what is decided, what it was worth."""

from __future__ import annotations

import numpy as np
import pytest

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, Observation, TextPart, Transition
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, group_sizes


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
        segments=(
            ContextSegment((1, 90, 90, 2), images=(picture(10),), text="<image> What is in the corner?"),
            ActionSegment((5, 6, 7), logprobs(-0.1, -0.2, -0.3), text="zoom 3 4"),
            ContextSegment((3, 90, 4), images=(picture(20),), text="<image>"),
            ActionSegment((8, 9), logprobs(-0.5, -0.25), text="left", ended=False),
            ContextSegment((3, 90, 90, 90, 4), images=(picture(30), picture(10)), text="<image><image> Which?"),
            ActionSegment((11, 12), logprobs(-1.5), text="a cat", choice=1, choices=((10,), (11, 12))),
        ),
        rewards=(0.0, -0.5, 1.0),
        terminated=True,
        score=0.25,
    )


def test_images_of_later_turns_belong_to_their_turn(episode: Trajectory) -> None:
    contexts = [segment for segment in episode.segments if isinstance(segment, ContextSegment)]
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
