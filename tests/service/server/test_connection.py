"""Real sockets against a real uvicorn, with a small application behind it."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.connection import MAX_HEAD, keep_alive, timed_protocol

IDLE_TIMEOUT_S = 1.0
PATIENCE_S = 30
"""How long a test waits for what must happen, on however busy a machine."""


class World:
    """A server of few paths, and what its application saw."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.disconnected: list[str] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.server: uvicorn.Server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.headers.append(scope["headers"])
        if scope["path"] == "/slow":
            await asyncio.sleep(3 * IDLE_TIMEOUT_S)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            gone = asyncio.ensure_future(receive())
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 16384, "more_body": True})
            self.disconnected.append(scope["path"])
        elif scope["path"] == "/broken":
            while self.num_unflushed() < 32768:  # nothing is paused before there are twice as many
                await send({"type": "http.response.body", "body": b"x" * 16384, "more_body": True})
                await asyncio.sleep(0.001)
        else:
            answer = scope["path"].encode() + b" " + body
            await send({"type": "http.response.body", "body": answer})

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(PATIENCE_S)
        client.connect(("127.0.0.1", self.port))
        return client

    def num_unflushed(self) -> int:
        """Bytes that wait in the server for its one client to read."""
        (connection,) = self.server.server_state.connections
        assert isinstance(connection, HttpToolsProtocol)
        return connection.transport.get_write_buffer_size()

    def num_held(self) -> int:
        """Sockets that the server has for clients."""
        connections = psutil.Process().net_connections("tcp4")
        return sum(bool(one.raddr) and one.laddr.port == self.port for one in connections)


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[World]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        world = World(listener.getsockname()[1])
        http = timed_protocol(IDLE_TIMEOUT_S)
        world.server = server = uvicorn.Server(
            uvicorn.Config(world, http=http, log_config=None, timeout_graceful_shutdown=1, **options)
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield world
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


@pytest.fixture
def world() -> Iterator[World]:
    with serving() as world:
        yield world


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    while piece := client.recv(65536):
        received += piece
    return received


def problem_in(answer: bytes) -> tuple[int, str]:
    """Status and type of an error answer, after a look at the rest of it."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.lower().split(b"\r\n")
    error = json.loads(body)["error"]
    assert len(error["request_id"]) == 32
    assert error["message"]
    for header in (
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        "x-content-type-options: nosniff",
        f"x-request-id: {error['request_id']}",
    ):
        assert header.encode() in headers
    return int(status.split()[1]), error["type"]


def wait_until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def get(path: str, close: bool = False) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n{'Connection: close' if close else 'A: b'}\r\n\r\n".encode()


def read_answer(client: socket.socket, end: bytes = b"\r\n0\r\n\r\n") -> bytes:
    """One chunked answer, on a connection that is kept."""
    received = b""
    while not received.endswith(end):
        piece = client.recv(65536)
        assert piece, received
        received += piece
    return received


def test_who_sends_nothing_is_closed_without_a_word(world: World) -> None:
    with world.connect() as client:
        assert read_all(client) == b""
        wait_until(lambda: world.num_held() == 0)


def test_half_a_head_is_answered_408_and_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "service.server.connection"), world.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        answer = read_all(client)
        assert problem_in(answer) == (408, "timeout")
        assert b"within 1 s (SERVE_IDLE_TIMEOUT_S)" in answer
        assert "{}:{}".format(*client.getsockname()) in caplog.text


def test_a_head_that_drips_is_answered_408_all_the_same(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nA: ")
        client.settimeout(0.1)
        for _ in range(PATIENCE_S * 10):
            try:
                answer = client.recv(65536)
                break
            except TimeoutError:
                client.sendall(b"a")
        assert problem_in(answer) == (408, "timeout")


def test_half_a_second_head_is_answered_408(world: World) -> None:
    with world.connect() as client:
        client.sendall(get("/one"))
        assert read_answer(client).endswith(b"/one \r\n0\r\n\r\n")
        client.sendall(b"GET /two")
        assert problem_in(read_all(client)) == (408, "timeout")


def test_half_a_second_head_does_not_disturb_the_first_answer(world: World) -> None:
    with world.connect() as client:
        client.sendall(get("/slow") + b"GET /two HTTP/1.1\r\nHost")
        answer, _, rest = read_all(client).partition(b"\r\n0\r\n\r\n")
        assert answer.endswith(b"/slow ")
        assert rest == b""


def test_a_request_outlasts_the_keep_alive_of_the_one_before() -> None:
    with serving(timeout_keep_alive=1) as quick, quick.connect() as client:
        client.sendall(get("/one"))
        read_answer(client)
        client.sendall(get("/slow"))
        assert b"/slow" in read_answer(client)


def test_a_stray_byte_does_not_keep_an_idle_connection() -> None:
    """uvicorn cancels its own keep-alive timer at any byte, an empty line too, and then waits for ever."""
    with serving(timeout_keep_alive=1) as quick, quick.connect() as client:
        client.sendall(get("/one"))
        read_answer(client)
        client.sendall(b"\r\n")
        assert read_all(client) == b""


def test_a_request_at_work_in_silence_is_let_be(world: World) -> None:
    with world.connect() as client:
        client.sendall(get("/slow", close=True))
        assert b"/slow" in read_all(client)


def test_a_reader_who_stalls_is_cut_and_its_work_with_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "service.server.connection"), world.connect(receive_buffer=4096) as client:
        client.sendall(get("/endless"))
        wait_until(lambda: world.disconnected == ["/endless"])
        wait_until(lambda: world.num_held() == 0)
    assert "it read nothing for 1 s" in caplog.text


def test_a_reader_who_stalls_is_cut_though_the_application_has_ended(world: World) -> None:
    """What `close` leaves unflushed would keep the socket: there is nothing to pause, nobody to disconnect."""
    with world.connect(receive_buffer=4096) as client:
        client.sendall(get("/broken"))
        wait_until(lambda: world.num_held() == 1)
        wait_until(lambda: world.num_held() == 0)


def test_a_slow_reader_is_not_cut(world: World) -> None:
    with world.connect(receive_buffer=4096) as client:
        client.sendall(get("/endless"))
        deadline = time.monotonic() + 4 * IDLE_TIMEOUT_S
        while time.monotonic() < deadline:
            assert client.recv(4096)
            time.sleep(0.02)
        assert world.disconnected == []


def test_a_connection_serves_many_requests(world: World) -> None:
    with world.connect() as client:
        deadline = time.monotonic() + 2 * IDLE_TIMEOUT_S
        while time.monotonic() < deadline:
            client.sendall(b"POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhe")
            client.sendall(b"llo")
            assert b"/echo hello" in read_answer(client)


def test_of_pipelined_requests_the_first_is_answered_and_then_the_connection_closes(world: World) -> None:
    """uvicorn would stop reading until the first is answered, and not notice a peer that goes away meanwhile. Whoever
    sends several at once has to be ready to send them again (RFC 9112, 9.3.2)."""
    with world.connect() as client:
        client.sendall(get("/slow") + get("/two") + get("/three"))
        answer, _, rest = read_all(client).partition(b"\r\n0\r\n\r\n")
        assert answer.endswith(b"/slow ")
        assert rest == b""


@pytest.mark.parametrize("garbage", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00", b"CONNECT a:1 HTTP/1.1\r\n\r\n"])
def test_garbage_is_answered_400(world: World, garbage: bytes) -> None:
    with world.connect() as client:
        client.sendall(garbage)
        assert problem_in(read_all(client)) == (400, "bad_request")


def test_garbage_amid_an_answer_is_not_answered_in_its_midst(world: World) -> None:
    with world.connect() as client:
        client.sendall(get("/slow") + b"GARBAGE\r\n\r\n")
        assert read_all(client).endswith(b"/slow \r\n0\r\n\r\n")


def test_an_endless_header_is_answered_431(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nA: ")
        for _ in range(100):
            client.sendall(b"a" * 4096)
        client.recv(1, socket.MSG_PEEK)
        client.sendall(b"a" * 4096)  # to a connection closed outright, this would lose the answer
        assert problem_in(read_all(client)) == (431, "head_too_large")


def test_a_large_head_in_one_piece_is_answered_431(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nA: " + b"a" * MAX_HEAD + b"\r\n\r\n")
        assert problem_in(read_all(client)) == (431, "head_too_large")
    assert world.headers == []


def test_endless_trailers_end_the_request(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        with pytest.raises(ConnectionError):
            client.sendall(b"T: aaaaaaaaaaa\r\n" * 1_000_000)


def test_trailers_do_not_join_the_headers(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        client.sendall(b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
        assert b"/ a" in read_all(client)
    assert world.headers == [[(b"transfer-encoding", b"chunked"), (b"connection", b"close")]]


def test_a_large_body_is_no_large_head(world: World) -> None:
    body = b"a" * (3 * MAX_HEAD)
    with world.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert body in read_all(client)


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_an_upgrade_is_answered_as_if_it_had_not_been_asked_for(world: World, protocol: str) -> None:
    with world.connect() as client:
        client.sendall(f"GET /one HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode())
        answer = read_all(client)
        assert b"connection: close" in answer
        assert b"/one" in answer


def test_tls_connections_are_cut_as_well(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    if shutil.which("openssl") is None:
        pytest.skip("no openssl is installed on this machine")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    trust = ssl.create_default_context(cafile=os.fspath(certificate))
    trust.check_hostname = False
    with serving(ssl_keyfile=key, ssl_certfile=certificate) as world:

        def connect(receive_buffer: int | None = None) -> ssl.SSLSocket:
            return trust.wrap_socket(world.connect(receive_buffer), suppress_ragged_eofs=True)

        with connect() as silent, connect() as halting:
            halting.sendall(b"GET /")
            assert read_all(silent) == b""
            assert problem_in(read_all(halting)) == (408, "timeout")
        with connect(receive_buffer=4096) as client:
            client.sendall(get("/endless"))
            deadline = time.monotonic() + 3 * IDLE_TIMEOUT_S
            while time.monotonic() < deadline:
                assert client.recv(4096)
                time.sleep(0.02)
            assert world.disconnected == []
            wait_until(lambda: world.disconnected == ["/endless"])
            wait_until(lambda: world.num_held() == 0)


def test_accepted_sockets_look_for_dead_peers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        keep_alive(listener, idle_timeout_s=90)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000
