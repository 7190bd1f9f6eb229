"""Many callers at once: each gets its own answer, and who leaves takes its work along."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import HumanMessage

from tests.scripted_server import SLOW
from tests.server import Server
from tests.wire.asking import ENDPOINTS, until


def say(text: str) -> dict[str, Any]:
    return {"text": text, "target_language": "German"}


def body(endpoint: str, text: str) -> dict[str, Any]:
    """A request; a batch has two of it."""
    return {"inputs": [say(text)] * 2} if endpoint == "batch" else {"input": say(text)}


@asynccontextmanager
async def request_in_flight(server: Server, endpoint: str, text: str) -> AsyncIterator[asyncio.Task[None]]:
    """A client that waits for an answer, and goes away in the end."""

    async def ask() -> None:
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream("POST", f"{server.url}/translate/{endpoint}", json=body(endpoint, text)) as response,
        ):
            with suppress(httpx.RemoteProtocolError):
                async for _ in response.aiter_raw():
                    pass

    task = asyncio.create_task(ask())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def ask_by(verb: str, server: Server, text: str) -> str:
    """What a caller hears, by one of the verbs."""
    translate, chat = server.chain("translate"), server.chain("chat")
    match verb:
        case "invoke":
            return str(await translate.ainvoke(say(text)))
        case "batch":
            first, second = await translate.abatch([say(text), say(f"{text}, again")])
            assert second == f"{text}, again"
            return str(first)
        case "stream":
            return "".join([chunk async for chunk in translate.astream(say(text))])
        case "chat":
            return str((await chat.ainvoke({"messages": [HumanMessage(text)]})).content)
        case "chat stream":
            return "".join([chunk.content async for chunk in chat.astream({"messages": [HumanMessage(text)]})])
    raise ValueError(verb)


@pytest.mark.parametrize("verb", ["invoke", "batch", "stream", "chat", "chat stream"])
async def test_sixteen_callers_each_get_their_own_answer(scripted_server: Server, verb: str) -> None:
    texts = [f"Caller {index} by {verb}, {'very' * index} truly" for index in range(16)]
    assert await asyncio.gather(*(ask_by(verb, scripted_server, text) for text in texts)) == texts


async def test_sixteen_callers_of_mixed_verbs_each_get_their_own_answer(scripted_server: Server) -> None:
    verbs = ["invoke", "batch", "stream", "chat", "chat stream"]
    asked = [(verbs[index % len(verbs)], f"caller {index}") for index in range(16)]
    answers = await asyncio.gather(*(ask_by(verb, scripted_server, text) for verb, text in asked))
    assert answers == [text for _, text in asked]


async def test_callers_of_the_real_model_each_get_what_they_would_get_alone(server: Server) -> None:
    chat = server.chain("chat")
    options: Any = {"configurable": {"temperature": 0, "max_tokens": 8}}
    inputs = [{"messages": [HumanMessage(f"What is the capital of {place}?")]} for place in ("France", "Italy")]
    alone = [(await chat.ainvoke(each, options)).content for each in inputs]
    together = await asyncio.gather(*(chat.ainvoke(each, options) for each in inputs * 2))
    assert [answer.content for answer in together] == alone * 2
    assert alone[0] != alone[1]


async def test_a_large_batch_is_answered_in_order(scripted_server: Server) -> None:
    texts = [f"input {index}" for index in range(64)]
    assert await scripted_server.chain("translate").abatch([say(text) for text in texts]) == texts


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_client_that_leaves_frees_its_slot(scripted_server: Server, endpoint: str) -> None:
    async with request_in_flight(scripted_server, endpoint, SLOW):
        await until(scripted_server, running=2 if endpoint == "batch" else 1, waiting=0, within_s=5)
    await until(scripted_server, running=0, waiting=0, within_s=1)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_client_that_leaves_the_queue_frees_its_place(one_slot_server: Server, endpoint: str) -> None:
    async with request_in_flight(one_slot_server, "stream", SLOW):
        await until(one_slot_server, running=1, waiting=0, within_s=5)
        async with request_in_flight(one_slot_server, endpoint, "Hi!"):
            await until(one_slot_server, running=1, waiting=2 if endpoint == "batch" else 1, within_s=5)
        await until(one_slot_server, running=1, waiting=0, within_s=1)
    await until(one_slot_server, running=0, within_s=1)


async def test_a_batch_that_takes_all_slots_does_not_hold_up_somebodys_chat(scripted_server: Server) -> None:
    """One caller's 40 slow inputs are first; it gives up a slot for another caller, and all of its own are answered."""
    slots = 16
    options = {"configurable": {"max_tokens": 40}}

    async def batch() -> list[str]:
        answers: list[str] = await scripted_server.chain("translate").abatch([say("slow")] * 40, options)  # type: ignore[arg-type]
        return answers

    answers = asyncio.create_task(batch())
    await until(scripted_server, running=slots, within_s=5)
    assert await ask_by("chat", scripted_server, "Hi!") == "Hi!"
    assert not answers.done()

    assert [len(answer) for answer in await answers] == [40] * 40


