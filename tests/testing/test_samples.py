"""The sample episodes are what training could read."""

from __future__ import annotations

from rllava_core.testing import samples


def test_pictures_and_examples_differ_by_number_and_never_by_call() -> None:
    assert samples.picture(1, width=5, height=3).size == (5, 3)
    assert samples.picture(1) == samples.picture(1) != samples.picture(2)
    assert samples.example(1) == samples.example(1) != samples.example(2)
    assert [example.answer for example in samples.examples()] == list(samples.ANSWERS)


def test_an_episode_has_a_question_and_an_answer_for_each_turn() -> None:
    example = samples.example(1)
    episode = samples.episode(example, "é", "42", group=3, ended=False, info={"success": False})

    assert [len(turn.context) for turn in episode.turns] == [1, 3]
    assert episode.turns[1].context[:2] == (episode.prompt, episode.turns[0].action)
    assert [turn.observation.images for turn in episode.turns] == [example.images, ()]
    assert [action.tokens for action in episode.actions] == [(*"é".encode(), samples.END_OF_TURN), tuple(b"42")]
    assert [action.ended for action in episode.actions] == [True, False]
    assert len(episode.behaviour_logprobs) == episode.decisions == 5
    assert (episode.answer, episode.group, episode.rewards) == ("42", 3, (0.0, 0.0))
    assert (episode.terminated, episode.truncated, episode.info) == (False, True, {"success": False})


def test_an_answer_can_be_replaced_by_another_also_by_a_choice() -> None:
    episode = samples.episode(samples.example(), "7")

    cut = samples.answering(episode, "", ended=False)
    chosen = samples.answering(episode, "no", choices=("yes", "no"))

    assert (cut.answer, cut.decisions, cut.truncated) == ("", 0, True)
    assert (chosen.answer, chosen.decisions, chosen.actions[0].choice) == ("no", 1, 1)
    assert chosen.actions[0].choices == (tuple(b"yes"), tuple(b"no"))
    assert episode.answer == "7"
