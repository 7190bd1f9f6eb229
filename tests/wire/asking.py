"""How tests ask the service over HTTP, and wait for what `/health` says."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

from tests.server import Server

ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")


def ask(server: Server, path: str, one: Any, **configurable: Any) -> httpx.Response:
    """Post an input to an endpoint of a chain; to a batch, it alone."""
    inputs = {"inputs": [one]} if path.endswith("/batch") else {"input": one}
    return httpx.post(f"{server.url}/{path}", json={**inputs, "config": {"configurable": configurable}}, timeout=110)


def error_of(response: httpx.Response, status: int, kind: str) -> Any:
    """The error in a refusal, which came before the first byte of an answer."""
    assert response.status_code == status, response.text[:300]
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["type"] == kind
    return error


def at(endpoint: str, field: str = "") -> str:
    """Where the only input of a request is."""
    return ("inputs[0]" if endpoint == "batch" else "input") + field


def file(content: bytes, **more: Any) -> dict[str, Any]:
    """An input with a file, as LangServe's form sends it."""
    return {"file": base64.b64encode(content).decode(), **more}


def told(response: httpx.Response) -> Iterator[Any]:
    """What the events of a stream say, without the last one."""
    assert response.status_code == 200, response.text[:300]
    assert response.text.endswith("event: end\r\n\r\n")
    for line in response.text.split("\r\n"):
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def custom(events: list[Any], name: str) -> list[Any]:
    """The data of custom events of one name."""
    return [event["data"] for event in events if event["event"] == "on_custom_event" and event["name"] == name]


async def until(server: Server, *, within_s: float, **engine: int) -> None:
    """Wait until `/health` says this of the engine."""
    deadline = time.monotonic() + within_s
    async with httpx.AsyncClient() as client:
        while True:
            seen = (await client.get(f"{server.url}/health")).json()["engine"]
            if all(seen[name] == value for name, value in engine.items()):
                return
            assert time.monotonic() < deadline, f"not {engine} within {within_s} s: {seen}"
            await asyncio.sleep(0.02)


async def leave_at(server: Server, path: str, one: Any, what: str) -> None:
    """Ask for a stream, and go away once it says something."""
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{server.url}/{path}", json={"input": one}) as response,
    ):
        async for line in response.aiter_lines():
            if what in line:
                return
    raise AssertionError(f"the stream did not say {what}")
