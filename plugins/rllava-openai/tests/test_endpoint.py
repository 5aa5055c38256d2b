"""Whatever an endpoint does, a question is answered or it is said why not, and nothing that was answered is lost."""

from __future__ import annotations

import json
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.messages import Message
from rllava_openai.asking import Asking, Question
from rllava_openai.config import EngineConfig
from rllava_openai.endpoint import NoAnswerError
from rllava_openai.pacing import retry_after

FakeEndpoint = Any  # of conftest.py


def asking(server: FakeEndpoint, **options: Any) -> Asking:
    return Asking(EngineConfig(base_url=server.base_url, model="some-model", **options))


def questions(count: int, begin: int = 0) -> list[Question]:
    fields = {"temperature": 0.0, "max_tokens": 8}
    return [
        Question((Message.user(f"Question {number}?"),), fields, f"example:{number}")
        for number in range(begin, begin + count)
    ]


OVERLOADED = {"status": 503, "body": '{"error": {"message": "overloaded"}}'}
PASSING = {
    "429": {"status": 429, "headers": {"Retry-After": "0.05"}, "body": '{"error": {"message": "slow down"}}'},
    "500": {"status": 500, "body": "<html>oops</html>"},
    "503": OVERLOADED,
    "408": {"status": 408},
    "time-out": {"hang": True},
    "closed": {"close": True},
    "no json": {"body": "<html>please log in</html>"},
    "a list": {"body": "[]"},
    "no choices": {"body": '{"choices": []}'},
    "null choice": {"body": '{"choices": [null]}'},
    "no message": {"body": '{"choices": [{"finish_reason": "stop"}]}'},
    "no content": {"body": '{"choices": [{"finish_reason": "stop", "message": {}}]}'},
    "content is a number": {"body": '{"choices": [{"finish_reason": "stop", "message": {"content": 7}}]}'},
    "no finish_reason": {"body": '{"choices": [{"message": {"content": "7"}}]}'},
    "an error in a 200": {"body": '{"error": {"message": "no capacity"}}'},
    "cut json": {"body": '{"choices": [{"message"'},
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_tried_again(server: FakeEndpoint, fault: Any) -> None:
    server.faults = [fault, fault]

    answers = asking(server, timeout=0.3).ask(questions(1))

    assert len(answers[0].text) == 8
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


@pytest.mark.parametrize("kind", ["429", "503", "time-out", "closed", "no json", "an error in a 200"])
def test_what_does_not_pass_is_named_with_the_example_and_what_is_kept(server: FakeEndpoint, kind: str) -> None:
    def answer(body: Any) -> Any:
        return PASSING[kind] if "Question 2?" in str(body) else "fine"

    server.answer = answer
    with pytest.raises(NoAnswerError) as caught:
        asking(server, timeout=0.3, retries=2, concurrency=1).ask(questions(4))

    message = str(caught.value)
    assert message.startswith(f"example:2: some-model at {server.base_url} gave no answer: ")
    assert "(3 tries" in message
    assert "2 of the 4 answers" in message
    assert "are kept in cache/answers: give the same command again" in message
    said = {"429": "slow down", "503": "overloaded", "time-out": "timeout=0.3", "closed": "connection was lost"}
    assert said.get(kind, "please log in" if kind == "no json" else "no capacity") in message
    # The fourth was never asked.
    assert not any("Question 3?" in str(request) for request in server.requests)


def test_a_dead_server_loses_nothing_and_only_what_is_missing_is_asked_again(
    server: FakeEndpoint, make_server: Any
) -> None:
    alive = questions(5)
    first = asking(server).ask(alive)
    server.close()
    ask = asking(server)
    with pytest.raises(ConfigError, match="cannot be reached"):
        ask.ask(questions(8))
    assert ask.ask(alive) == first  # without a server

    again = make_server()
    resumed = asking(again)
    answers = resumed.ask(questions(8))

    assert answers[:5] == first
    assert sorted(str(request["messages"]) for request in again.requests) == sorted(
        str([{"role": "user", "content": f"Question {number}?"}]) for number in (5, 6, 7)
    )
    report = resumed.report()
    assert (report["calls"], report["cache_hits"]) == (3, 5)


def test_a_server_that_dies_on_the_way_is_no_mistake_of_the_config(server: FakeEndpoint) -> None:
    ask = asking(server, retries=1)
    ask.ask(questions(1))
    server.close()
    with pytest.raises(NoAnswerError, match="no connection"):
        ask.ask(questions(2))


def test_requests_are_never_more_than_allowed_at_once(server: FakeEndpoint) -> None:
    server.delay = 0.02
    asking(server, concurrency=3).ask(questions(20))

    assert server.most_at_once == 3


def test_requests_keep_their_rate(server: FakeEndpoint) -> None:
    asking(server, requests_per_minute=1200, concurrency=8).ask(questions(8))

    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] >= 7 * 0.05 - 0.02
    assert min(gaps) > 0.01  # they do not come in bursts


