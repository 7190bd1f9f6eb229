"""The load: a number of clients, each of which asks again as soon as it has its answer, and what became of their asks.

Its hot path only notes when bytes came: two cores serve both sides, and whatever this takes the engine lacks. It runs
in a process of its own and measures its own share of a core.
"""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from tests.bench.sse import Delta, delta, events

REQUEST_TIMEOUT_S = 600
WARM_UP_S = 60
"""Warm-up ends then, even if some client still waits for its first answer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request."""

    path: str
    body: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. Times are those of `time.perf_counter()`."""

    started_s: float
    ended_s: float
    pieces: tuple[tuple[float, str], ...] = ()
    """When each piece of text came."""
    prompt_tokens: int | None = None
    """As the engine says; None: it does not."""
    output_tokens: int | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)


@dataclass(frozen=True, slots=True)
class Load:
    """All answers, and the time during which every client was busy and warm: what is measured is measured there."""

    clients: int
    answers: tuple[Answer, ...]
    open_s: float
    """From when on it counts: every client has had an answer."""
    close_s: float
    """Until when it counts: there was nothing left to ask, or the time was up."""
    cpu_share: float
    """Of one core, taken by the load generator."""


@dataclass(slots=True)
class _Window:
    started_s: float
    limit_s: float
    waiting: set[int]
    """Clients that have had no answer yet."""
    open_s: float | None = None
    close_s: float | None = None
    begun: int = 0
    answers: list[Answer] = field(default_factory=list)

    def note(self, client: int, now: float) -> None:
        self.waiting.discard(client)
        if self.open_s is None and (not self.waiting or now - self.started_s > WARM_UP_S):
            self.open_s = now

    def close(self, now: float) -> None:
        self.close_s = now if self.close_s is None else self.close_s

    def is_over(self, now: float) -> bool:
        return self.close_s is not None or (self.open_s is not None and now - self.open_s >= self.limit_s)


async def drive(asks: Sequence[T], *, clients: int, limit_s: float, answer: Callable[[T], Awaitable[Answer]]) -> Load:
    """Let the clients ask, each one at a time, until all asks are begun or the time is up; wait for what was begun.

    The first answers of each client are the warm-up: with all clients starting at once, they wait for each other as no
    later ones do. After the end of the window no new ask is begun, and what is under way is waited for.
    """
    window = _Window(time.perf_counter(), limit_s, set(range(clients)))

    async def client(number: int) -> None:
        while window.begun < len(asks) and not window.is_over(time.perf_counter()):
            window.begun += 1
            ask = asks[window.begun - 1]
            window.answers.append(await answer(ask))
            window.note(number, time.perf_counter())
        window.close(time.perf_counter())

    gc.collect()
    gc.disable()
    cpu_s = time.thread_time()
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number))
    finally:
        gc.enable()
    ended_s = time.perf_counter()
    cpu_share = (time.thread_time() - cpu_s) / (ended_s - window.started_s)
    close_s = ended_s if window.close_s is None else window.close_s
    open_s = window.started_s if window.open_s is None or window.open_s >= close_s else window.open_s
    return Load(clients, tuple(window.answers), open_s, close_s, cpu_share)


def drive_http(url: str, calls: Sequence[Call], clients: int, limit_s: float) -> Load:
    """The load on a server; connections are closed after each request, since llama-server drops idle ones."""
    return asyncio.run(_drive_http(url, calls, clients, limit_s))


async def _drive_http(url: str, calls: Sequence[Call], clients: int, limit_s: float) -> Load:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=REQUEST_TIMEOUT_S, trust_env=False, headers={"Connection": "close"}
    ) as client:
        return await drive(calls, clients=clients, limit_s=limit_s, answer=lambda call: _ask(client, call))


async def _ask(client: httpx.AsyncClient, call: Call) -> Answer:
    arrivals: list[tuple[float, bytes]] = []
    started_s = time.perf_counter()
    try:
        async with client.stream("POST", call.path, json=call.body) as response:
            async for piece in response.aiter_raw():
                arrivals.append((time.perf_counter(), piece))  # noqa: PERF401  # what came before a failure counts
            status = response.status_code
    except httpx.HTTPError as error:
        return Answer(started_s, time.perf_counter(), error=f"{type(error).__name__}: {error}")
    ended_s = time.perf_counter()
    if status != httpx.codes.OK:
        text = b"".join(piece for _, piece in arrivals).decode(errors="replace")
        return Answer(started_s, ended_s, error=f"HTTP {status}: {text[:200]}")
    try:
        return read(started_s, ended_s, arrivals)
    except ValueError as error:
        return Answer(started_s, ended_s, error=f"not understood: {error}")


def read(started_s: float, ended_s: float, arrivals: Sequence[tuple[float, bytes]]) -> Answer:
    """Make an answer of the bytes of a stream. One that does not say that it is finished is an error."""
    deltas: list[tuple[float, Delta]] = [(event.arrived_s, delta(event)) for event in events(arrivals)]
    error = next((part.error for _, part in deltas if part.error), None)
    if error is None and not any(part.is_last for _, part in deltas):
        error = "the stream ended before the answer did"
    return Answer(
        started_s,
        ended_s,
        tuple((arrived_s, part.text) for arrived_s, part in deltas if part.text),
        next((part.prompt_tokens for _, part in deltas if part.prompt_tokens), None),
        next((part.output_tokens for _, part in reversed(deltas) if part.output_tokens), None),
        error,
    )