@pytest.fixture(scope="module")
def one_slot_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("one-slot-server") / "log"
    with Server(log, script="tests/scripted_server.py", max_slots="1") as server:
        yield server


async def test_a_client_that_takes_one_chunk_and_leaves_frees_its_slot(scripted_server: Server) -> None:
    stream = scripted_server.chain("translate").astream(say(SLOW))
    assert await anext(stream)
    await until(scripted_server, running=1, within_s=5)
    await stream.aclose()  # type: ignore[attr-defined]
    await until(scripted_server, running=0, within_s=1)


async def test_a_failed_item_of_a_batch_takes_the_others_along(scripted_server: Server) -> None:
    """LangChain gathers a batch without cancelling it: when one item fails the answer is an error at once, and the
    rest is computed for nobody."""
    async with httpx.AsyncClient() as client:
        wrong = {"inputs": [say("fail"), say("slow")], "config": {"configurable": {"max_tokens": 400}}}
        response = await client.post(f"{scripted_server.url}/translate/batch", json=wrong)
    assert response.status_code == 500
    try:
        await until(scripted_server, running=0, waiting=0, within_s=1)
    finally:
        await until(scripted_server, running=0, waiting=0, within_s=30)


async def test_a_full_queue_refuses_with_503_and_the_numbers(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py", max_queue="1", max_slots="1") as server:
        async with request_in_flight(server, "stream", SLOW):
            await until(server, running=1, waiting=0, within_s=5)
            async with request_in_flight(server, "invoke", SLOW):
                await until(server, running=1, waiting=1, within_s=5)
                for endpoint in ENDPOINTS:
                    async with httpx.AsyncClient() as client:
                        response = await client.post(f"{server.url}/translate/{endpoint}", json=body(endpoint, "Hi!"))
                    assert response.status_code == 503
                    assert int(response.headers["retry-after"]) > 0
                    assert response.json()["error"]["type"] == "queue_full"
                    assert (
                        "2 requests run or wait already, of which 1 (SERVE_MAX_QUEUE) may wait"
                        in response.json()["error"]["message"]
                    )
        await until(server, running=0, waiting=0, within_s=1)
        assert await ask_by("invoke", server, "Hi!") == "Hi!"
        assert "Traceback" not in server.log.read_text()


async def test_a_request_that_takes_too_long_ends_with_504(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py", timeout_s="0.5", max_slots="1") as server:
        chain = server.chain("translate")
        started = time.monotonic()
        with pytest.raises(httpx.HTTPStatusError, match=r"not finished in time: ended after 0\.\d s") as caught:
            await chain.ainvoke(say(SLOW))
        assert caught.value.response.status_code == 504
        assert caught.value.response.json()["error"]["type"] == "deadline_exceeded"
        assert time.monotonic() - started < 2
        with pytest.raises(httpx.HTTPStatusError, match="not finished in time") as caught:
            await ask_by("stream", server, SLOW)
        assert caught.value.response.status_code == 504
        async with request_in_flight(server, "stream", SLOW):
            await until(server, running=1, within_s=5)
            with pytest.raises(httpx.HTTPStatusError, match="not finished in time"):  # though it may run late or never
                await chain.ainvoke(say(f"{SLOW}, after the other"))
        assert await chain.ainvoke(say("Hi!")) == "Hi!"
        assert "Traceback" not in server.log.read_text()
