"""The service as plain HTTP clients see it: bytes, headers, shapes."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.openapi.models import OpenAPI
from langserve.lzstring import LZString

from tests.server import Server

HELLO = {"text": "Hi!", "target_language": "German"}
CHAINS = ("chat", "translate", "translate/document", "summarize", "brief")
ERROR_KEYS = {"type", "message", "request_id"}


def post(server: Server, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body)


def failed_stream(server: Server, path: str, body: Any) -> bytes:
    """All of a stream that ends with an error event. As HTTP it is complete: a client that parses events sees it."""
    with httpx.stream("POST", f"{server.url}{path}", json=body) as response:
        assert response.status_code == 200
        return b"".join(response.iter_raw())


def events(content: bytes) -> list[tuple[str, Any]]:
    """Server-sent events, each as its name and its data."""
    frames = re.findall(rb"event: (\w+)\r\n(?:data: ([^\r\n]*)\r\n)?\r\n", content)
    assert b"".join(content.split()) == b"".join(
        b"".join((b"event: " + name + (b"data: " + data if data else b"")).split()) for name, data in frames
    ), "there is nothing between the frames"
    return [(name.decode(), json.loads(data) if data else None) for name, data in frames]


def share_link(configurable: dict[str, Any]) -> str:
    compressed: str = LZString.compressToEncodedURIComponent(  # type: ignore[no-untyped-call]
        json.dumps({"configurable": configurable})
    )
    return compressed


def test_invoke_answers_with_output_and_metadata(scripted_server: Server) -> None:
    response = post(scripted_server, "/translate/invoke", {"input": HELLO})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body == {"output": "Hi!", "metadata": {"run_id": body["metadata"]["run_id"], "feedback_tokens": []}}


def test_chat_invoke_answers_with_a_message(scripted_server: Server) -> None:
    output = post(scripted_server, "/chat/invoke", {"input": {"messages": [["user", "Hi!"]]}}).json()["output"]
    assert output["type"] == "ai"
    assert output["content"] == "Hi!"
    assert output["response_metadata"] == {
        "finish_reason": "stop",
        "model_name": "scripted",
        "messages_left_out": 0,
    }
    assert output["usage_metadata"]["output_tokens"] == len("Hi!") + 1


def test_batch_answers_in_order_with_a_run_id_each(scripted_server: Server) -> None:
    inputs = [{**HELLO, "text": text} for text in ("one", "two", "three")]
    body = post(scripted_server, "/translate/batch", {"inputs": inputs}).json()
    assert body["output"] == ["one", "two", "three"]
    assert len(set(body["metadata"]["run_ids"])) == 3
    assert [item["run_id"] for item in body["metadata"]["responses"]] == body["metadata"]["run_ids"]


def test_a_stream_is_metadata_then_data_then_end_byte_for_byte(scripted_server: Server) -> None:
    response = post(scripted_server, "/translate/stream", {"input": HELLO})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert re.fullmatch(
        rb'event: metadata\r\ndata: \{"run_id": "[0-9a-f-]{36}"\}\r\n\r\n'
        rb'(event: data\r\ndata: "[Hi!]*"\r\n\r\n)+'
        rb"event: end\r\n\r\n",
        response.content,
    )
    assert "".join(data for name, data in events(response.content) if name == "data") == "Hi!"


def test_stream_log_sends_patches_that_build_the_answer(scripted_server: Server) -> None:
    frames = events(post(scripted_server, "/translate/stream_log", {"input": HELLO}).content)
    assert [name for name, _ in frames] == ["data"] * (len(frames) - 1) + ["end"]
    assert frames[0][1]["ops"][0] == {"op": "replace", "path": "", "value": frames[0][1]["ops"][0]["value"]}
    patches = [op for _, data in frames[:-1] for op in data["ops"]]
    assert "".join(op["value"] for op in patches if op["path"] == "/streamed_output/-") == "Hi!"
    assert [op["value"] for op in patches if op["path"] == "/final_output"][-1] == "Hi!"


def test_stream_log_leaves_out_what_was_not_asked_for(scripted_server: Server) -> None:
    everything = {"input": HELLO, "diff": True}
    frames = events(post(scripted_server, "/translate/stream_log", {**everything, "include_names": ["none"]}).content)
    assert not [op for _, data in frames[:-1] for op in data["ops"] if op["path"].startswith("/logs/")]


def test_stream_events_tell_of_each_step(scripted_server: Server) -> None:
    frames = events(post(scripted_server, "/chat/stream_events", {"input": {"messages": [["user", "Hi!"]]}}).content)
    assert frames[-1] == ("end", None)
    told = [data for _, data in frames[:-1]]
    assert {event["event"] for event in told} >= {"on_chain_start", "on_chat_model_stream", "on_chain_end"}
    spoken = [event["data"]["chunk"]["content"] for event in told if event["event"] == "on_chat_model_stream"]
    assert "".join(spoken) == "Hi!"


@pytest.mark.parametrize("endpoint", ["stream", "stream_log", "stream_events"])
def test_an_error_in_a_stream_is_its_last_event_and_then_the_connection_breaks(
    scripted_server: Server, endpoint: str
) -> None:
    """LangServe's playgrounds know an error only by the broken connection, its clients by the event."""
    said = failed_stream(scripted_server, f"/translate/{endpoint}", {"input": {**HELLO, "text": "fail"}})
    *before, (name, data) = events(said)
    assert "data" in {name for name, _ in before} <= {"metadata", "data"}
    assert name == "error"
    assert data == {
        "error": {
            "type": "generation_failed",
            "message": data["message"],
            "request_id": data["error"]["request_id"],
        },
        "status_code": 500,
        "message": data["message"],
    }
    assert "generation failed" in data["message"]
    assert "secret" not in said.decode()


