"""What a server process holds: memory, file descriptors, slots. For tests that compare before with after."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.chaos.client import Outcome, ask, request
from tests.server import Server

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds at a moment."""

    rss_mib: float
    fds: int
    threads: int

    def __str__(self) -> str:
        return f"{self.rss_mib:.0f} MiB, {self.fds} file descriptors, {self.threads} threads"


def held(server: Server) -> Held:
    process = psutil.Process(server.process.pid)
    return Held(process.memory_info().rss / MIB, process.num_fds(), process.num_threads())


async def health(server: Server) -> dict[str, Any]:
    """What `/health` says of the engine."""
    report: dict[str, Any] = json.loads((await get(server, "/health")).body)["engine"]
    return report


async def get(server: Server, path: str) -> Outcome:
    return await ask(server.port, request(path))


async def until(server: Server, *, within_s: float, **engine: object) -> float:
    """Wait until `/health` says this of the engine; return how long that took."""
    started_s = time.perf_counter()
    while True:
        seen = await health(server)
        waited_s = time.perf_counter() - started_s
        if all(seen[name] == value for name, value in engine.items()):
            return waited_s
        assert waited_s < within_s, f"not {engine} within {within_s} s: {seen}"
        await asyncio.sleep(0.02)


async def idle(server: Server, *, within_s: float = 2) -> float:
    """Wait until nothing runs or waits; return how long that took."""
    return await until(server, within_s=within_s, running=0, waiting=0)


async def few_fds(server: Server, at_most: int, *, within_s: float = 10) -> None:
    """Wait until no more file descriptors are open than this."""
    deadline_s = time.perf_counter() + within_s
    while (now := held(server)).fds > at_most:
        assert time.perf_counter() < deadline_s, f"{now.fds} file descriptors are open, of {at_most} before"
        await asyncio.sleep(0.05)


async def assert_all_slots_are_free(server: Server, long: bytes, slots: int) -> None:
    """As many can run at once as ever. The message asks for a stream that takes some seconds."""
    streams = [asyncio.create_task(ask(server.port, long)) for _ in range(slots)]
    try:
        await until(server, within_s=20, running=slots, waiting=0)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.wait(streams)
    await idle(server)


def assert_refused(status: int, request_id: str, body: Any) -> None:
    """It is a refusal in the one shape, and the service's own trouble only where it says which."""
    assert status < 500 or (status == 503 and body["error"]["type"] in ("queue_full", "loading"))
    assert set(body) == {"error"}
    assert set(body["error"]) - {"field"} == {"type", "message", "request_id"}
    assert body["error"]["request_id"] == request_id
    assert "Traceback" not in json.dumps(body)
