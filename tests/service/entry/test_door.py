"""What is done with inputs before they are let in: whose files wait for whose, and what is counted of their texts."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import BaseModel, ConfigDict

from chains import Chain
from chains.chain import Prepare
from chains.documents.files import FileReader
from llm import ScriptedEngine
from service.app import create_app
from service.entry.preparation import LARGE, MAX_FILES
from service.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute on the instance")  # LangServe's


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str


def chain_of(prepare: Prepare, name: str = "packed", **described: Any) -> Chain:
    """A chain that tells the length of its text; it is a token a character, and its first prompt shows ten of them."""
    values: dict[str, Any] = {
        "messages": lambda value, _: [HumanMessage(value["text"][:10])],
        "num_tokens": lambda value, limit: len(value["text"]),
        **described,
    }
    length: Runnable[Any, Any] = RunnableLambda(_length)
    return Chain(
        name=name,
        description="Tell a length.",
        runnable=length.with_types(input_type=Asked, output_type=int),
        input_type=Asked,
        options=dict,
        example={"text": "Hi!"},
        prepare=prepare,
        **values,
    )


def _length(value: Any) -> int:
    return len(dict(value)["text"])


async def unpack(asked: BaseModel, reader: FileReader) -> BaseModel:
    """`800` is a file with so much text."""
    assert isinstance(asked, Asked)
    return Asked(text="x" * int(asked.text)) if asked.text.isdigit() else asked


def count(messages: Sequence[BaseMessage], **options: Any) -> int:
    return sum(len(message.text) for message in messages)


def app_of(*hosted: Chain, **settings: Any) -> FastAPI:
    engine = ScriptedEngine()
    engine.wait_until_ready()
    return create_app(Settings(**settings), chains=hosted, check=count, engine=engine)


async def post(app: FastAPI, path: str, body: Any, key: str = "") -> httpx.Response:
    headers = {"X-API-Key": key} if key else {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        return await client.post(path, json=body)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def test_a_small_file_with_much_text_in_it_does_not_hold_up_small_requests() -> None:
    go_on = threading.Event()

    def messages(value: dict[str, Any], _: Any) -> list[BaseMessage]:
        if len(value["text"]) >= LARGE:
            assert go_on.wait(30)
        return [HumanMessage("Hi!")]

    app = app_of(chain_of(unpack, messages=messages))
    async with anyio.create_task_group() as others:
        for _ in range((os.cpu_count() or 1) + 2):
            others.start_soon(post, app, "/packed/invoke", {"input": {"text": str(LARGE)}})
        await anyio.sleep(0.1)
        try:
            with anyio.fail_after(10):
                answer = await post(app, "/packed/invoke", {"input": {"text": "small"}})
        finally:
            go_on.set()
    assert answer.json()["output"] == 5


async def test_a_few_files_are_read_at_once_in_all_chains_together_and_of_each_key_one() -> None:
    begun: list[str] = []
    ends: dict[str, anyio.Event] = {}

    async def read(asked: BaseModel, reader: FileReader) -> BaseModel:
        assert isinstance(asked, Asked)
        async with reader.turn():
            begun.append(asked.text)
            ends[asked.text] = anyio.Event()
            await ends[asked.text].wait()
        return asked

    keys = {name: f"{name}-{'0' * 40}" for name in ("eve", "ada", "bob")}
    listed = ",".join(f"{name}:{key}" for name, key in keys.items())
    app = app_of(chain_of(read, "first"), chain_of(read, "second"), api_keys=listed)
    assert MAX_FILES == 2
    async with anyio.create_task_group() as tasks:
        for chain, text in (("first", "eve 1"), ("second", "eve 2"), ("first", "ada 1"), ("second", "bob 1")):
            tasks.start_soon(partial(post, app, f"/{chain}/invoke", {"input": {"text": text}}, keys[text[:3]]))
            await anyio.sleep(0.1)
        assert begun == ["eve 1", "ada 1"]
        ends["eve 1"].set()
        await until(lambda: len(begun) == 3)
        assert begun[2] == "bob 1"
        ends["bob 1"].set()
        await until(lambda: len(begun) == 4)
        ends["ada 1"].set()
        ends["eve 2"].set()


async def test_the_text_of_a_file_is_charged_by_its_memory_before_another_file_is_read() -> None:
    text = "\N{GRINNING FACE}" * 50_000
    held: list[int] = []

    async def read(asked: BaseModel, reader: FileReader) -> BaseModel:
        await reader.read(text.encode())
        held.append(app.state.bodies.num_bytes)
        return asked

    app = app_of(chain_of(read), max_body=1000, max_body_total=608_000)
    assert (await post(app, "/packed/invoke", {"input": {"text": "a"}})).status_code == 200
    assert held[0] > sys.getsizeof(text)
    refused = await post(app, "/packed/batch", {"inputs": [{"text": "a"}, {"text": "b"}]})
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "body_too_large")


async def test_the_texts_of_files_are_counted_with_their_first_prompts_and_not_once_more() -> None:
    app = app_of(chain_of(unpack), max_input_tokens="1000")
    assert (await post(app, "/packed/invoke", {"input": {"text": "1000"}})).status_code == 200
    whole = chain_of(unpack, messages=lambda value, _: [HumanMessage(value["text"] + "in short")])
    app = app_of(whole, max_input_tokens="1000")
    assert (await post(app, "/packed/invoke", {"input": {"text": "992"}})).status_code == 200
    assert (await post(app, "/packed/invoke", {"input": {"text": "993"}})).status_code == 422


@pytest.mark.parametrize("texts", [["800", "800"], ["10", "800", "190", "1"]])
async def test_what_fitted_by_its_bytes_is_counted_once_all_do_not_fit(texts: list[str]) -> None:
    app = app_of(chain_of(unpack), max_input_tokens="1000")
    answer = await post(app, "/packed/batch", {"inputs": [{"text": text} for text in texts]})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["type"], error["field"]) == ("input_too_long", f"inputs[{len(texts) - 1}]")


async def test_texts_that_fit_by_their_bytes_are_not_counted() -> None:
    app = app_of(chain_of(unpack, num_tokens=lambda value, limit: 1 // 0), max_input_tokens="1000")
    assert (await post(app, "/packed/batch", {"inputs": [{"text": "400"}, {"text": "400"}]})).json()["output"] == [
        400
    ] * 2


async def test_a_prompt_that_fails_is_a_failure_of_its_chain() -> None:
    def messages(value: dict[str, Any], _: Any) -> list[BaseMessage]:
        raise KeyError(value["text"])

    answer = await post(app_of(chain_of(unpack, messages=messages)), "/packed/invoke", {"input": {"text": "secret"}})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "chain_failed")
    assert "packed" in answer.text
    assert "KeyError" in answer.text
    assert "secret" not in answer.text