@pytest.mark.parametrize("endpoint", ["invoke", "batch"])
def test_an_error_has_a_body_and_closes_the_connection(scripted_server: Server, endpoint: str) -> None:
    failing = {**HELLO, "text": "fail"}
    body = {"inputs": [failing]} if endpoint == "batch" else {"input": failing}
    response = post(scripted_server, f"/translate/{endpoint}", body)
    assert response.status_code == 500
    assert response.headers["connection"] == "close"
    assert response.json()["error"]["type"] == "generation_failed"
    assert "secret" not in response.text


def test_an_answer_may_hold_any_line_end(scripted_server: Server) -> None:
    """LangServe's client cuts a chunk in two at U+2028, U+2029 and U+0085, and dies of the halves."""
    text = "a\u2028b\u2029c\u0085d\r\ne\rf\x0bg\x1ch"
    chain = scripted_server.chain("translate")
    assert "".join(chain.stream({**HELLO, "text": text})) == text
    assert chain.invoke({**HELLO, "text": text}) == text
    assert chain.batch([{**HELLO, "text": text}]) == [text]


def test_emoji_and_chinese_arrive_whole(scripted_server: Server) -> None:
    text = "你好 👩\u200d👩\u200d👧 مرحبا 𝒳"
    content = post(scripted_server, "/translate/stream", {"input": {**HELLO, "text": text}}).content
    assert "".join(data for name, data in events(content) if name == "data") == text


def test_a_share_link_keeps_its_options_beside_those_of_the_body(scripted_server: Server) -> None:
    """LangServe forgets the whole link as soon as the body has an option of its own."""
    path = f"/translate/c/{share_link({'max_tokens': 3})}"
    hello = {**HELLO, "text": "abcdef"}
    assert post(scripted_server, f"{path}/invoke", {"input": hello}).json()["output"] == "abc"
    for endpoint, body in (("invoke", {"input": hello}), ("batch", {"inputs": [hello]})):
        seeded = {**body, "config": {"configurable": {"seed": 1}}}
        assert "abc" in (output := post(scripted_server, f"{path}/{endpoint}", seeded).json()["output"])
        assert output in ("abc", ["abc"])
    streamed = post(scripted_server, f"{path}/stream", {"input": hello, "config": {"configurable": {"seed": 1}}})
    assert "".join(data for name, data in events(streamed.content) if name == "data") == "abc"


