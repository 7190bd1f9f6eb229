"""Chains that fail, warn and leave things behind: callers get a typed error, and the log holds none of their texts."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server

SCRIPT = """
import asyncio, gc, logging, sys, threading, warnings
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import ToolException, tool
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
import serve
from chains import Chain
from llm import ScriptedEngine
from service.settings import read_settings

class Text(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str

class Count(BaseModel):
    number: int

class FailingCallback(BaseCallbackHandler):
    def on_chain_start(self, serialized, inputs, **kwargs):
        raise RuntimeError(f"callback got {inputs}")

@tool
def look_up(text: str) -> str:
    "Look something up."
    raise ToolException(f"no such thing: {text}")

class OfALibrary(BaseException):
    pass

class Finalised:
    def __init__(self, text): self.text = text
    def __del__(self): raise ValueError(self.text)

async def fail_later(text):
    raise ValueError(f"a task with {text}")

async def numbers(text):
    try:
        yield 1
        yield 2
    finally:
        raise ValueError(f"a generator with {text}")

def fail_in_thread(text):
    raise ValueError(f"a thread with {text}")

def recurse(text):
    return recurse(text)

async def leave_things_behind(text):
    library = logging.getLogger("some.library")
    library.warning("got %s", text)
    library.warning(f"got {text}", extra={"text": text})
    library.warning("got %d", text)
    try:
        int(text)
    except ValueError:
        library.exception("in a library")
    warnings.warn(f"odd: {text}")
    Finalised(text)
    thread = threading.Thread(target=fail_in_thread, args=(text,))
    thread.start()
    thread.join()
    task = asyncio.create_task(fail_later(text))
    await asyncio.sleep(0.01)
    del task
    generator = numbers(text)
    await anext(generator)
    del generator
    asyncio.get_running_loop().call_soon(fail_in_thread, text)
    await asyncio.sleep(0.01)
    gc.collect()

async def finish(message):
    text = message.text
    what = text.split()[0]
    if what == "parser":
        return JsonOutputParser().invoke(message)
    if what == "tool":
        return look_up.invoke({"text": text})
    if what == "value":
        try:
            {}[text]
        except KeyError as error:
            raise ValueError(f"bad value {text}") from error
    if what == "validation":
        Count.model_validate({"number": text})
    if what == "json":
        import json
        json.loads(text)
    if what == "recursion":
        recurse(text)
    if what == "timeout":
        raise TimeoutError(text)
    if what == "cancelled":
        raise asyncio.CancelledError(text)
    if what == "group":
        raise ExceptionGroup(text, [ValueError(text), KeyError(text)])
    if what == "status":
        raise HTTPException(99999, text)
    if what == "base":
        raise OfALibrary(text)
    if what == "base_group":
        raise BaseExceptionGroup(text, [OfALibrary(text), ValueError(text)])
    if what == "object":
        return object()
    if what == "number":
        return 5
    if what == "behind":
        await leave_things_behind(text)
    return text

def build(model):
    runnable = RunnableLambda(lambda value: value["text"]) | model | RunnableLambda(finish).with_config(
        callbacks=[FailingCallback()]
    )
    return [Chain(
        name="own", description="", runnable=runnable.with_types(input_type=Text, output_type=str), input_type=Text,
        messages=lambda value, _: [HumanMessage(value["text"])], options=dict, example={"text": "Hi!"},
    )]

serve.build_chains = build
sys.exit(serve.run(read_settings(sys.argv[1:]), ScriptedEngine()))
"""
SECRET = "rosebud"
ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")
FAILURES = {
    "parser": (502, "output_parser_failed", "OutputParserException"),
    "tool": (502, "tool_failed", "ToolException"),
    "value": (500, "chain_failed", "ValueError"),
    "validation": (500, "chain_failed", "ValidationError"),
    "json": (500, "chain_failed", "JSONDecodeError"),
    "recursion": (500, "chain_failed", "RecursionError"),
    "timeout": (500, "chain_failed", "TimeoutError"),
    "cancelled": (500, "chain_failed", "CancelledError"),
    "group": (500, "chain_failed", "ExceptionGroup"),
    "status": (500, "chain_failed", "HTTPException"),
    "base": (500, "chain_failed", "OfALibrary"),
    "object": (500, "not_serializable", "serialization.py"),
    "base_group": (500, "chain_failed", "BaseExceptionGroup"),
}
"""What a chain does, and what callers see and the log names."""


def serving(directory: Path, **settings: str) -> Server:
    (directory / "serve_own.py").write_text(SCRIPT)
    return Server(directory / "log", script=directory / "serve_own.py", **settings)  # type: ignore[arg-type]


def ask(server: Server, endpoint: str, what: str) -> tuple[int, str]:
    """The status, and all that came until the connection ended."""
    one = {"text": f"{what} {SECRET}"}
    body: Any = {"inputs": [one]} if endpoint == "batch" else {"input": one}
    said = b""
    with httpx.stream("POST", f"{server.url}/own/{endpoint}", json=body, timeout=60) as response:
        for piece in response.iter_raw():
            said += piece
    return response.status_code, said.decode()


def error_in(said: str) -> dict[str, str]:
    """The error in a body, or in the last event of a stream."""
    error: dict[str, str] = json.loads(said.rpartition("event: error\r\ndata: ")[2])["error"]
    return error


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_chains_own_failure_is_a_typed_error_and_quotes_nobody(tmp_path: Path, log_format: str) -> None:
    with serving(tmp_path, log_format=log_format, log_level="debug") as server:
        for endpoint in ENDPOINTS:
            for what, (status, kind, name) in FAILURES.items():
                got, said = ask(server, endpoint, what)
                error = error_in(said)
                assert (got, error["type"]) == (200 if "stream" in endpoint else status, kind), (endpoint, what)
                assert "own" in error["message"]
                assert kind != "chain_failed" or name in error["message"]
                assert SECRET not in json.dumps(error)
            status, said = ask(server, endpoint, "number")  # the chain's output type is a string
            if "stream" in endpoint:
                assert (status, "event: error" in said) == (200, False), said
            else:
                assert (status, error_in(said)["type"]) == (500, "invalid_output"), said
            status, said = ask(server, endpoint, "behind")
            assert (status, "event: error" in said) == (200, False), said
        assert server.process.poll() is None
    log = server.log.read_text()
    assert SECRET not in log
    for _, _, name in FAILURES.values():
        assert name in log, "what failed is in the log"
    assert "serve_own.py" in log, "and where"
    for left in (
        "some.library",
        "UserWarning",
        "The thread",
        "__del__",
        "never retrieved",
        "in callback",
    ):
        assert left in log, left
    if log_format == "json":
        assert all(isinstance(json.loads(line), dict) for line in log.splitlines())


def test_texts_of_failures_are_in_the_log_where_they_are_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path, log_format="json", log_texts="true") as server:
        _, said = ask(server, "invoke", "parser")
        assert SECRET not in said
    tracebacks = [json.loads(line).get("traceback", "") for line in server.log.read_text().splitlines() if "{" in line]
    assert any(f"Invalid json output: parser {SECRET}" in traceback for traceback in tracebacks)
