"""What the service writes of its requests, and what it does not."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server

SECRET = "rosebud"
KEY = "ada-0123456789abcdef"
ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")


def ask(server: Server, path: str, text: str, **headers: str) -> httpx.Response:
    one = {"text": text, "target_language": "German"}
    body: Any = {"inputs": [one]} if path.endswith("batch") else {"input": one}
    return httpx.post(f"{server.url}{path}", json=body, headers={"X-API-Key": KEY, **headers}, timeout=30)


def ask_all(server: Server) -> None:
    """Everything that can become of a request that holds the secret."""
    for endpoint in ENDPOINTS:
        ask(server, f"/translate/{endpoint}", SECRET)
        ask(server, f"/translate/{endpoint}", f"{SECRET}, fail")
        ask(server, f"/translate/{endpoint}", SECRET * 3000)  # too long
        ask(server, f"/summarize/{endpoint}", SECRET)  # a wrong input
        ask(server, f"/translate/{endpoint}", SECRET, **{"X-API-Key": f"{SECRET}-wrong"})
        ask(server, f"/translate/{endpoint}", SECRET, **{"X-Request-ID": f"{SECRET} of\tmine"})
        ask(server, f"/translate/c/{SECRET}/{endpoint}", SECRET)


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_no_text_of_anybodys_is_in_the_log(tmp_path: Path, log_format: str) -> None:
    with Server(
        tmp_path / "log",
        script="tests/scripted_server.py",
        api_keys=f"ada:{KEY}",
        log_format=log_format,
        log_level="debug",
    ) as server:
        ask_all(server)
    log = server.log.read_text()
    assert SECRET not in log
    assert KEY not in log
    assert log.count("/translate/stream_events") >= 5, "it tells of them all the same"


def test_texts_are_in_the_log_where_they_are_asked_for(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py", log_format="json", log_texts="true") as server:
        ask(server, "/translate/invoke", SECRET)
    (told,) = [line for line in map(json.loads, server.log.read_text().splitlines()) if line.get("chain")]
    assert json.loads(told["request_text"])["input"]["text"] == SECRET
    assert json.loads(told["answer_text"])["output"] == SECRET


def test_every_line_is_json_and_those_of_a_request_have_its_id(tmp_path: Path) -> None:
    with Server(
        tmp_path / "log", script="tests/scripted_server.py", api_keys=f"ada:{KEY}", log_format="json"
    ) as server:
        for endpoint in ENDPOINTS:
            ask(server, f"/translate/{endpoint}", "Hi!", **{"X-Request-ID": f"good-{endpoint}"})
            ask(server, f"/translate/{endpoint}", "fail", **{"X-Request-ID": f"bad-{endpoint}"})
        ask(server, "/translate/invoke", "Hi!", **{"X-API-Key": "wrong", "X-Request-ID": "stranger"})
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert not any("color_message" in line for line in lines), "uvicorn's, for terminals"
    for endpoint in ENDPOINTS:
        (good,) = [line for line in lines if line.get("request_id") == f"good-{endpoint}"]
        assert good["logger"] == "service.requests"
        assert (good["key"], good["chain"], good["endpoint"], good["status"]) == ("ada", "translate", endpoint, 200)
        assert good["completion_tokens"] == 4
        assert good["finish_reasons"] == {"stop": 1}
        assert 0 <= good["queue_s"] <= good["first_token_s"] <= good["duration_s"]
        failure, bad = [line for line in lines if line.get("request_id") == f"bad-{endpoint}"]
        assert failure["logger"] == "llm.loop"
        assert "RuntimeError" in failure["traceback"]
        assert (bad["error"], bad["level"]) == ("generation_failed", "WARNING")
    (stranger,) = [line for line in lines if line.get("request_id") == "stranger"]
    assert (stranger["status"], stranger["error"]) == (401, "unauthorized")
    assert "key" not in stranger
    assert "chain" not in stranger
