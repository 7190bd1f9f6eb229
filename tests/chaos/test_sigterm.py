"""The service is told to stop while it is at work: nobody comes in, those inside finish, and then it is gone."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.client import Outcome, ask, request
from tests.chaos.stalling import SMALL_BUFFERS, STALLED, stalled
from tests.chaos.watch import get, until
from tests.server import Server

SLOTS = 16
ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")
STREAMS = ("stream", "stream_log", "stream_events")


def serving(log: Path, **settings: Any) -> Server:
    return Server(log, script="tests/chaos/fragile_server.py", max_slots=str(SLOTS), **settings)


def say(endpoint: str, length: int) -> bytes:
    """Its answer takes two milliseconds a character, and more among others."""
    said = {"messages": [["user", "x" * length]]}
    return request(f"/chat/{endpoint}", {"inputs": [said]} if endpoint == "batch" else {"input": said})


async def under_way(server: Server, messages: list[bytes]) -> list[asyncio.Task[Outcome]]:
    tasks = [asyncio.create_task(ask(server.port, message)) for message in messages]
    await until(server, within_s=20, running=len(messages))
    return tasks


async def exit_code(server: Server, *, within_s: float) -> int:
    return await asyncio.to_thread(server.process.wait, within_s)


def assert_told_to_go_elsewhere(outcome: Outcome) -> None:
    assert outcome.status == 503
    assert outcome.kind == "shutting_down"
    assert int(outcome.headers["retry-after"]) >= 1
    assert outcome.problem["request_id"] == outcome.headers["x-request-id"]


async def test_all_in_flight_end_whole_while_nobody_else_is_let_in(tmp_path: Path) -> None:
    with serving(tmp_path / "log", drain_timeout_s="60") as server:
        messages = [say(ENDPOINTS[number % len(ENDPOINTS)], 600) for number in range(SLOTS)]
        inside = await under_way(server, messages)

        server.process.send_signal(signal.SIGTERM)

        assert (await get(server, "/ready")).status == 503
        assert (await get(server, "/health")).status == 200
        for outcome in await asyncio.gather(*(ask(server.port, say(endpoint, 5)) for endpoint in ENDPOINTS)):
            assert_told_to_go_elsewhere(outcome)
        assert not any(task.done() for task in inside), "they would have ended by themselves: this shows nothing"
        assert [outcome.label for outcome in await asyncio.gather(*inside)] == ["whole"] * SLOTS
        assert await exit_code(server, within_s=10) == 0
    assert "Traceback" not in server.log.read_text()


async def test_those_who_wait_in_the_queue_are_inside_as_well(tmp_path: Path) -> None:
    with serving(tmp_path / "log", drain_timeout_s="60") as server:
        inside = [asyncio.create_task(ask(server.port, say("stream", 400))) for _ in range(2 * SLOTS)]
        await until(server, within_s=20, running=SLOTS, waiting=SLOTS)
        server.process.send_signal(signal.SIGTERM)
        assert [outcome.label for outcome in await asyncio.gather(*inside)] == ["whole"] * (2 * SLOTS)
        assert await exit_code(server, within_s=10) == 0


async def test_those_who_do_not_finish_in_time_are_told(tmp_path: Path) -> None:
    with serving(tmp_path / "log", drain_timeout_s="1") as server:
        messages = [say(ENDPOINTS[number % len(ENDPOINTS)], 6000) for number in range(SLOTS)]
        inside = await under_way(server, messages)

        server.process.send_signal(signal.SIGTERM)

        for outcome in await asyncio.gather(*inside):
            assert outcome.kind == "shutting_down"
            assert outcome.status == (200 if outcome.is_stream else 503)
            assert outcome.problem["request_id"] == outcome.headers["x-request-id"]
        assert await exit_code(server, within_s=10) == 0
    assert "Traceback" not in server.log.read_text()


async def test_a_drain_that_may_take_no_time_tells_those_inside_too(tmp_path: Path) -> None:
    with serving(tmp_path / "log", drain_timeout_s="0") as server:
        inside = await under_way(server, [say(endpoint, 6000) for endpoint in STREAMS])
        server.process.send_signal(signal.SIGTERM)
        assert {outcome.kind for outcome in await asyncio.gather(*inside)} == {"shutting_down"}
        assert await exit_code(server, within_s=10) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_stops_it_at_once(tmp_path: Path, second: signal.Signals) -> None:
    with serving(tmp_path / "log", drain_timeout_s="60") as server:
        inside = await under_way(server, [say("stream", 6000)] * 4)
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while (await get(server, "/ready")).status != 503:  # noqa: ASYNC110  # it is another process
                await asyncio.sleep(0.02)

        server.process.send_signal(second)

        assert await exit_code(server, within_s=2) != 0
        assert {outcome.is_whole for outcome in await asyncio.gather(*inside)} == {False}
    assert "Traceback" not in server.log.read_text()


async def test_connections_that_only_wait_do_not_keep_it(tmp_path: Path) -> None:
    """Kept alive, half a head, half a body: none of them is inside."""
    head = b"POST /translate/invoke HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    with serving(tmp_path / "log", drain_timeout_s="60", idle_timeout_s="60") as server:
        writers = []
        for said in (request("/health", Connection="keep-alive"), b"", head[:20], head, head + b"{"):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(said)
            writers.append(writer)
        await get(server, "/health")
        server.process.send_signal(signal.SIGTERM)
        try:
            assert await exit_code(server, within_s=15) == 0
        finally:
            for writer in writers:
                writer.transport.abort()
    assert "Traceback" not in server.log.read_text()


async def test_those_who_do_not_read_do_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL_BUFFERS.items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "log", drain_timeout_s="1", idle_timeout_s="60", max_output_tokens="8000") as server:
        async with stalled(server, pause_s=None):
            await until(server, within_s=5, running=STALLED)
            await asyncio.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            assert await exit_code(server, within_s=20) == 0
    assert "Traceback" not in server.log.read_text()


async def test_while_the_model_loads_it_stops_at_once(tmp_path: Path) -> None:
    with Server(tmp_path / "log", awaited="/health") as server:
        asking = [asyncio.create_task(ask(server.port, say(endpoint, 5))) for endpoint in ENDPOINTS * 4]
        server.process.send_signal(signal.SIGTERM)
        assert await exit_code(server, within_s=15) == 0
        for outcome in await asyncio.gather(*asking):
            assert outcome.error or outcome.kind in ("loading", "shutting_down") or outcome.status is None
    assert "Traceback" not in server.log.read_text()


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_sixteen_streams_of_the_embedded_model_end_whole(tmp_path: Path) -> None:
    with Server(tmp_path / "log", max_slots=str(SLOTS), drain_timeout_s="120") as server:
        asked = {"input": {"messages": [["user", "Tell a long story about a dog."]]}}
        message = request("/chat/stream", {**asked, "config": {"configurable": {"max_tokens": 200, "temperature": 1}}})
        inside = await under_way(server, [message] * SLOTS)
        server.process.send_signal(signal.SIGTERM)
        assert_told_to_go_elsewhere(await ask(server.port, message))
        assert [outcome.label for outcome in await asyncio.gather(*inside)] == ["whole"] * SLOTS
        assert await exit_code(server, within_s=10) == 0
    assert "Traceback" not in server.log.read_text()