def test_a_pause_that_a_server_asks_for_holds_for_all(server: FakeEndpoint) -> None:
    server.faults = [{"status": 429, "headers": {"Retry-After": "0.5"}}]
    asking(server, concurrency=4).ask(questions(12))

    began = server.times[0]
    late = [moment - began for moment in server.times[4:]]  # four were under way when it was asked for
    assert min(late) >= 0.45


def test_a_server_that_asks_for_too_long_a_pause_is_given_up(server: FakeEndpoint) -> None:
    server.faults = [{"status": 429, "headers": {"Retry-After": "3600"}, "body": "later"}]
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"status 429: later; it asks to wait for 3600 seconds"):
        asking(server).ask(questions(1))
    assert time.monotonic() - began < 2


def test_a_date_may_be_asked_for() -> None:
    assert 8 <= (retry_after({"retry-after": formatdate(time.time() + 10)}) or 0) <= 10
    assert retry_after({"retry-after": formatdate(time.time() - 10)}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({}) is None


def test_an_empty_account_is_not_waited_for(server: FakeEndpoint) -> None:
    body = json.dumps({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    server.faults = [{"status": 429, "headers": {}, "body": body}]
    with pytest.raises(NoAnswerError, match="exceeded your current quota"):
        asking(server).ask(questions(1))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, NoAnswerError, "status 400: image too large"),
        (401, ConfigError, r"refuses access \(the key in \$TEST_API_KEY\)"),
        (403, ConfigError, "refuses access"),
        (404, ConfigError, "no such model or path: is 'some-model' its name"),
        (307, ConfigError, "has moved"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    server: FakeEndpoint, secret: str, status: int, error: type[Exception], message: str
) -> None:
    body = json.dumps({"error": {"message": f"image too large, {secret}"}})
    server.faults = [{"status": status, "headers": {"Location": "http://127.0.0.1:1/"}, "body": body}]
    with pytest.raises(error, match=message) as caught:
        asking(server, api_key_env="TEST_API_KEY").ask(questions(1))
    assert len(server.requests) == 1
    assert secret not in str(caught.value)
    assert "[the key]" in str(caught.value)


def test_the_key_is_sent_and_is_written_nowhere(server: FakeEndpoint, secret: str, tmp_path: Path) -> None:
    asking(server, api_key_env="TEST_API_KEY").ask(questions(3))

    assert set(server.keys) == {f"Bearer {secret}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert not [path for path in files if secret in path.read_text(encoding="utf-8")]


def test_no_key_is_sent_where_none_is_named(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    asking(server).ask(questions(1))
    assert server.keys == [None]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_said_at_once(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_SUCH_KEY", value)
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        asking(server, api_key_env="NO_SUCH_KEY")


def test_equal_questions_are_asked_once(server: FakeEndpoint) -> None:
    answers = asking(server, cache=None).ask([*questions(2), *questions(2)])

    assert answers[:2] == answers[2:]
    assert len(server.requests) == 2


def test_what_differs_in_anything_is_asked_for_again(server: FakeEndpoint) -> None:
    [question] = questions(1)
    asking(server).ask([question])
    asking(server).ask([Question(question.messages, {**question.fields, "temperature": 0.5}, "other")])
    asking(server).ask([Question(question.messages, {**question.fields, "seed": 1}, "other")])
    asking(server, revision="checkpoint 2").ask([question])
    asking(server, extra_body={"top_p": 0.5}).ask([question])
    Asking(EngineConfig(base_url=server.base_url, model="another")).ask([question])
    assert len(server.requests) == 6

    asking(server, timeout=3, concurrency=1, retries=0).ask([question])  # what does not change an answer
    assert len(server.requests) == 6


def test_the_address_makes_no_difference_to_what_is_known(server: FakeEndpoint) -> None:
    first = asking(server).ask(questions(1))
    elsewhere = EngineConfig(base_url="http://127.0.0.1:9/v1", model="some-model")
    assert Asking(elsewhere).ask(questions(1)) == first


@pytest.mark.parametrize(
    "damage",
    ["", '{"key": 1, "answer": {"text": 7, "finish_reason": 1}}', "{", "[]", '{"key": "other", "answer": {}}', "\x00"],
)
def test_a_damaged_file_is_asked_for_again_and_replaced(server: FakeEndpoint, tmp_path: Path, damage: str) -> None:
    first = asking(server).ask(questions(1))
    [path] = (tmp_path / "cache").rglob("*.json")
    whole = path.read_text(encoding="utf-8")
    path.write_text(damage, encoding="utf-8")

    assert asking(server).ask(questions(1)) == first
    assert path.read_text(encoding="utf-8") == whole
    assert len(list((tmp_path / "cache" / "answers").rglob("*"))) == 2  # the file and its folder: nothing half written


def test_a_cache_that_cannot_be_written_to_is_said_at_once(server: FakeEndpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cache file/answers: answers cannot be kept there"):
        asking(server, cache="file/answers")


def test_a_full_disk_stops_with_a_message(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    ask = asking(server)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        ask.ask(questions(1))


def test_what_was_spent_is_reported_once(server: FakeEndpoint) -> None:
    ask = asking(server, price_per_million_input=2.0, price_per_million_output=8.0, concurrency=1)
    server.faults = [OVERLOADED]
    ask.ask(questions(3))

    expected = {"calls": 4, "failed_calls": 1, "cache_hits": 0, "input_tokens": 300, "output_tokens": 30}
    assert ask.report() == {**expected, "cost": pytest.approx((300 * 2 + 30 * 8) / 1e6)}
    ask.ask(questions(3))
    assert ask.report() == {**dict.fromkeys(expected, 0), "cache_hits": 3, "cost": 0}


def test_an_answer_that_is_not_taken_is_paid_for(server: FakeEndpoint) -> None:
    from rllava_openai.completions import Completion, MalformedError

    def never(completion: Completion) -> None:
        raise MalformedError("not this one")

    ask = asking(server)
    with pytest.raises(NoAnswerError, match=r"not this one \(3 tries") as caught:
        ask.ask(questions(1), never)
    assert caught.value.alone
    assert ask.report()["input_tokens"] == 300


def test_a_slow_trickle_is_cut_by_the_time_out(server: FakeEndpoint) -> None:
    """A server that sends a byte now and then would otherwise never be too slow."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        try:
            for _ in range(200):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            return

    threading.Thread(target=trickle, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"no answer within timeout=0\.5 seconds"):
        Asking(EngineConfig(base_url=url, model="m", timeout=0.5, retries=0)).ask(questions(1))
    assert time.monotonic() - began < 3
    listener.close()


def test_half_a_surrogate_pair_can_be_asked_about(server: FakeEndpoint) -> None:
    answers = asking(server).ask([Question((Message.user("\ud800?"),), {"max_tokens": 4}, "odd")])
    assert len(answers) == 1
