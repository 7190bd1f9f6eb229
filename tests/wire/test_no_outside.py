"""Nothing leaves the machine while serving: no telemetry, no tracing, no model hub."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.server import Server

# Python tells its audit hooks of every name that is looked up and every address that is connected to. Whatever is not
# of this machine is written down, and kept from happening.
WATCHED = """
import ipaddress, json, sys
from pathlib import Path

CALLS = {{"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}}

def is_outside(call, arguments):
    host = arguments[0] if call in ("socket.getaddrinfo", "socket.gethostbyname") else arguments[1]
    host = host[0] if isinstance(host, tuple) else host
    if not isinstance(host, str) or host.startswith("/") or host in ("", "localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True

def watch(call, arguments):
    if call in CALLS and is_outside(call, arguments):
        with Path({seen!r}).open("a") as seen:
            seen.write(json.dumps([call, str(arguments)]) + chr(10))
        raise OSError("outside of this machine")

sys.addaudithook(watch)

{then}
"""

REQUESTS: dict[str, Any] = {
    "chat": {"messages": [["user", "Hi!"]]},
    "translate": {"text": "Hi!", "target_language": "German"},
    "summarize": {"text": "It rained all day."},
}


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    return tmp_path / "seen"


@pytest.fixture(autouse=True)
def _tracing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the machine of somebody who traces another application."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LANGSMITH_API_KEY", "lsv2_pt_0")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_serving_connects_to_nothing_outside_of_this_machine(tmp_path: Path, seen: Path) -> None:
    script = tmp_path / "watched.py"
    script.write_text(WATCHED.format(seen=str(seen), then="import serve; sys.exit(serve.main(sys.argv[1:]))"))
    with Server(tmp_path / "log", script=script) as server:
        for name, value in REQUESTS.items():
            body = {"input": value, "config": {"configurable": {"max_tokens": 4}}}
            for endpoint in ("invoke", "stream", "stream_log"):
                response = httpx.post(f"{server.url}/{name}/{endpoint}", json=body, timeout=60)
                assert response.status_code == 200
        for path in ("/", "/docs", "/chat/playground/", "/translate/playground/", "/openapi.json"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        for connection in psutil.Process(server.process.pid).net_connections():  # those of native code, too
            assert not connection.raddr or connection.raddr.ip in ("127.0.0.1", "::1")
    assert not seen.exists(), seen.read_text()


def test_tracing_that_is_asked_of_the_service_itself_would_have_been_seen(tmp_path: Path, seen: Path) -> None:
    """So the test above can fail."""
    script = tmp_path / "watched.py"
    then = """
import serve
from llm import ScriptedEngine
from service.settings import read_settings

settings = read_settings(sys.argv[1:])
serve.keep_quiet_outside(settings)
serve.run(settings, ScriptedEngine())
"""
    script.write_text(WATCHED.format(seen=str(seen), then=then))
    with Server(tmp_path / "log", script=script, langsmith="1") as server:
        assert httpx.post(f"{server.url}/chat/invoke", json={"input": REQUESTS["chat"]}).status_code == 200
        deadline = time.monotonic() + 20
        while not seen.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        server.process.kill()  # it would try again and again
    call, arguments = json.loads(seen.read_text().splitlines()[0])
    assert call == "socket.getaddrinfo"
    assert "api.smith.langchain.com" in arguments