def test_options_of_the_body_win_over_those_of_a_share_link(scripted_server: Server) -> None:
    path = f"/translate/c/{share_link({'max_tokens': 3, 'stop': ['x']})}"
    configs = [{"configurable": {"max_tokens": 5}}, {}]
    body = {"inputs": [{**HELLO, "text": text} for text in ("abcdef", "axb")], "config": configs}
    assert post(scripted_server, f"{path}/batch", body).json()["output"] == ["abcde", "a"]


@pytest.mark.parametrize("name", CHAINS)
def test_the_schemas_of_a_chain_say_what_it_takes(scripted_server: Server, name: str) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(f"{scripted_server.url}/{name}{path}")

    takes = get("/input_schema").json()
    assert takes["additionalProperties"] is False
    assert (
        takes.get("required", [])
        == {
            "chat": ["messages"],
            "translate": ["text", "target_language"],
            "translate/document": ["text", "target_language"],
            "summarize": [],
            "brief": ["target_language"],
        }[name]
    )
    configurable = get("/config_schema").json()["$defs"]["Configurable"]["properties"]
    own = {"on_overflow", "system_prompt"} if name == "chat" else set()
    assert set(configurable) == own | {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "repetition_penalty",
        "seed",
        "stop",
    }
    assert (configurable["temperature"]["minimum"], configurable["temperature"]["maximum"]) == (0, 2)
    assert all(option["description"] for option in configurable.values())
    gives = get("/output_schema").json()
    titles = {"chat": "ChatOutput", "translate/document": "TranslatedDocument"}
    assert gives["title"] == titles[name] if name in titles else gives["type"] == "string"
    assert get(f"/c/{share_link({'max_tokens': 3})}/config_schema").status_code == 200


def test_health_and_ready_say_how_the_engine_is(scripted_server: Server) -> None:
    assert post(scripted_server, "/translate/invoke", {"input": HELLO}).status_code == 200
    for path in ("/health", "/ready"):
        response = httpx.get(f"{scripted_server.url}{path}")
        assert response.status_code == 200
        assert response.json() == {
            "status": "ok",
            "model": "scripted",
            "engine": {"state": "ready", "running": 0, "waiting": 0, "slots": 16, "context": 8192},
        }


def test_after_a_failure_the_engine_is_degraded_and_in_use_until_a_request_is_finished(scripted_server: Server) -> None:
    post(scripted_server, "/translate/invoke", {"input": {**HELLO, "text": "fail"}})
    ready = httpx.get(f"{scripted_server.url}/ready")
    assert ready.status_code == 200
    assert ready.json()["engine"]["state"] == "degraded"
    assert ready.json()["engine"]["error"] == "generation failed: RuntimeError"
    assert post(scripted_server, "/translate/invoke", {"input": HELLO}).status_code == 200
    assert httpx.get(f"{scripted_server.url}/ready").json()["engine"]["state"] == "ready"


def test_while_the_model_loads_requests_are_refused_with_503(tmp_path: Path) -> None:
    script = tmp_path / "serve_slowly.py"
    script.write_text(
        "from llm import ScriptedEngine\n"
        "from serve import run\n"
        "from service.settings import Settings\n"
        "run(Settings(), ScriptedEngine(load_delay_s=60))\n"
    )
    with Server(tmp_path / "log", script=script, awaited="/health") as server:
        assert server.health() == {"state": "loading", "running": 0, "waiting": 0, "slots": 0, "context": 0}
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert "loading" in httpx.get(server.url).text
        assert httpx.get(f"{server.url}/translate/input_schema").status_code == 200
        for endpoint in ("invoke", "batch", "stream", "stream_log", "stream_events"):
            body = {"inputs": [HELLO]} if endpoint == "batch" else {"input": HELLO}
            response = post(server, f"/translate/{endpoint}", body)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["type"] == "loading"
            assert "scripted is still loading" in response.json()["error"]["message"]
        assert server.stop(timeout_s=5) == 0


