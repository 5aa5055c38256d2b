"""What the engine asks for each action, and what becomes of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rllava_core.engines.protocol import AnswerSetup
from rllava_core.errors import ConfigError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, TextPart
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.sampling import Request
from rllava_core.testing.samples import picture
from rllava_openai.config import EngineConfig
from rllava_openai.engine import OpenAIEngine

FakeEndpoint = Any  # of conftest.py
NOTHING = np.zeros(0, np.float32)
CHOICES = ("red", "sky blue", '½ \N{CAT FACE} "quoted" \\')


def engine(server: FakeEndpoint, temperature: float = 0.7, **options: Any) -> OpenAIEngine:
    config = EngineConfig(base_url=server.base_url, model="some-model", **options)
    return OpenAIEngine(config, AnswerSetup(temperature))


def asked(
    *messages: Message,
    choices: Sequence[str] | None = None,
    count: int = 1,
    numbers: Sequence[int] = (),
    tokens: int = 8,
) -> Request:
    entries = None if choices is None else tuple(tuple(choice.encode()) for choice in choices)
    context = (ContextSegment((), (), messages),)
    return Request(context, count, tokens, "example:7", entries, tuple(choices or ()), tuple(numbers))


def test_a_greedy_question_is_sent_as_it_stands(server: FakeEndpoint) -> None:
    server.answer = lambda body: " Seven.\n"
    server.finish_reason = "stop"
    [[action]] = engine(server).generate([asked(Message.user("How many?"))], None)

    assert action == ActionSegment((), action.logprobs, " Seven.\n", ended=True)
    assert action.logprobs.shape == (0,)
    assert action.logprobs.dtype == np.float32
    [request] = server.requests
    assert request == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "How many?"}],
        "temperature": 0.0,
        "max_tokens": 8,
    }


@pytest.mark.parametrize(("reason", "ended"), [("stop", True), ("length", False), ("content_filter", False)])
def test_the_finish_reason_says_whether_an_answer_ended(server: FakeEndpoint, reason: str, ended: bool) -> None:
    server.finish_reason = reason
    [[action]] = engine(server).generate([asked(Message.user("?"))], None)
    assert action.ended is ended


def test_images_arrive_bit_by_bit_and_in_their_places(server: FakeEndpoint) -> None:
    images = [picture(1), picture(2, width=31, height=9), Image.from_array(np.full((1, 1, 3), 255, np.uint8))]
    message = Message.user("Is ", images[0], " like ", images[1], "? ", images[2])
    engine(server, image_detail="high").generate([asked(message)], None)

    sent = server.images()
    assert len(sent) == 3
    assert all(np.array_equal(image.pixels, pixels) for image, pixels in zip(images, sent, strict=True))
    parts = server.requests[0]["messages"][0]["content"]
    assert [part.get("text", "image") for part in parts] == ["Is ", "image", " like ", "image", "? ", "image"]
    assert parts[1]["image_url"]["detail"] == "high"


def test_a_later_turn_shows_all_before_it(server: FakeEndpoint) -> None:
    first = ContextSegment((), (), (Message("system", (TextPart("Look."),)), Message.user(picture(1), "Where?")))
    second = ContextSegment((), (), (Message("tool", (TextPart("closer"), ImagePart(picture(2)))),))
    request = Request((first, ActionSegment((), NOTHING, "left"), second), 1, 8, "example:7")
    engine(server).generate([request], None)

    [sent] = server.requests
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][2]["content"] == "left"
    assert [tuple(pixels.shape) for pixels in server.images()] == [(8, 8, 3), (8, 8, 3)]


def test_drawn_answers_have_a_seed_each_that_follows_from_their_episode(server: FakeEndpoint) -> None:
    request = asked(Message.user("?"), count=3, numbers=(4, 5, 9))
    [actions] = engine(server).generate([request], 11)

    assert {request["temperature"] for request in server.requests} == {0.7}
    assert len({request["seed"] for request in server.requests}) == 3
    assert all(0 <= request["seed"] < 2**31 for request in server.requests)
    assert len({action.text for action in actions}) == 3
    alone = engine(server, cache=None).generate([asked(Message.user("?"), numbers=(9,))], 11)
    assert alone[0][0].text == actions[2].text


def test_greedy_members_of_a_group_are_asked_for_once(server: FakeEndpoint) -> None:
    [actions] = engine(server).generate([asked(Message.user("?"), count=4)], None)
    assert len(actions) == 4
    assert len(server.requests) == 1


@pytest.mark.parametrize("way", ["json_schema", "guided", "text"])
def test_a_choice_is_asked_for_in_three_ways(server: FakeEndpoint, way: str) -> None:
    wanted = CHOICES[2]
    server.answer = lambda body: json.dumps({"choice": wanted}) if way == "json_schema" else wanted
    request = asked(Message.user("?"), choices=CHOICES)
    [[action]] = engine(server, choices_by=way).generate([request], None)

    assert (action.choice, action.text, action.ended) == (2, wanted, True)
    assert (action.tokens, action.choices) == (request.choices[2], request.choices)
    [sent] = server.requests
    if way == "json_schema":
        form = sent["response_format"]["json_schema"]
        assert form["strict"] is True
        assert form["schema"]["properties"]["choice"]["enum"] == list(CHOICES)
        assert sent["max_tokens"] > len(json.dumps({"choice": wanted}))  # enough for any tokenizer
    elif way == "guided":
        assert sent["structured_outputs"] == {"choice": list(CHOICES)}
    else:
        assert sent["max_tokens"] == 8
        assert set(sent) == {"model", "messages", "temperature", "max_tokens"}


@pytest.mark.parametrize(
    "said",
    ["red", '{"choice": "green"}', '{"choice": 0}', '{"choice": "Red"}', '{"choice": "red", "or": 1}', "[]", "", "{"],
)
def test_what_is_no_choice_stays_what_it_is(server: FakeEndpoint, said: str) -> None:
    server.answer = lambda body: said
    [[action]] = engine(server).generate([asked(Message.user("?"), choices=CHOICES)], None)
    assert (action.choice, action.choices, action.text, action.ended) == (None, None, said, False)


def test_chance_asks_nobody(server: FakeEndpoint) -> None:
    request = asked(Message.user("?"), choices=("a", "b", "c", "d"), count=400)
    [actions] = engine(server).generate([request], 3, Behaviour(epsilon=1.0))

    assert not server.requests
    counts = [sum(action.choice == index for action in actions) for index in range(4)]
    assert min(counts) > 60
    [[greedy]] = engine(server).generate([asked(Message.user("?"), choices=("a", "b"))], None, Behaviour(epsilon=1.0))
    assert greedy.choice is not None
    assert len(server.requests) == 1
    with pytest.raises(ConfigError, match=r"example:7: the environment asks for free text"):
        engine(server).generate([asked(Message.user("?"))], 3, Behaviour(epsilon=1.0))


def test_it_has_no_heads(server: FakeEndpoint) -> None:
    with pytest.raises(ConfigError, match="has no heads"):
        engine(server).generate([asked(Message.user("?"))], None, Behaviour(lambda heads: heads["q"]))


def test_further_fields_are_sent_and_others_taken_away(server: FakeEndpoint) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 900, "temperature": None, "reasoning_effort": "low"}
    engine(server, extra_body=extra).generate([asked(Message.user("?"))], None)

    [sent] = server.requests
    assert set(sent) == {"model", "messages", "max_completion_tokens", "reasoning_effort"}


def test_a_model_that_wrote_nothing_has_said_nothing(server: FakeEndpoint) -> None:
    body = {"choices": [{"finish_reason": "length", "message": {"content": None, "reasoning_content": "hmm"}}]}
    server.faults = [{"body": json.dumps(body)}]
    [[action]] = engine(server).generate([asked(Message.user("?"))], None)
    assert (action.text, action.ended) == ("", False)


def test_a_refusal_is_an_answer(server: FakeEndpoint) -> None:
    body = {"choices": [{"finish_reason": "stop", "message": {"content": None, "refusal": "I cannot."}}]}
    server.faults = [{"body": json.dumps(body)}]
    [[action]] = engine(server).generate([asked(Message.user("?"))], None)
    assert (action.text, action.ended) == ("I cannot.", True)
