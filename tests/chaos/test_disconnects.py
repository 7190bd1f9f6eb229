"""Clients that leave, at any moment and in any manner, while others stay: nothing of them is left behind."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.bench.prose import question
from tests.chaos.client import Departure, Manner, Moment, Outcome, ask, request
from tests.chaos.watch import assert_all_slots_are_free, few_fds, get, held, idle, until
from tests.server import Server

Make = Callable[[str, int], bytes]
"""An endpoint and a number in, a request out; no two alike."""

LEAVING = 0.4
SLOTS = 16
GROWTH = 1.03
"""Of memory, after a warm-up of the same kind; with few requests one page more or less of an allocator shows."""
GROWTH_OF_FEW = 1.1

PLENTY: dict[str, Any] = {
    "max_slots": str(SLOTS),
    "max_queue": "3000",
    "max_concurrent": "4000",
    "rate_limit": "1000000/minute",
}
"""Nobody is refused: here it is about who leaves."""


@dataclasses.dataclass(frozen=True, slots=True)
class Crowd:
    """How many come, and by which endpoint."""

    streams: int
    invokes: int
    batches: int
    logs: int
    at_once: int

    @property
    def endpoints(self) -> list[str]:
        return (
            ["stream"] * self.streams
            + ["invoke"] * self.invokes
            + ["batch"] * self.batches
            + ["stream_log", "stream_events"] * self.logs
        )


FEW = Crowd(60, 30, 6, 3, at_once=40)
MANY = Crowd(1000, 500, 60, 30, at_once=100)


@pytest.fixture(scope="module")
def steady_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("steady-server") / "log"
    with Server(log, script="tests/chaos/fragile_server.py", **PLENTY) as server:
        yield server
    assert "Traceback" not in log.read_text()


def echo(endpoint: str, number: int) -> bytes:
    """Something that the scripted model says again in some fifty steps."""
    said = {"messages": [["user", f"Caller number {number} has this to say, and no more."]]}
    return request(f"/chat/{endpoint}", {"inputs": [said] * 3} if endpoint == "batch" else {"input": said})


def short_answer(endpoint: str, number: int) -> bytes:
    """A question to the embedded model."""
    asked = {"messages": [["user", question(number)]]}
    options = {"config": {"configurable": {"max_tokens": 16}}}
    return request(
        f"/chat/{endpoint}", {**options, **({"inputs": [asked] * 3} if endpoint == "batch" else {"input": asked})}
    )


def long_echo() -> bytes:
    """A stream of more than six seconds."""
    return request("/chat/stream", {"input": {"messages": [["user", "x" * 3000]]}})


def long_answer() -> bytes:
    asked = {"messages": [["user", "Tell a long story about a dog."]]}
    return request("/chat/stream", {"input": asked, "config": {"configurable": {"max_tokens": 900, "seed": 1}}})


async def send(server: Server, crowd: Crowd, make: Make, *, seed: int, within_s: float) -> list[Outcome]:
    """Let them come, so many at once, and 40 % of them leave early."""
    chance = Random(seed)
    endpoints = crowd.endpoints
    chance.shuffle(endpoints)
    asks = [
        (
            make(endpoint, seed * 10_000 + number),
            Departure.drawn(chance, within_s=within_s) if chance.random() < LEAVING else None,
        )
        for number, endpoint in enumerate(endpoints)
    ]
    places = asyncio.Semaphore(crowd.at_once)

    async def one(message: bytes, departure: Departure | None) -> Outcome:
        async with places:
            return await ask(server.port, message, departure=departure)

    return await asyncio.gather(*(one(message, departure) for message, departure in asks))


async def assert_nothing_is_left(
    server: Server,
    crowd: Crowd,
    make: Make,
    long: bytes,
    *,
    within_s: float,
    show: pytest.CaptureFixture[str] | None = None,
) -> None:
    warm_up = dataclasses.replace(crowd, streams=crowd.streams // 2, invokes=crowd.invokes // 2)
    await send(server, warm_up, make, seed=1, within_s=within_s)
    await idle(server, within_s=10)
    await assert_all_slots_are_free(server, long, SLOTS)
    before = held(server)

    outcomes = await send(server, crowd, make, seed=2, within_s=within_s)

    took_s = await idle(server)
    ends = Counter(outcome.label for outcome in outcomes)
    await few_fds(server, before.fds)
    after = held(server)
    if show is not None:
        with show.disabled():
            print(f"\n{dict(ends)}; idle after {took_s:.2f} s; {before} before, {after} after")
    assert set(ends) == {"whole", "left"}
    assert LEAVING / 2 < ends["left"] / ends.total() < LEAVING * 1.5
    assert after.rss_mib < before.rss_mib * (GROWTH_OF_FEW if crowd is FEW else GROWTH)
    await assert_all_slots_are_free(server, long, SLOTS)


async def test_who_leaves_leaves_nothing_behind_and_disturbs_nobody(steady_server: Server) -> None:
    await assert_nothing_is_left(steady_server, FEW, echo, long_echo(), within_s=0.2)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_of_fifteen_hundred_who_come_and_forty_percent_who_leave_nothing_is_left(
    steady_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    await assert_nothing_is_left(steady_server, MANY, echo, long_echo(), within_s=0.5, show=capsys)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_nothing_is_left_in_the_embedded_model_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The context is short so that what is kept of prompts and answers has reached its full size after the warm-up.
    with Server(tmp_path / "log", max_context="1024", **PLENTY) as server:
        await assert_nothing_is_left(server, MANY, short_answer, long_answer(), within_s=2, show=capsys)
    assert "Traceback" not in server.log.read_text()


@asynccontextmanager
async def full_house(server: Server) -> AsyncIterator[None]:
    """Inside it, all slots are taken for some seconds."""
    streams = [asyncio.create_task(ask(server.port, long_echo())) for _ in range(SLOTS)]
    await until(server, within_s=10, running=SLOTS)
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.wait(streams)


@pytest.mark.parametrize("manner", Manner)
async def test_who_leaves_the_queue_frees_a_place(steady_server: Server, manner: Manner) -> None:
    async with full_house(steady_server):
        go = asyncio.Event()
        departure = Departure(Moment.ASKED, manner, go=go)
        waiting = [
            asyncio.create_task(ask(steady_server.port, echo(endpoint, 1), departure=departure))
            for endpoint in ("stream", "invoke", "stream_log", "stream_events")
        ]
        await until(steady_server, within_s=5, running=SLOTS, waiting=len(waiting))
        go.set()
        assert all(outcome.has_left for outcome in await asyncio.gather(*waiting))
        await until(steady_server, within_s=2, running=SLOTS, waiting=0)
    await idle(steady_server)


async def test_who_sends_a_second_request_along_and_leaves_frees_its_slot(steady_server: Server) -> None:
    """A server that reads ahead no further than the second request does not see the end of the connection."""
    long = request("/chat/invoke", {"input": {"messages": [["user", "x" * 3000]]}}, Connection="keep-alive")
    departure = Departure(Moment.ASKED, Manner.FIN, after_s=0.5)

    outcome = await ask(steady_server.port, long + long, departure=departure)

    assert outcome.has_left
    await idle(steady_server)
    assert (await get(steady_server, "/ready")).status == 200