def test_when_the_engine_dies_health_says_why(tmp_path: Path) -> None:
    script = tmp_path / "serve_nothing.py"
    script.write_text(
        "from llm import ScriptedEngine\n"
        "from serve import run\n"
        "from service.settings import Settings\n"
        "def die(message):\n"
        "    raise SystemExit('out of memory')\n"
        "run(Settings(on_engine_death='stay'), ScriptedEngine(die))\n"
    )
    with Server(tmp_path / "log", script=script) as server:
        response = post(server, "/translate/invoke", {"input": HELLO})
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "engine_dead"
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert health.json()["status"] == "error"
        assert health.json()["engine"]["state"] == "dead"
        assert "SystemExit" in health.json()["engine"]["error"]
        assert "out of memory" not in health.text
        assert "SystemExit" in server.log.read_text()
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert post(server, "/translate/stream", {"input": HELLO}).status_code == 503


def test_the_index_page_lists_the_chains_with_links_that_work(scripted_server: Server) -> None:
    page = httpx.get(scripted_server.url).text
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert {f"/{name}/playground/" for name in CHAINS} < set(links)
    for link in links:
        assert link.startswith("/")
        assert httpx.get(f"{scripted_server.url}{link}").status_code == 200
    assert "scripted" in page
    assert "ready" in page
    assert page.count("curl http://127.0.0.1:") == len(CHAINS)


@pytest.mark.parametrize("path", ["/", "/docs", *(f"/{name}/playground/" for name in CHAINS)])
def test_a_page_loads_nothing_from_elsewhere(scripted_server: Server, path: str) -> None:
    page = httpx.get(f"{scripted_server.url}{path}").text
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="([^"]+)"', page)
    assert all(address.startswith("/") and not address.startswith("//") for address in loaded)
    for address in loaded:
        assert httpx.get(f"{scripted_server.url}{address}").status_code == 200
    assert path == "/" or loaded


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/nothing/invoke", 404, "not_found"),
        ("GET", "/translate/invoke", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", "/translate/feedback", 404, "not_found"),
        ("POST", "/translate/token_feedback", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_refused_in_the_same_shape(
    scripted_server: Server, method: str, path: str, status: int, kind: str
) -> None:
    response = httpx.request(method, f"{scripted_server.url}{path}")
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == ERROR_KEYS
    assert response.json()["error"]["type"] == kind


def test_each_response_carries_the_id_that_its_error_names(scripted_server: Server) -> None:
    refused = post(scripted_server, "/translate/invoke", {})
    assert refused.headers["x-request-id"] == refused.json()["error"]["request_id"]
    failed = post(scripted_server, "/translate/invoke", {"input": {**HELLO, "text": "fail"}})
    assert failed.headers["x-request-id"] == failed.json()["error"]["request_id"]
    assert failed.headers["x-request-id"] in scripted_server.log.read_text()
    answered = [post(scripted_server, "/translate/invoke", {"input": HELLO}) for _ in range(2)]
    assert len({response.headers["x-request-id"] for response in [refused, failed, *answered]}) == 4
    assert "x-request-id" in post(scripted_server, "/translate/stream", {"input": HELLO}).headers


def test_the_openapi_schema_describes_every_endpoint(scripted_server: Server) -> None:
    schema = httpx.get(f"{scripted_server.url}/openapi.json").json()
    for name in CHAINS:
        for endpoint in ("invoke", "batch", "stream", "stream_log", "stream_events"):
            assert "post" in schema["paths"][f"/{name}/{endpoint}"]
    OpenAPI.model_validate(schema)
    names = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schema))
    assert names
    assert set(names) <= set(schema["components"]["schemas"])


def test_behind_a_proxy_that_strips_a_prefix_all_links_carry_it(tmp_path: Path) -> None:
    with Server(
        tmp_path / "log", script="tests/scripted_server.py", root_path="/llama", allowed_hosts="example.test"
    ) as server:
        page = httpx.get(f"{server.url}/", headers={"host": "example.test"}).text
        playground = httpx.get(f"{server.url}/translate/playground/").text
        answer = httpx.post(f"{server.url}/translate/invoke", json={"input": {"text": "Hi", "target_language": "Thai"}})

    assert 'href="/llama/translate/playground/"' in page
    assert 'href="/llama/docs"' in page
    assert "curl http://example.test/llama/translate/invoke" in page
    assert 'src="/llama/translate/playground/assets/' in playground
    assert answer.json()["output"] == "Hi"
