"""The HTTP client against a faulty local server."""

import threading

import pytest
from chat_server import FAULTS, some_answer
from chat_server import ChatServer as Served

from kd.generation.server import ChatServer, Completion, Failure, check_url

KEY = "sk-never-to-be-written"


def requests(count: int) -> list[dict]:
    return [
        {"model": "m", "messages": [{"role": "user", "content": f"{i}?"}], "max_new_tokens": 9}
        for i in range(count)
    ]


def ask(server: ChatServer, asked: list[dict]) -> dict[int, Completion | Failure]:
    results: dict[int, Completion | Failure] = {}

    def record(i: int, result: Completion | Failure) -> None:
        assert i not in results
        results[i] = result

    server.ask(asked, record, progress=False)
    return results


def test_every_kind_of_fault_is_retried_until_it_is_answered():
    asked = requests(40)
    with Served(faulty=0.6, slow=60.0) as served:
        # A long timeout: a retry caused by a slow machine would be counted below.
        results = ask(ChatServer(served.url, timeout=5.0, retries=3), asked)
        assert set(served.met) == set(FAULTS)
        assert len(served.requests) == 40 + served.met.total()
    assert sorted(results) == list(range(40))
    for i, result in results.items():
        choice = some_answer(asked[i])
        assert (result.text, result.finish) == (
            choice["message"]["content"],
            choice["finish_reason"],
        )
        assert (result.prompt_tokens, result.completion_tokens) == (7, 5)
        assert result.served_by == "m-2026"


def test_no_more_requests_are_in_flight_than_concurrency_allows():
    now, most, lock, two = 0, 0, threading.Lock(), threading.Event()

    def counted(request: dict) -> dict:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now > 1:
                two.set()
        two.wait(60)  # the first request waits for a second one
        threading.Event().wait(0.02)
        with lock:
            now -= 1
        return some_answer(request)

    with Served(counted) as served:
        assert len(ask(ChatServer(served.url, concurrency=5), requests(40))) == 40
    assert 1 < most <= 5


def test_a_refused_request_fails_alone_and_is_not_retried():
    def picky(request: dict) -> dict:
        odd = request["messages"][0]["content"] == "3?"
        return {"refused": "not this one"} if odd else some_answer(request)

    with Served(picky) as served:
        results = ask(ChatServer(served.url), requests(6))
        assert len(served.requests) == 6
    failed = [i for i, result in results.items() if isinstance(result, Failure)]
    assert failed == [3] and results[3].status == 400
    assert "not this one" in results[3].message


def test_a_wrong_key_stops_the_run_at_once_and_is_not_quoted(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        Served(key="another") as served,
        pytest.raises(ValueError, match="a key in MY_KEY") as error,
    ):
        ask(ChatServer(served.url, "MY_KEY", concurrency=1), requests(6))
    assert KEY not in str(error.value) and "***" in str(error.value)
    assert len(served.requests) == 1


def test_the_key_from_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with Served(key=KEY) as served:
        assert isinstance(ask(ChatServer(served.url, "MY_KEY"), requests(1))[0], Completion)


def test_a_server_that_never_answers_stops_the_run():
    with Served(lambda _: {"message": None}) as served:
        server = ChatServer(served.url, concurrency=2, retries=0)
        with pytest.raises(ValueError, match="4 requests in a row failed.*not a chat completion"):
            ask(server, requests(50))
        assert len(served.requests) < 10
    with pytest.raises(ValueError, match="in a row failed.*Connection"):
        ask(ChatServer(served.url, retries=0), requests(50))  # the server is gone


def test_a_server_that_answers_occasionally_does_not_stop_the_run():
    def moody(request: dict) -> dict:
        third = int(request["messages"][0]["content"][:-1]) % 3 == 2
        return some_answer(request) if third else {"refused": "not now"}

    with Served(moody) as served:
        results = ask(ChatServer(served.url, concurrency=1), requests(12))
    assert [isinstance(results[i], Failure) for i in range(12)] == [True, True, False] * 4


def test_log_probabilities_are_returned():
    first = {"token": "m", "logprob": -0.1, "bytes": []}
    second = {"token": "M", "logprob": -2.4, "bytes": []}
    content = [first | {"top_logprobs": [first, second]}]
    with Served(lambda r: some_answer(r) | {"logprobs": {"content": content}}) as served:
        asked = [requests(1)[0] | {"logprobs": True, "top_logprobs": 2}]
        result = ask(ChatServer(served.url), asked)[0]
        assert served.requests[0]["top_logprobs"] == 2
    assert result.top_log_probabilities == [{"m": -0.1, "M": -2.4}]


def test_the_token_limit_has_the_name_that_the_host_expects(monkeypatch):
    with Served() as served:
        server = ChatServer(served.url)
        ask(server, requests(1))
        server.host = "api.openai.com"
        ask(server, requests(1))
    assert served.requests[0]["max_tokens"] == served.requests[1]["max_completion_tokens"] == 9
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY: not in the environment"):
        ChatServer("https://api.openai.com/v1")


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://me:secret@host/v1"])
def test_an_invalid_url_is_an_error_that_does_not_quote_its_password(url):
    with pytest.raises(ValueError, match="server:") as error:
        check_url(url)
    assert "secret" not in str(error.value)
