"""The application around chains of one's own, without a network."""

import time
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import BaseModel, ConfigDict, Field

import chains
from chains import Chain
from chains.options import with_options
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from llm.caller import current_caller
from llm.errors import EngineRestarted
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute on the instance")  # LangServe's


class Joke(BaseModel):
    model_config = ConfigDict(extra="forbid")

    """What to joke about."""

    topic: Annotated[str, Field(min_length=1)]


def joke_chain(runnable: Runnable[Any, Any], *, name: str = "joke") -> Chain:
    return Chain(
        name=name,
        description="Tell a joke.",
        runnable=runnable.with_types(input_type=Joke, output_type=str),
        input_type=Joke,
        messages=lambda joke, _: [HumanMessage(joke["topic"])],
        options=dict,
        example={"topic": "the sea"},
    )


def no_limit(messages: Sequence[BaseMessage], **options: Any) -> int:
    return len(messages)


def app_of(*hosted: Chain, check: Callable[..., int] = no_limit, **settings: Any) -> FastAPI:
    engine = ScriptedEngine()
    engine.wait_until_ready()
    return create_app(Settings(**settings), chains=hosted, check=check, engine=engine)


async def request(app: FastAPI, method: str, path: str, body: Any = None) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, json=body)


async def test_one_more_chain_is_one_more_builder() -> None:
    def build(model: Any) -> Chain:
        answer = with_options(model, temperature=0.0)
        prompt = ChatPromptTemplate([("human", "A joke about {topic}")])
        return joke_chain(prompt | answer | StrOutputParser())

    engine = ScriptedEngine()
    engine.wait_until_ready()
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    hosted = [*chains.build_chains(model), build(model)]
    app = create_app(Settings(), chains=hosted, check=model.check, engine=engine)
    answer = await request(app, "POST", "/joke/invoke", {"input": {"topic": "the sea"}})
    assert answer.json()["output"] == "A joke about the sea"
    short = {"input": {"topic": "the sea"}, "config": {"configurable": {"max_tokens": 6}}}
    assert (await request(app, "POST", "/joke/invoke", short)).json()["output"] == "A joke"
    refused = await request(app, "POST", "/joke/invoke", {"input": {"topic": ""}})
    assert refused.json()["error"]["field"] == "input.topic"
    assert "/joke/playground/" in (await request(app, "GET", "/")).text
    assert (await request(app, "POST", "/translate/invoke", {"input": {}})).status_code == 422


async def test_two_hosted_functions_of_one_name_do_not_mix() -> None:
    """LangServe keeps output models by the name of their class, in the process."""

    def first() -> Chain:
        return joke_chain(RunnableLambda(lambda _: "one"), name="first")

    def second() -> Chain:
        return joke_chain(RunnableLambda(lambda _: "two"), name="second")

    app = app_of(first(), second())
    body = {"input": {"topic": "the sea"}}
    assert (await request(app, "POST", "/first/invoke", body)).json()["output"] == "one"
    assert (await request(app, "POST", "/second/invoke", body)).json()["output"] == "two"


async def test_the_code_of_a_request_knows_on_whose_behalf_it_runs() -> None:
    def whoami(_: Any) -> str:
        caller = current_caller.get()
        assert caller is not None
        assert caller.deadline is not None
        assert 0 < caller.deadline - time.monotonic() < 100
        return caller.trace_id

    app = app_of(joke_chain(RunnableLambda(whoami)), timeout_s=100)
    for _ in range(2):
        answer = await request(app, "POST", "/joke/invoke", {"input": {"topic": "me"}})
        assert answer.json()["output"] == answer.headers["x-request-id"]


async def test_the_door_shows_the_model_what_the_chain_would() -> None:
    shown: list[Any] = []

    def check(messages: Sequence[BaseMessage], **options: Any) -> int:
        shown.append((messages, options))
        return 1

    app = app_of(joke_chain(RunnableLambda(lambda _: "Ha!")), check=check)
    await request(app, "POST", "/joke/batch", {"inputs": [{"topic": "one"}, {"topic": "two"}]})
    assert shown == [([HumanMessage("one")], {}), ([HumanMessage("two")], {})]


async def test_whatever_the_model_refuses_at_the_door_is_a_status() -> None:
    def check(messages: Sequence[BaseMessage], **options: Any) -> int:
        raise EngineRestarted("the engine starts again")

    app = app_of(joke_chain(RunnableLambda(lambda _: "Ha!")), check=check)
    for endpoint in ("invoke", "stream", "stream_log", "stream_events"):
        refused = await request(app, "POST", f"/joke/{endpoint}", {"input": {"topic": "the sea"}})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["message"] == "the engine starts again"


async def test_an_unforeseen_error_is_one_without_detail_and_in_the_log(service_log: StringIO) -> None:
    def fail(_: Any) -> str:
        raise RuntimeError("secret detail")

    answer = await request(app_of(joke_chain(RunnableLambda(fail))), "POST", "/joke/invoke", {"input": {"topic": "a"}})
    assert answer.status_code == 500
    assert answer.headers["connection"] == "close"
    assert "secret" not in answer.text
    request_id = answer.json()["error"]["request_id"]
    assert answer.json()["error"]["type"] == "chain_failed"
    assert f"The request failed: chain_failed [{request_id}]" in service_log.getvalue()
    assert 'raise RuntimeError("secret detail")' in service_log.getvalue(), "the line that failed"
    assert "RuntimeError: secret detail" not in service_log.getvalue()


@pytest.mark.parametrize("name", ["plain", "Ärger & <b>Co</b>"])
async def test_the_index_page_escapes_what_chains_are_called(name: str) -> None:
    chain = joke_chain(RunnableLambda(lambda _: "Ha!"), name="joke")
    hosted = Chain(**{field: getattr(chain, field) for field in Chain.__slots__} | {"description": name})
    page = (await request(app_of(hosted), "GET", "/")).text
    assert "<b>Co" not in page


@pytest.mark.parametrize("name", ["health", "static", "docs", "metrics"])
def test_a_chain_does_not_take_the_place_of_a_page(name: str) -> None:
    with pytest.raises(ValueError, match=f"no chain can be called {name}"):
        app_of(joke_chain(RunnableLambda(lambda _: "Ha!"), name=name))
