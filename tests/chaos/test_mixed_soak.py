"""Twenty minutes of everything at once, on the embedded model: nothing fails that was not meant to, and nothing grows.

`CHAOS_SOAK_S=300 make soak ARGS="-s tests/chaos/test_mixed_soak.py"` makes it shorter and prints a line a minute.
"""

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import pytest

from tests.bench.mix import ASKS_PER_RUN, mix
from tests.chaos.client import Departure, Outcome, ask, request
from tests.chaos.watch import Held, few_fds, get, held, idle
from tests.server import Server

SOAK_S = float(os.environ.get("CHAOS_SOAK_S", "1200"))
MINUTE_S = min(60.0, SOAK_S / 5)
WARM_UP_MINUTES = 2
GROWTH = 1.03

SLOTS, QUEUE = 8, 4
CLIENTS = 10
"""That ask for something, one thing after the other; with those in bursts there are more than places."""

ENDPOINTS = ("invoke", "stream", "stream_log", "stream_events", "batch")
PAGES = (
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/ready",
    "/chat/playground/",
    "/translate/playground/",
    "/chat/input_schema",
)
WRONG = (
    request("/translate/invoke", {"input": {"text": ""}}),
    request("/chat/stream", {"input": {"messages": [["user", "Hi!"]]}, "config": {"configurable": {"top_p": 7}}}),
    request("/chat/invoke", {"input": {"messages": [["user", "word " * 3_000]]}}),
    request("/nowhere/invoke", {}),
    request("/summarize/batch", {"inputs": []}),
    b"NONSENSE\r\n\r\n",
    b"POST /chat/invoke HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[[",
)


@dataclass
class Seen:
    """What has happened so far."""

    ends: dict[str, Counter[str]] = field(default_factory=dict)
    tokens: int = 0
    unexpected: list[str] = field(default_factory=list)

    def note(self, what: str, outcome: Outcome, *expected: str) -> None:
        """Count an outcome; what does not begin with any of these words was not expected."""
        self.ends.setdefault(what, Counter())[outcome.label] += 1
        self.tokens += outcome.raw.count(b"event: data")
        if not outcome.label.startswith(expected):
            self.unexpected.append(f"{what}: {outcome.label}: {outcome.raw[-300:]!r}")

    @property
    def total(self) -> int:
        return sum(ends.total() for ends in self.ends.values())


def requests(chance: Random) -> Iterator[bytes]:
    """Chats, translations and summaries, by all endpoints, without end; no two alike."""
    for run in count(100):
        for one in mix(ASKS_PER_RUN, run=run):
            options = {"configurable": {"max_tokens": chance.choice((4, 16, 48)), "temperature": chance.choice((0, 1))}}
            endpoint = chance.choice(ENDPOINTS)
            body = {"inputs": [one.input] * chance.randint(1, 3)} if endpoint == "batch" else {"input": one.input}
            yield request(f"/{one.kind}/{endpoint}", {**body, "config": options})


async def everything(server: Server, seen: Seen, until_s: float) -> None:
    """All kinds of clients at once, until then."""
    chance = Random(1)
    messages = requests(chance)

    async def client() -> None:
        while time.monotonic() < until_s:
            departure = Departure.drawn(chance, within_s=3) if chance.random() < 0.15 else None
            outcome = await ask(server.port, next(messages), departure=departure)
            seen.note("asks", outcome, "whole", "left", "503 queue_full")
            await asyncio.sleep(chance.uniform(0, 1))

    async def bursts() -> None:
        while time.monotonic() < until_s:
            burst = [ask(server.port, next(messages)) for _ in range(SLOTS + QUEUE)]
            for outcome in await asyncio.gather(*burst):
                seen.note("bursts", outcome, "whole", "503 queue_full")
            await asyncio.sleep(20)

    async def mistakes() -> None:
        while time.monotonic() < until_s:
            seen.note("mistakes", await ask(server.port, chance.choice(WRONG)), "400", "404", "422", "503 queue_full")
            await asyncio.sleep(0.3)

    async def pages() -> None:
        while time.monotonic() < until_s:
            seen.note("pages", await get(server, chance.choice(PAGES)), "whole")
            seen.note("metrics", await get(server, "/metrics"), "whole")
            await asyncio.sleep(0.5)

    await asyncio.gather(*(client() for _ in range(CLIENTS)), bursts(), mistakes(), pages())


async def tell(server: Server, seen: Seen, until_s: float, capsys: pytest.CaptureFixture[str]) -> list[Held]:
    """A line a minute."""
    minutes: list[Held] = []
    while time.monotonic() < until_s:
        await asyncio.sleep(min(MINUTE_S, max(0.0, until_s - time.monotonic())))
        minutes.append(held(server))
        with capsys.disabled():
            print(f"minute {len(minutes)}: {minutes[-1]}, {seen.total} requests, {seen.tokens} events", flush=True)
    return minutes


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 600)
async def test_everything_at_once_for_twenty_minutes_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Seen()
    # The context is short so that what is kept of prompts and answers has reached its full size after the warm-up.
    with Server(tmp_path / "log", max_slots=str(SLOTS), max_queue=str(QUEUE), max_context="2048") as server:
        await asyncio.gather(*(get(server, page) for page in PAGES))
        before = held(server)
        until_s = time.monotonic() + SOAK_S
        with capsys.disabled():
            print()
        _, minutes = await asyncio.gather(everything(server, seen, until_s), tell(server, seen, until_s, capsys))
        await idle(server)
        await few_fds(server, before.fds + 2)
        with capsys.disabled():
            print("\n".join(f"{what}: {dict(ends)}" for what, ends in seen.ends.items()))
            print(f"{before} before, {held(server)} after")
        assert (await get(server, "/ready")).status == 200
        assert server.stop() == 0
    said = server.log.read_text()
    assert seen.unexpected == []
    assert minutes[-1].rss_mib < minutes[WARM_UP_MINUTES - 1].rss_mib * GROWTH
    assert "Traceback" not in said
    assert not re.search(r" (ERROR|CRITICAL) ", said)
