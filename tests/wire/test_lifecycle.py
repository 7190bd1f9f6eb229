"""The process: how it is told what to do, how it starts and how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.scripted_server import SLOW as SLOW_TEXT
from tests.server import ROOT, Server

HELLO = {"text": "Hi!", "target_language": "German"}
SLOW = {"text": SLOW_TEXT, "target_language": "German"}


def serve(*arguments: str, directory: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `serve.py` where it is not expected to stay."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SERVE_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "serve.py"), *arguments],
        cwd=directory,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_flag_wins_over_the_environment_which_wins_over_dot_env(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SERVE_MAX_BODY=100\nSERVE_MAX_BATCH=2\nSERVE_PORT=1\n# a comment\nOTHER=1\n")
    server = Server(tmp_path / "log", script="tests/scripted_server.py", directory=tmp_path, max_batch="3", port="2")
    server.arguments = ["--port", str(server.port)]
    with server:
        too_long = httpx.post(f"{server.url}/translate/invoke", json={"input": {**HELLO, "text": "x" * 100}})
        assert too_long.status_code == 413
        assert "100 bytes" in too_long.json()["error"]["message"]
        too_many = httpx.post(f"{server.url}/translate/batch", json={"inputs": [1] * 4})
        assert "at most 3 at once" in too_many.json()["error"]["message"]


def test_help_explains_every_setting() -> None:
    result = serve("--help")
    assert result.returncode == 0
    said = " ".join(result.stdout.split())
    for name, setting in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in said
        assert setting.description
        assert setting.description in said
    assert "SERVE_" in said
    assert ".env" in said


def test_a_wrong_setting_is_said_in_one_line() -> None:
    result = serve("--port", "70000")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "serve.py: SERVE_PORT (--port): Input should be less than or equal to 65535, got '70000'\n"
    )


def test_an_unknown_flag_is_refused() -> None:
    result = serve("--colour", "red")
    assert result.returncode == 2
    assert "unrecognized arguments: --colour red" in result.stderr


def test_a_port_that_is_taken_is_said_and_ends_the_process(scripted_server: Server, tmp_path: Path) -> None:
    taken = Server(tmp_path / "log", script="tests/scripted_server.py", port=str(scripted_server.port))
    with (
        pytest.raises(
            RuntimeError, match=r"cannot listen on port \d+ of 127.0.0.1: Address already in use; set SERVE_PORT"
        ),
        taken,
    ):
        pass
    assert taken.process.returncode != 0


def test_an_address_that_is_not_this_machines_is_said_in_one_line() -> None:
    result = serve("--host", "192.0.2.1", "--port", "0", "--insecure")

    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("serve.py: cannot listen on port 0 of 192.0.2.1: ")
    assert "assign requested address" in line


def test_a_model_that_cannot_be_had_is_said_and_ends_the_process(tmp_path: Path) -> None:
    result = serve("--model", str(tmp_path / "nothing"), "--port", "0", directory=tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path / 'nothing'} does not exist" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_sigterm_lets_a_running_stream_end_whole(tmp_path: Path) -> None:
    """sse-starlette would cut it off with an error event."""
    with Server(tmp_path / "log", script="tests/scripted_server.py") as server:
        body = {"input": SLOW, "config": {"configurable": {"max_tokens": 100}}}
        with httpx.stream("POST", f"{server.url}/translate/stream", json=body) as response:
            said = b""
            for piece in response.iter_raw():
                if not said:
                    server.process.send_signal(signal.SIGTERM)
                said += piece
        assert said.endswith(b"event: end\r\n\r\n")
        assert len("".join(re.findall(r'data: "(.*)"', said.decode())).removesuffix(" ")) == 100  # of the source
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log.read_text()


def test_sigterm_cuts_off_what_does_not_end_in_time(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py", drain_timeout_s="1") as server:
        with httpx.stream("POST", f"{server.url}/translate/stream", json={"input": SLOW}) as response:
            pieces = response.iter_raw()
            assert next(pieces)
            server.process.send_signal(signal.SIGTERM)
            said = b"".join(pieces)
        assert server.process.wait(5) == 0
    assert b"event: error" in said
    assert b"shutting_down" in said
    assert b"event: end" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_success(tmp_path: Path, number: signal.Signals) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py") as server:
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log.read_text()


def test_the_log_of_a_normal_run_tells_what_happened_and_no_more(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py") as server:
        for endpoint in ("invoke", "stream", "stream_log", "stream_events"):
            assert httpx.post(f"{server.url}/translate/{endpoint}", json={"input": HELLO}).status_code == 200
    lines = server.log.read_text().splitlines()
    assert lines
    assert [line for line in lines if " INFO " not in line] == [], "no banner, no warning, no traceback"
    assert any(f"http://127.0.0.1:{server.port}" in line for line in lines)


def test_a_setting_that_the_model_does_not_allow_is_said_and_ends_the_process() -> None:
    result = serve("--port", "0", "--max-context", "9999999")

    assert result.returncode == 1
    assert "max_context must be between 1 and 8192" in result.stderr


def test_a_setting_that_does_not_exist_is_told(tmp_path: Path) -> None:
    result = serve("--model", "./nothing", "--port", "0", directory=tmp_path, SERVE_MAX_CONTXT="1")

    assert "there is no setting SERVE_MAX_CONTXT: it is ignored" in result.stderr


@pytest.mark.parametrize("delay_s", [1.5, 2.5, 3.5])
def test_sigterm_while_the_model_loads_is_a_clean_exit(tmp_path: Path, delay_s: float) -> None:
    """The engine's thread was inside torch when the interpreter went away, and the process ended with SIGABRT."""
    with Server(tmp_path / "log", awaited="/health") as server:
        time.sleep(delay_s)
        assert server.stop(timeout_s=10) == 0


def test_make_serve_serves_on_the_port_that_it_is_told(tmp_path: Path) -> None:
    if not (ROOT / ".venv/installed").exists():
        pytest.skip("this environment was not set up by make")
    with Server(tmp_path / "log", command=["make", "serve", "ARGS="]) as server:
        body = {"input": HELLO, "config": {"configurable": {"max_tokens": 8}}}
        answer = httpx.post(f"{server.url}/translate/invoke", json=body, timeout=60)
        assert answer.status_code == 200


def test_it_may_have_more_connections_than_a_shell_gives_it(tmp_path: Path) -> None:
    command = ["bash", "-c", f"ulimit -Sn 256; exec {sys.executable} {ROOT}/tests/scripted_server.py"]
    with Server(tmp_path / "log", command=command) as server:
        (limit,) = re.findall(r"^process_max_fds (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
        assert float(limit) > 256
