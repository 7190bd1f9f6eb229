"""An engine that breaks under load: callers hear what happened in one shape, and all is well again when it can be."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.client import Outcome, ask, request
from tests.chaos.watch import get, idle, until
from tests.server import Server

ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")
SLOTS = 8
STEADY = "All of this is said again, whatever becomes of the others. " * 4
LONGER = STEADY * 4
BREAK_STEP, BREAK_LOOP = (
    f"{word}, please, when all of them are at work. {'x' * 200}" for word in ("BREAK-STEP", "BREAK-LOOP")
)
MAX_RESTARTS = 3


def serving(log: Path, on_engine_death: str = "exit") -> Server:
    return Server(
        log,
        script="tests/chaos/fragile_server.py",
        max_slots=str(SLOTS),
        max_queue="100",
        on_engine_death=on_engine_death,
    )


@pytest.fixture(scope="module")
def fragile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("fragile-server") / "log") as server:
        yield server


def say(endpoint: str, *texts: str) -> bytes:
    inputs = [{"messages": [["user", text]]} for text in texts]
    return request(f"/chat/{endpoint}", {"inputs": inputs} if endpoint == "batch" else {"input": inputs[0]})


@asynccontextmanager
async def others(server: Server, count: int, text: str = STEADY) -> AsyncIterator[list[asyncio.Task[Outcome]]]:
    """Streams of others, all under way."""
    streams = [asyncio.create_task(ask(server.port, say("stream", text))) for _ in range(count)]
    try:
        await until(server, within_s=10, running=min(count, SLOTS), waiting=max(0, count - SLOTS))
        yield streams
    finally:
        await asyncio.wait(streams)


def assert_told(outcome: Outcome, kind: str, status: int) -> None:
    """Its caller heard this, in the one shape, and nothing of what is nobody's business."""
    assert outcome.kind == kind
    assert set(outcome.problem) == {"type", "message", "request_id"}
    assert outcome.problem["request_id"] == outcome.headers["x-request-id"]
    assert b"secret" not in outcome.raw
    assert b"Traceback" not in outcome.raw
    assert outcome.status == (200 if outcome.is_stream else status)
    if not outcome.is_stream and status == 503 and kind != "engine_dead":
        assert int(outcome.headers["retry-after"]) >= 1
    if outcome.is_stream:
        assert not outcome.is_whole, "what broke must not look whole"


async def state(server: Server) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((await get(server, "/health")).body)
    return report


async def assert_all_is_well(server: Server) -> None:
    await idle(server)
    answers = await asyncio.gather(*(ask(server.port, say(endpoint, "Hi!", "Ho!")) for endpoint in ENDPOINTS))
    assert [answer.label for answer in answers] == ["whole"] * len(ENDPOINTS)
    report = await state(server)
    assert report["status"] == "ok"
    assert report["engine"]["state"] == "ready"
    assert "error" not in report["engine"]
    assert (await get(server, "/ready")).status == 200
    assert (await get(server, "/metrics")).status == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("word", ["FAIL-FIRST", "FAIL-BETWEEN"])
async def test_a_request_that_fails_concerns_nobody_else(fragile_server: Server, word: str, endpoint: str) -> None:
    failing = f"{word}, and this one has more to say than that."
    async with others(fragile_server, SLOTS - 3) as streams:
        broken = await ask(
            fragile_server.port,
            say(endpoint, "Hi!", failing, STEADY) if endpoint == "batch" else say(endpoint, failing),
        )
        assert_told(broken, "generation_failed", 500)
        whole = await asyncio.gather(*streams)
    assert [stream.label for stream in whole] == ["whole"] * len(streams)
    await assert_all_is_well(fragile_server)


async def test_a_step_that_fails_ends_those_in_it_and_whoever_waits_is_served(fragile_server: Server) -> None:
    async with others(fragile_server, SLOTS - 1, LONGER) as streams:
        broken = asyncio.create_task(ask(fragile_server.port, say("invoke", BREAK_STEP)))
        await until(fragile_server, within_s=5, running=SLOTS)
        waiting = [asyncio.create_task(ask(fragile_server.port, say(endpoint, "Hi!"))) for endpoint in ENDPOINTS]
        assert_told(await broken, "generation_failed", 500)
        for stream in await asyncio.gather(*streams):
            assert_told(stream, "generation_failed", 500)
        assert {outcome.label for outcome in await asyncio.gather(*waiting)} == {"whole"}
    await assert_all_is_well(fragile_server)


