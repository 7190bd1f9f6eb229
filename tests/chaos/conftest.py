"""Servers that are attacked: one that is open, and one that wants a key."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import Server

KEY = "a-key-for-somebody-who-means-no-good"
MAX_BODY = 300_000
IDLE_TIMEOUT_S, TIMEOUT_S = 2, 3


@pytest.fixture(scope="module")
def attacked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It must not have written a traceback in the end, and no line that it did not mean to."""
    log = tmp_path_factory.mktemp("attacked-server") / "log"
    server = Server(
        log,
        script="tests/scripted_server.py",
        max_body=str(MAX_BODY),
        idle_timeout_s=str(IDLE_TIMEOUT_S),
        timeout_s=str(TIMEOUT_S),
        rate_limit="1000000/minute",
    )
    with server:
        yield server
    said = log.read_text()
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line)] == []


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("guarded-server") / "log"
    settings: dict[str, Any] = {
        "api_keys": f"somebody:{KEY}",
        "rate_limit": "1000000/minute",
        "login_rate_limit": "",
        "page_rate_limit": "",
        "max_body": str(MAX_BODY),
    }
    with Server(log, script="tests/scripted_server.py", **settings) as server:
        yield server
    assert "Traceback" not in log.read_text()
    assert KEY not in log.read_text()
