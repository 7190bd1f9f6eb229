"""Asks a server for translations and summaries of documents over HTTP, and notes what comes of them and when.

A stream of events is five megabytes a page, most of it tokens of single calls: these are not parsed.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import psutil  # type: ignore[import-untyped]

from tests.bench.memory import tree_bytes
from tests.bench.sse import Event, delta, events
from tests.server import Server

TIMEOUT_S = 3600
POLL_S = 0.005


class Broken(RuntimeError):
    """The server refused, or broke off."""


@dataclass(slots=True)
class Told:
    """What a stream of events said, but for the tokens of single calls."""

    wall_s: float = 0
    first_words_s: float | None = None
    """Until the first piece of the output that is more than white space."""
    num_bytes: int = 0
    output: str = ""
    """At the end, whole."""
    streamed: str = ""
    """Its pieces put together."""
    answers: dict[str, str] = field(default_factory=dict)
    """Of the model, by the name of the call."""
    custom: dict[str, list[tuple[float, dict[str, Any]]]] = field(default_factory=dict)
    """By name: when each came, in seconds after the request, and what it said."""


def follow(server: Server, chain: str, value: Mapping[str, object], **options: object) -> Told:
    """Ask for a stream of events, and read it to its end. Raises Broken."""
    told = Told()
    started_s = time.perf_counter()
    body = {"input": value, "config": {"configurable": options}}
    with _stream(server, f"{chain}/stream_events", body) as response:

        def arrivals() -> Iterator[tuple[float, bytes]]:
            for piece in response.iter_raw():
                told.num_bytes += len(piece)
                yield time.perf_counter(), piece

        _read(told, events(arrivals()), name=f"/{chain}", started_s=started_s)
    told.wall_s = time.perf_counter() - started_s
    return told


def _read(told: Told, read: Iterable[Event], *, name: str, started_s: float) -> None:
    is_whole = False
    for event in read:
        if event.name == "error":
            raise Broken(event.data)
        if event.name != "data" or event.data.startswith(('{"event":"on_chat_model_st', '{"event":"on_llm_st')):
            continue
        said = json.loads(event.data)
        match said["event"]:
            case "on_custom_event":
                told.custom.setdefault(said["name"], []).append((event.arrived_s - started_s, said["data"]))
            case "on_chat_model_end":
                told.answers[said["name"]] = said["data"]["output"]["content"]
            case "on_chain_stream" if said["name"] == name:
                piece = said["data"]["chunk"]
                told.streamed += piece
                if told.first_words_s is None and piece.strip():
                    told.first_words_s = event.arrived_s - started_s
            case "on_chain_end" if said["name"] == name:
                told.output, is_whole = said["data"]["output"], True
    if not is_whole:
        raise Broken("the stream ended before the run did")


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a plain stream said."""

    wall_s: float
    first_words_s: float
    text: str


def stream(server: Server, chain: str, value: Mapping[str, object], **options: object) -> Streamed:
    """Ask for a plain stream of text, and read it to its end. Raises Broken."""
    started_s, first_s, text = time.perf_counter(), None, ""
    body = {"input": value, "config": {"configurable": options}}
    with _stream(server, f"{chain}/stream", body) as response:
        for arrived_s, piece in _pieces(response):
            text += piece
            first_s = arrived_s if first_s is None and piece.strip() else first_s
    if first_s is None:
        raise Broken("the stream has no text")
    return Streamed(time.perf_counter() - started_s, first_s - started_s, text)


@dataclass(frozen=True, slots=True)
class Begun:
    """A plain stream that was left after its first words."""

    first_words_s: float
    num_running: int
    """Slots in use when it was left."""
    freed_s: float
    """Until the engine said that nobody runs or waits."""


def begin(server: Server, chain: str, value: Mapping[str, object], *, key: str = "") -> Begun:
    """Ask for a plain stream of text, and close the connection after its first words. Raises Broken."""
    started_s = time.perf_counter()
    with _stream(server, f"{chain}/stream", {"input": value}, key=key) as response:
        first_s = next((arrived_s for arrived_s, piece in _pieces(response) if piece.strip()), None)
        num_running = busy(server)[0]
    if first_s is None:
        raise Broken("the stream has no text")
    return Begun(first_s - started_s, num_running, freed(server))


def freed(server: Server, *, timeout_s: float = 60) -> float:
    """Wait until the engine has nothing to do; return the seconds that took. Raises TimeoutError."""
    started_s = time.perf_counter()
    while any(busy(server)):
        if time.perf_counter() - started_s > timeout_s:
            raise TimeoutError(f"somebody still runs after {timeout_s:g} s")
        time.sleep(POLL_S)
    return time.perf_counter() - started_s


def invoke(server: Server, chain: str, value: Mapping[str, object], **options: object) -> Any:
    """The whole output. Raises Broken."""
    body = {"input": value, "config": {"configurable": options}}
    response = httpx.post(f"{server.url}/{chain}/invoke", json=body, timeout=TIMEOUT_S, trust_env=False)
    if response.status_code != httpx.codes.OK:
        raise Broken(f"HTTP {response.status_code}: {response.text[:200]}")
    return response.json()["output"]


class Watch:
    """Notes the memory of a server and how many of its slots are in use, once a second while it is entered."""

    PERIOD_S = 1.0

    def __init__(self, server: Server) -> None:
        self.samples: list[tuple[float, int]] = []
        """Seconds since the start, and bytes (proportional set size, child processes included)."""
        self.num_running: Counter[int] = Counter()
        self._server = server
        self._root = psutil.Process(server.process.pid)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._started_s = time.perf_counter()
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._note()

    def at(self, fraction: float) -> int:
        """Bytes at a part of the time."""
        return self.samples[round(fraction * (len(self.samples) - 1))][1]

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max(memory for _, memory in self.samples)

    @property
    def mean_running(self) -> float:
        """Slots in use."""
        return sum(number * times for number, times in self.num_running.items()) / max(1, self.num_running.total())

    def _watch(self) -> None:
        while not self._is_over.wait(self.PERIOD_S):
            self._note()
            self.num_running[busy(self._server)[0]] += 1

    def _note(self) -> None:
        self.samples.append((time.perf_counter() - self._started_s, tree_bytes(self._root)))


def busy(server: Server) -> tuple[int, int]:
    """How many run, and how many wait."""
    engine: Any = server.health()
    return engine["running"], engine["waiting"]


@contextmanager
def _stream(server: Server, path: str, body: object, *, key: str = "") -> Iterator[httpx.Response]:
    headers = {"X-API-Key": key} if key else {}
    with (
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False, headers=headers) as client,
        client.stream("POST", path, json=body) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise Broken(f"HTTP {response.status_code}: {response.read().decode(errors='replace')[:200]}")
        yield response


def _pieces(response: httpx.Response) -> Iterator[tuple[float, str]]:
    is_whole = False
    for event in events((time.perf_counter(), piece) for piece in response.iter_raw()):
        if event.name == "error":
            raise Broken(event.data)
        is_whole |= event.name == "end"
        yield event.arrived_s, delta(event).text
    if not is_whole:
        raise Broken("the stream ended before the answer did")