async def test_a_loop_that_fails_ends_all_and_starts_again(fragile_server: Server) -> None:
    async with others(fragile_server, SLOTS - 1, LONGER) as streams:
        broken = asyncio.create_task(ask(fragile_server.port, say("invoke", BREAK_LOOP)))
        assert_told(await broken, "engine_restarted", 503)
        for stream in await asyncio.gather(*streams):
            assert_told(stream, "engine_restarted", 503)
    report = await state(fragile_server)
    assert report["engine"]["state"] == "degraded"
    assert "starts again" in report["engine"]["error"]
    assert (await get(fragile_server, "/ready")).status == 200
    await assert_all_is_well(fragile_server)


async def test_a_loop_that_fails_now_and_then_under_load_goes_on(fragile_server: Server) -> None:
    """More often than it may without having served anybody in between."""
    kinds: Counter[str | None] = Counter()
    is_over = asyncio.Event()

    async def client(number: int) -> None:
        for turn in itertools.count():
            endpoint = ENDPOINTS[(number + turn) % len(ENDPOINTS)]
            outcome = await ask(fragile_server.port, say(endpoint, f"Number {number}, turn {turn}"))
            kinds[outcome.kind] += 1
            if outcome.kind is None:
                assert outcome.is_answered
            else:
                assert_told(outcome, "engine_restarted", 503)
            if is_over.is_set():
                return

    async with asyncio.TaskGroup() as clients:
        for number in range(2 * SLOTS):
            clients.create_task(client(number))
        for _ in range(MAX_RESTARTS + 2):
            assert_told(await ask(fragile_server.port, say("stream", BREAK_LOOP)), "engine_restarted", 503)
            assert (await ask(fragile_server.port, say("invoke", "Hi!"))).is_answered
        is_over.set()

    assert kinds[None] > MAX_RESTARTS
    assert kinds["engine_restarted"] > MAX_RESTARTS
    await assert_all_is_well(fragile_server)


async def test_an_engine_that_dies_under_load_ends_the_process_after_all_were_told(tmp_path: Path) -> None:
    """A supervisor starts it again."""
    with serving(tmp_path / "log") as server:
        async with others(server, SLOTS - 1, LONGER) as streams:
            deadly = await ask(server.port, say("invoke", "DIE, please"))
            assert_told(deadly, "engine_dead", 503)
            for outcome in await asyncio.gather(*streams):
                assert_told(outcome, "engine_dead", 503)
        assert await asyncio.to_thread(server.process.wait, 30) == 1
    assert "SERVE_ON_ENGINE_DEATH" in server.log.read_text()


async def test_an_engine_that_fails_once_too_often_ends_the_process(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        for _ in range(MAX_RESTARTS):
            assert_told(await ask(server.port, say("stream", BREAK_LOOP)), "engine_restarted", 503)
        assert_told(await ask(server.port, say("stream", BREAK_LOOP)), "engine_dead", 503)
        assert await asyncio.to_thread(server.process.wait, 30) == 1


async def test_an_engine_that_dies_under_load_tells_all_and_the_service_stays_if_it_is_to(tmp_path: Path) -> None:
    with serving(tmp_path / "log", on_engine_death="stay") as server:
        async with others(server, SLOTS + 4, LONGER) as streams:
            deadly = asyncio.create_task(ask(server.port, say("invoke", "DIE, please")))
            for outcome in [await deadly, *await asyncio.gather(*streams)]:
                if outcome.label != "whole":
                    assert_told(outcome, "engine_dead", 503)
            assert deadly.result().kind == "engine_dead"
        late = await asyncio.gather(*(ask(server.port, say(endpoint, "Hi!")) for endpoint in ENDPOINTS))
        for outcome in late:
            assert outcome.status == 503
            assert_told(outcome, "engine_dead", 503)
        report = await state(server)
        assert report["status"] == "error"
        assert report["engine"]["state"] == "dead"
        assert (report["engine"]["running"], report["engine"]["waiting"]) == (0, 0)
        assert (await get(server, "/ready")).status == 503
        assert (await get(server, "/metrics")).status == 200
        assert (await get(server, "/")).status == 200
        assert server.stop() == 0
