"""What is told of each request: its id, its line in the log, and nothing of its texts."""

import asyncio
import json
import logging
from io import StringIO

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.caller import Report
from llm.generation import Timings
from service.errors import Problem
from service.records.logs import log_handler, log_request
from service.records.record import Record, current_record, record_of
from service.records.recorder import Recorder


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 202, "headers": []})
    await send({"type": "http.response.body", "body": b"secret answer"})


async def call(
    app: ASGIApp = answer, *, path: str = "/chat/invoke", keeps_texts: bool = False, **headers: str
) -> tuple[httpx.Response, Record]:
    told: list[Record] = []
    recorder = Recorder(app, tell=told.append, keeps_texts=keeps_texts)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(recorder), base_url="http://localhost") as client:
        response = await client.post(path, content=b"secret question", headers=named)
    (record,) = told
    return response, record


def report(**fields: float) -> Report:
    timings = Timings(queued=fields["queued"], tokens=[fields["first_token"]])
    timings.admitted = fields["admitted"]
    return Report(
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=3,
        finish_reason="stop",
        error=None,
        timings=timings,
    )


async def test_a_request_keeps_the_id_that_its_caller_gives() -> None:
    response, record = await call(x_request_id="from-Ada_1.2")
    assert response.headers["x-request-id"] == record.id == "from-Ada_1.2"


@pytest.mark.parametrize("wrong", ["", "a b", "a\tb", "x" * 129, 'a"b', "a;b", "{}"])
async def test_what_could_harm_a_log_is_no_id(wrong: str) -> None:
    response, record = await call(x_request_id=wrong)
    assert response.headers["x-request-id"] == record.id != wrong
    assert len(record.id) == 32


async def test_a_record_tells_who_what_and_how_it_ended() -> None:
    _, record = await call(path="/chat/inv%0aoke")
    assert (record.method, record.path, record.client) == ("POST", "/chat/inv%0aoke", "127.0.0.1")
    assert (record.status, record.is_whole) == (202, True)
    assert (record.request_text, record.answer_text) == (None, None)


async def test_the_options_in_a_share_link_are_not_told() -> None:
    _, record = await call(path="/chat/c/N4IgdghgtgpiBcIDCBLAJgGxAXyA/invoke")
    assert record.path == "/chat/c/…/invoke"
    _, record = await call(path="/chat/%63/N4IgdghgtgpiBcIDCBLAJgGxAXyA/invoke%0A")
    assert record.path == "/chat/c/…/invoke%0A"


@pytest.mark.parametrize("path", ["/chat/C/{}/x", "/chat/c//{}/x", "/chat/c;{}/x", "/chat%2FC%2F{}%2Fx"])
async def test_nor_are_those_in_a_misspelt_one(path: str) -> None:
    packed = "N4IgzgngdgLgFgUwE4EMAuBzEAuEAmABgEYAOAGhGQEskBXFNOgJxAF8g"
    _, record = await call(path=path.format(packed))
    assert packed not in record.path
    assert "…" in record.path
    assert record.path.endswith("/x")


async def test_texts_are_kept_where_they_are_asked_for() -> None:
    _, record = await call(keeps_texts=True)
    assert (record.request_text, record.answer_text) == ("secret question", "secret answer")


async def test_a_request_that_fails_or_is_cancelled_is_told_of_too() -> None:
    told: list[Record] = []

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["key"] = "ada"
        raise RuntimeError

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(RuntimeError):
        await Recorder(fail, tell=told.append, keeps_texts=False)(scope, None, None)  # type: ignore[arg-type]

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    recorder = Recorder(wait, tell=told.append, keeps_texts=False)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(recorder({**scope, "state": {}}, None, None), 0.05)  # type: ignore[arg-type]
    assert [(record.key, record.status, record.is_whole) for record in told] == [("ada", 0, False), ("", 0, False)]


async def test_every_line_of_the_log_says_which_request_it_is_about(service_log: StringIO) -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        logging.getLogger("anybody").info("thinking")
        await asyncio.to_thread(logging.getLogger("anybody").info, "in a thread")
        await answer(scope, receive, send)

    _, record = await call(work)
    assert service_log.getvalue().count(f"[{record.id}]") == 2
    assert current_record.get() is None


def test_a_record_adds_up_what_its_generations_took() -> None:
    record = Record(id="1", method="POST", path="/", client="", started=100.0)
    record.add(report(queued=101.0, admitted=101.5, first_token=102.0))
    record.add(report(queued=101.0, admitted=103.0, first_token=103.5))
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (20, 8, 6)
    assert (record.queue_s, record.first_token_s) == (2.0, 2.0)
    assert record.finish_reasons == {"stop": 2}


def finished(**fields: object) -> Record:
    record = Record(id="abc", method="POST", path="/chat/stream", client="10.0.0.1")
    record.key, record.chain, record.endpoint, record.status, record.is_whole = "ada", "chat", "stream", 200, True
    record.add(report(queued=record.started, admitted=record.started + 0.5, first_token=record.started + 1))
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def test_the_line_of_a_request_is_for_people(service_log: StringIO) -> None:
    log_request(finished())
    line = service_log.getvalue()
    assert " INFO service.requests: POST /chat/stream 200 after 0.0" in line
    assert line.endswith("s, key ada, 10 + 3 tokens, the first after 1.000 s [abc]\n")


def test_the_line_of_a_request_is_one_json_object_where_that_is_asked_for() -> None:
    stream = StringIO()
    logger = logging.getLogger("service.requests")
    handler = log_handler("json", stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log_request(finished(problem=Problem(500, "generation_failed", "failed"), is_whole=False))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    line = json.loads(stream.getvalue())
    assert line.pop("time")
    assert line.pop("message").startswith("POST /chat/stream 200")
    assert 0 <= line.pop("duration_s") < 5
    assert line == {
        "level": "WARNING",
        "logger": "service.requests",
        "request_id": "abc",
        "method": "POST",
        "path": "/chat/stream",
        "client": "10.0.0.1",
        "chain": "chat",
        "endpoint": "stream",
        "key": "ada",
        "status": 200,
        "error": "generation_failed",
        "gone": True,
        "queue_s": 0.5,
        "first_token_s": 1.0,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "finish_reasons": {"stop": 1},
    }


def test_health_checks_do_not_fill_the_log(service_log: StringIO) -> None:
    log_request(finished(path="/health"))
    assert service_log.getvalue() == ""


async def test_the_record_is_where_the_layers_inside_find_it() -> None:
    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        assert record_of(scope) is current_record.get()
        await answer(scope, receive, send)

    await call(work)
