"""Bodies made to cost much: within default limits none holds the event loop up, and cost grows with size at most.

Time is that of the CPU, of the event loop's own thread or of the whole process: a busy machine changes little of it.
"""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from chains import build_chains
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute on the instance")  # LangServe's

MAX_STALL_S = 0.25
"""CPU time that one callback may take on the event loop, which serves nobody else meanwhile."""

MAX_S_PER_BYTE = 50e-6
FLOOR_S = 0.1
"""Of any request, whatever its size."""

HI = {"text": "Hi!", "target_language": "German"}


def body(input_: Any, **more: Any) -> bytes:
    return json.dumps({"input": input_, **more}).encode()


def repeated(start: bytes, each: bytes, end: bytes) -> Callable[[int], bytes]:
    return lambda size: start + each * ((size - len(start) - len(end)) // len(each)) + end


def entries(size: int, entry: Any) -> list[Any]:
    return [entry] * (size // (len(json.dumps(entry)) + 2))


CASES: dict[str, tuple[str, Callable[[int], bytes], int]] = {
    "empty arrays": ("summarize", repeated(b'{"input":[', b"[],", b"[]]}"), 8_000_000),
    "empty objects": ("summarize", repeated(b'{"input":[', b"{},", b"{}]}"), 8_000_000),
    "numbers": ("summarize", repeated(b'{"input":[', b"1,", b"1]}"), 8_000_000),
    "one key again and again": ("summarize", repeated(b'{"input":{', b'"a":[],', b'"a":1}}'), 8_000_000),
    "escapes": ("summarize", repeated(b'{"input":{"text":"', b"\\n", b'"}}'), 8_000_000),
    "invalid JSON": ("summarize", repeated(b'{"input":{"text":"', b"a", b'"}'), 8_000_000),
    "open arrays": ("summarize", repeated(b"", b"[", b""), 1_000_000),
    "keys": ("translate", lambda size: body({f"k{i}": 0 for i in range(size // 10)}), 1_000_000),
    "glossary": ("translate", lambda size: body({**HI, "glossary": entries(size, 0)}), 600_000),
    "documents": ("summarize", lambda size: body({"documents": entries(size, 0)}), 600_000),
    "stop": ("translate", lambda size: body(HI, config={"configurable": {"stop": entries(size, "")}}), 700_000),
    "tags": ("translate", lambda size: body(HI, config={"tags": entries(size, "a")}), 900_000),
    "metadata": ("translate", lambda size: body(HI, config={"metadata": {"a": entries(size, 0)}}), 600_000),
    "names": ("translate", lambda size: body(HI, exclude_names=entries(size, "a")), 900_000),
    "configs": ("translate", lambda size: body(HI, config=entries(size, {"configurable": {}})), 900_000),
    "kwargs": ("translate", lambda size: body(HI, kwargs=entries(size, {})), 700_000),
    "content blocks": (
        "chat",
        lambda size: body({"messages": [{"role": "user", "content": entries(size, "a")}]}),
        900_000,
    ),
    "wrong messages": ("chat", lambda size: body({"messages": entries(size, 0)}), 600_000),
    "messages": ("chat", lambda size: body({"messages": entries(size, ["user", "a"])}), 140_000),
}


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    engine = ScriptedEngine()
    engine.wait_until_ready()
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    yield create_app(Settings(), chains=build_chains(model), check=model.check, engine=engine)
    engine.close()


class Stalls:
    """The longest callback of the event loop, in CPU seconds of its thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.longest_s = 0.0
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            begun = time.thread_time()
            run(handle)
            self.longest_s = max(self.longest_s, time.thread_time() - begun)

        monkeypatch.setattr(asyncio.Handle, "_run", timed)


@pytest.fixture
def stalls(monkeypatch: pytest.MonkeyPatch) -> Stalls:
    return Stalls(monkeypatch)


async def post(app: FastAPI, path: str, content: bytes) -> httpx.Response:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65_536):
            yield content[start : start + 65_536]
            await asyncio.sleep(0)  # each comes by itself, as from a socket

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        return await client.post(path, content=pieces(), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("chain", "content", "size"), CASES.values(), ids=CASES)
async def test_a_hostile_body_costs_little_and_holds_nobody_up(
    app: FastAPI, stalls: Stalls, chain: str, content: Callable[[int], bytes], size: int
) -> None:
    await post(app, f"/{chain}/invoke", b"{}")
    endpoint = "stream_events" if "names" in content(100).decode() else "invoke"
    taken: list[float] = []
    for part in (size // 4, size):
        sent = content(part)
        gc.collect()
        await asyncio.sleep(0)  # the callback that made the body ends here
        stalls.longest_s = 0.0
        begun = time.process_time()
        answer = await post(app, f"/{chain}/{endpoint}", sent)
        taken.append(time.process_time() - begun)
        assert answer.status_code in (200, 400, 413, 422), answer.text
        assert stalls.longest_s < MAX_STALL_S
        assert taken[-1] < FLOOR_S + MAX_S_PER_BYTE * len(sent)
    assert taken[1] < FLOOR_S + 8 * taken[0], "four times the body costs four times as much, at most"
