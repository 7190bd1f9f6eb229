"""The hosted chains from JavaScript: LangChain.js's own client, in Node."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server

DIRECTORY = Path(__file__).parent / "javascript"


@pytest.fixture(scope="module")
def node() -> str:
    """Node, with LangChain.js beside the script: `make test` installs it where there is npm."""
    node = shutil.which("node")
    if node is None or not (DIRECTORY / "node_modules").exists():
        pytest.skip("Node.js or LangChain.js is not installed")
    return node


@pytest.fixture(scope="module")
def said(node: str, scripted_server: Server) -> dict[str, Any]:
    """What the script saw."""
    result = subprocess.run(
        [node, str(DIRECTORY / "call.mjs"), scripted_server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout)
    return answers


def test_javascript_invokes_batches_and_streams(said: dict[str, Any]) -> None:
    assert said["invoke"] == "Hi!"
    assert said["batch"] == ["one", "two"]
    assert "error" not in said["stream"]
    assert "".join(said["stream"]["chunks"]) == "Hi!"
    assert said["log"] > 1
    assert {"on_chain_start", "on_chat_model_stream", "on_chain_end"} <= set(said["events"])


def test_javascript_sends_and_gets_messages(said: dict[str, Any]) -> None:
    assert said["message"] == {"type": "ai", "content": "Hi!"}
    assert {kind for kind, _ in said["messages"]} == {"ai"}
    assert "".join(content for _, content in said["messages"]) == "Hi!"
    assert said["conversation"] == "Two"


def test_javascript_sets_options(said: dict[str, Any]) -> None:
    assert said["options"] == "abc"
    assert said["batchOptions"] == ["o", "t"]


def test_javascript_sees_errors(said: dict[str, Any]) -> None:
    assert "input.text" in said["refused"]["error"]
    assert "generation failed" in said["failed"]["error"]
    assert said["failedStream"]["error"], "known by the broken connection"
    assert said["failedEvents"]["chunks"], "it had begun"
    assert said["failedEvents"]["error"]


def test_javascript_can_abort_a_stream(said: dict[str, Any], scripted_server: Server) -> None:
    assert said["aborted"][0]
    assert len(said["aborted"]) < 10
    assert scripted_server.health()["running"] == 0
