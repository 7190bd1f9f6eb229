"""How much a caller may ask for: each limit on every endpoint, before the first byte, with its name and its number."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.redis_server import RedisServer
from tests.scripted_server import SLOW
from tests.server import Server

ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")
ADA, BOB = "ada-0123456789abcdef", "bob-0123456789abcdef"
KEYS = f"ada:{ADA},bob:{BOB}"


@pytest.fixture(scope="module")
def limited_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("limited-server") / "log",
        script="tests/scripted_server.py",
        api_keys=KEYS,
        max_concurrent="1",
        max_body="100000,summarize=2000",
        max_batch="64,chat=2",
        max_input_tokens="1000000,summarize=300",
        max_output_tokens="4096,translate=5,chat=600",
        timeout_s="30,summarize=0.7",
    ) as server:
        yield server


def ask(server: Server, path: str, one: Any, *, key: str = ADA, num: int = 1, **configurable: Any) -> httpx.Response:
    body = {"inputs": [one] * num} if path.endswith("/batch") else {"input": one}
    return httpx.post(
        f"{server.url}/{path}",
        json={**body, "config": {"configurable": configurable}},
        headers={"X-API-Key": key},
        timeout=30,
    )


def error_of(response: httpx.Response, status: int, kind: str) -> Any:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == kind
    assert response.headers["x-request-id"] == error["request_id"]
    return error


def say(text: str) -> dict[str, str]:
    return {"text": text, "target_language": "German"}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_body_may_have_so_many_bytes_by_chain(limited_server: Server, endpoint: str) -> None:
    long = "x" * 3000
    error = error_of(ask(limited_server, f"summarize/{endpoint}", {"text": long}), 413, "body_too_large")
    assert error["message"] == "a body may have 2000 bytes at most (SERVE_MAX_BODY)"
    assert ask(limited_server, f"translate/{endpoint}", say(long)).status_code == 200


def test_a_batch_may_have_so_many_inputs_by_chain(limited_server: Server) -> None:
    chat = {"messages": [["user", "Hi!"]]}
    error = error_of(ask(limited_server, "chat/batch", chat, num=3), 422, "invalid_request")
    assert error["message"] == "inputs: at most 2 at once (SERVE_MAX_BATCH), got 3"
    assert ask(limited_server, "chat/batch", chat, num=2).status_code == 200
    assert ask(limited_server, "translate/batch", say("Hi!"), num=3).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_request_may_have_so_many_prompt_tokens(limited_server: Server, endpoint: str) -> None:
    error = error_of(ask(limited_server, f"summarize/{endpoint}", {"text": "x" * 400}), 422, "input_too_long")
    assert "at most 300 prompt tokens in a request (SERVE_MAX_INPUT_TOKENS), got " in error["message"]
    assert error["field"] == ("inputs[0]" if endpoint == "batch" else "input")


def test_the_inputs_of_a_batch_are_counted_together(limited_server: Server) -> None:
    assert ask(limited_server, "summarize/batch", {"text": "x"}).status_code == 200
    error = error_of(ask(limited_server, "summarize/batch", {"text": "x"}, num=3), 422, "input_too_long")
    assert error["field"] == "inputs[1]"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_may_have_so_many_tokens(limited_server: Server, endpoint: str) -> None:
    error = error_of(ask(limited_server, f"translate/{endpoint}", say("Hi!"), max_tokens=6), 422, "invalid_option")
    assert "at most 5 (SERVE_MAX_OUTPUT_TOKENS), got 6" in error["message"]
    assert error["field"].endswith("configurable.max_tokens")


def test_an_answer_is_cut_at_the_limit_when_no_length_was_asked_for(limited_server: Server) -> None:
    answer = ask(limited_server, "chat/invoke", {"messages": [["user", "x" * 700]]}).json()["output"]
    assert answer["content"] == "x" * 600
    assert answer["response_metadata"]["finish_reason"] == "length"


@pytest.mark.parametrize("endpoint", ["invoke", "batch"])
def test_a_request_may_take_so_long_by_chain(limited_server: Server, endpoint: str) -> None:
    error = error_of(ask(limited_server, f"summarize/{endpoint}", {"text": "slow"}), 504, "deadline_exceeded")
    assert "not finished in time" in error["message"]


async def test_a_key_has_so_many_requests_at_once_and_others_have_theirs(limited_server: Server) -> None:
    async with (
        httpx.AsyncClient(timeout=30) as client,
        client.stream(
            "POST",
            f"{limited_server.url}/chat/stream",
            json={"input": {"messages": [["user", "slow"]]}},
            headers={"X-API-Key": ADA},
        ) as running,
    ):
        pieces = running.aiter_raw()  # kept: when it is collected, the stream is closed
        await anext(pieces)
        for endpoint in ENDPOINTS:
            response = await asyncio.to_thread(ask, limited_server, f"translate/{endpoint}", say("Hi!"))
            error = error_of(response, 429, "too_many_at_once")
            assert "1 requests running or waiting, which is its limit (SERVE_MAX_CONCURRENT)" in error["message"]
            assert int(response.headers["retry-after"]) >= 1
        other = await asyncio.to_thread(ask, limited_server, "translate/invoke", say("Hi!"), key=BOB)
        assert other.json()["output"] == "Hi!"
    for _ in range(100):
        if ask(limited_server, "translate/invoke", say("Hi!")).status_code == 200:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("a client that went away still has its place")


def test_a_key_may_call_so_often(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py", api_keys=KEYS, rate_limit="5/hour") as server:
        asked = [ask(server, f"translate/{endpoint}", say("Hi!")) for endpoint in ENDPOINTS]
        assert [answer.status_code for answer in asked] == [200] * 5
        for endpoint in ENDPOINTS:
            response = ask(server, f"translate/{endpoint}", say("Hi!"))
            error = error_of(response, 429, "rate_limited")
            assert "SERVE_RATE_LIMIT" in error["message"]
            assert 1 <= int(response.headers["retry-after"]) <= 3600
        assert ask(server, "translate/invoke", say("Hi!"), key=BOB).status_code == 200
        pages = httpx.get(f"{server.url}/translate/input_schema", headers={"X-API-Key": ADA})
        assert pages.status_code == 200, "pages are no calls"


def test_a_refusal_says_so_to_langserves_client_too(limited_server: Server) -> None:
    chain = limited_server.chain("translate", **{"X-API-Key": ADA})
    too_many: Any = {"configurable": {"max_tokens": 99}}
    with pytest.raises(httpx.HTTPStatusError, match="SERVE_MAX_OUTPUT_TOKENS"):
        chain.invoke(say("Hi!"), too_many)
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        list(chain.stream(say("Hi!"), too_many))


async def test_two_processes_that_share_a_redis_count_together(tmp_path: Path, redis_server: RedisServer) -> None:
    shared: dict[str, Any] = {"api_keys": KEYS, "redis_url": redis_server.url, "max_concurrent": "1"}
    script = "tests/scripted_server.py"
    with (
        Server(tmp_path / "one", script=script, **shared) as one,
        Server(tmp_path / "two", script=script, **shared) as two,
    ):
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream(
                "POST", f"{one.url}/translate/stream", json={"input": say(SLOW)}, headers={"X-API-Key": ADA}
            ) as running,
        ):
            pieces = running.aiter_raw()
            await anext(pieces)
            refused = await asyncio.to_thread(ask, two, "translate/invoke", say("Hi!"))
            error_of(refused, 429, "too_many_at_once")
            other = await asyncio.to_thread(ask, two, "translate/invoke", say("Hi!"), key=BOB)
            assert other.status_code == 200
        for _ in range(100):
            if (await asyncio.to_thread(ask, two, "translate/invoke", say("Hi!"))).status_code == 200:
                break
            await asyncio.sleep(0.02)
        else:
            raise AssertionError("a client that left one process still has its place in the other")
        redis_server.stop()
        alone = await asyncio.to_thread(ask, two, "translate/invoke", say("Hi!"))
        assert alone.status_code == 200, "without Redis each counts for itself"
    assert "Redis cannot be reached" in two.log.read_text()
    assert "Traceback" not in two.log.read_text()


def test_bodies_that_drip_take_no_capacity(tmp_path: Path) -> None:
    """Four connections that sent a byte now and then once kept everybody else out of a service with four slots."""
    body = {"input": {"messages": [["user", "Hi!"]]}}
    head = b"POST /chat/invoke HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n{"
    script = "tests/scripted_server.py"
    with (
        Server(tmp_path / "log", script=script, max_slots="1", max_queue="0", idle_timeout_s="1") as server,
        ExitStack() as stack,
    ):
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(8)]
        for connection in slow:
            connection.sendall(head)
        time.sleep(0.2)
        for _ in range(3):
            for connection in slow:
                connection.sendall(b" ")
            assert httpx.post(f"{server.url}/chat/invoke", json=body).status_code == 200
        answer = b""
        while b"}}" not in answer:
            answer += slow[0].recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"SERVE_IDLE_TIMEOUT_S" in answer or b"SERVE_MIN_BODY_RATE" in answer
