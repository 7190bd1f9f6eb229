"""Chains of one's own, written without a thought for who goes away or how long it takes: they end all the same."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server
from tests.wire.asking import until
from tests.wire.test_http import failed_stream

SCRIPT = """
import sys, time
from collections.abc import Iterator
from langchain_core.messages import HumanMessage
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel, ConfigDict
import chains, serve
from chains import Chain
from llm import ScriptedEngine
from service.settings import read_settings

class Text(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str

def hosted(name, runnable):
    return Chain(
        name=name, description="", runnable=runnable.with_types(input_type=Text, output_type=str), input_type=Text,
        messages=lambda value, _: [HumanMessage(value["text"])], options=dict, example={"text": "Hi!"},
    )

def build(model):
    def ask_again_and_again(value) -> str:
        return "".join(model.invoke("slow", max_tokens=20).content for _ in range(100))

    class PassOn(BaseChatModel):  # as model classes are written that have no async side: LangChain runs it in threads
        _llm_type = "sync"

        def _generate(self, messages, stop=None, run_manager=None, **kwargs) -> ChatResult:
            return generate_from_stream(self._stream(messages))

        def _stream(self, messages, stop=None, run_manager=None, **kwargs) -> Iterator[ChatGenerationChunk]:
            for chunk in model.stream(messages, max_tokens=2000):
                yield ChatGenerationChunk(message=chunk)

    def sleep(value) -> str:
        time.sleep(6 if value["text"] == "Hi!" else 3600)
        return "awake"

    return [
        hosted("again", RunnableLambda(ask_again_and_again)),
        hosted("on", RunnableLambda(lambda value: value["text"]) | PassOn() | StrOutputParser()),
        hosted("sleep", RunnableLambda(sleep)),
    ]

def slow(message):
    for index in range(2000):
        time.sleep(0.01)
        yield "x"

serve.build_chains = build
sys.exit(serve.run(read_settings(sys.argv[1:]), ScriptedEngine(slow)))
"""
ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("own-server")
    (directory / "serve_own.py").write_text(SCRIPT)
    with Server(directory / "log", script=directory / "serve_own.py", timeout_s="60,sleep=0.3") as server:
        yield server


def body(endpoint: str) -> Any:
    return {"inputs": [{"text": "Hi!"}]} if endpoint == "batch" else {"input": {"text": "Hi!"}}


@pytest.mark.parametrize("chain", ["again", "on"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_client_that_leaves_a_sync_chain_frees_its_slot_and_none_is_taken_again(
    own_server: Server, chain: str, endpoint: str
) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        asking = asyncio.create_task(client.post(f"{own_server.url}/{chain}/{endpoint}", json=body(endpoint)))
        await until(own_server, running=1, within_s=5)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await until(own_server, running=0, waiting=0, within_s=1)
    # Also between two of its requests, before the service knows that the client has left.
    num_idle, deadline = 0, time.monotonic() + 5
    while num_idle < 10:
        assert time.monotonic() < deadline, "the sync chain still submits requests after its client left"
        await asyncio.sleep(0.02)
        num_idle = num_idle + 1 if own_server.health()["running"] == 0 else 0


@pytest.mark.parametrize("endpoint", ["invoke", "batch"])
def test_a_chain_that_hangs_is_given_up(own_server: Server, endpoint: str) -> None:
    started = time.monotonic()
    response = httpx.post(f"{own_server.url}/sleep/{endpoint}", json=body(endpoint), timeout=30)
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "deadline_exceeded"
    assert time.monotonic() - started < 6, "it does not wait for what cannot be stopped"


def test_a_chain_that_hangs_in_a_stream_is_given_up_with_an_error_event(own_server: Server) -> None:
    said = failed_stream(own_server, "/sleep/stream", body("stream"))
    assert b"event: error" in said
    assert b"deadline_exceeded" in said


def test_a_place_is_free_again_once_a_chain_was_given_up(own_server: Server) -> None:
    metrics = httpx.get(f"{own_server.url}/metrics").text
    assert "serve_http_requests_inside 0.0" in metrics


def test_a_thread_that_nobody_can_stop_does_not_keep_the_service_from_stopping(tmp_path: Path) -> None:
    (tmp_path / "serve_own.py").write_text(SCRIPT)
    with Server(tmp_path / "log", script=tmp_path / "serve_own.py", timeout_s="60,sleep=0.3") as server:
        assert httpx.post(f"{server.url}/sleep/invoke", json={"input": {"text": "long"}}, timeout=30).status_code == 504
        assert server.stop(timeout_s=25) == 0
        assert "Traceback" not in server.log.read_text()
