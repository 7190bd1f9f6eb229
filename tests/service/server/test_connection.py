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

from service.server.connection import MAX_HEAD, MAX_HEADER, MAX_HEADERS, MAX_URL, timed_protocol
from service.server.connection_limit import MAX_LARGE_HEADS
from service.server.sockets import keep_alive

IDLE_TIMEOUT_S = 1.0
PATIENCE_S = 30
"""How long a test waits for what must happen, on however busy a machine."""


class World:
    """A server of few paths, and what its application saw."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.disconnected: list[str] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.num_pieces: list[int] = []
        """Of the body of each request, as the application got it."""
        self.server: uvicorn.Server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, num_pieces = b"", 0
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            num_pieces += 1
            if not message["more_body"]:
                break
        self.headers.append(scope["headers"])
        self.num_pieces.append(num_pieces)
        if scope["path"] == "/slow":
            await asyncio.sleep(3 * IDLE_TIMEOUT_S)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            gone = asyncio.ensure_future(receive())
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 16384, "more_body": True})
            self.disconnected.append(scope["path"])
        elif scope["path"] == "/waiting":
            await send({"type": "http.response.body", "body": b"x" * 32768, "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
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
def serving(
    *,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    max_connections: int = 10_000,
    min_read_rate: float = 0.0,
    **options: Any,
) -> Iterator[World]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        world = World(listener.getsockname()[1])
        http = timed_protocol(idle_timeout_s, max_connections, min_read_rate=min_read_rate)
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


def test_a_peer_whose_system_takes_nothing_is_cut_though_little_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose machine has died: nothing is paused, since the system's own buffer takes it all."""
    monkeypatch.setattr("service.server.connection.DEAD_PEER_S", 1)
    with caplog.at_level(logging.INFO, "service.server.connection"), world.connect(receive_buffer=4096) as client:
        client.sendall(get("/waiting"))
        wait_until(lambda: world.disconnected == ["/waiting"])
        wait_until(lambda: world.num_held() == 0)
    assert "its system took nothing for 1 s" in caplog.text


def test_who_waits_for_more_of_an_answer_is_not_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.server.connection.DEAD_PEER_S", 1)
    with world.connect() as client:
        client.sendall(get("/waiting"))
        time.sleep(3 * IDLE_TIMEOUT_S)  # all is in its own system's buffer
        assert world.disconnected == []


def test_a_slow_reader_is_not_cut(world: World) -> None:
    with world.connect(receive_buffer=4096) as client:
        client.sendall(get("/endless"))
        deadline = time.monotonic() + 4 * IDLE_TIMEOUT_S
        while time.monotonic() < deadline:
            assert client.recv(4096)
            time.sleep(0.02)
        assert world.disconnected == []


@pytest.mark.parametrize("path", ["/endless", "/broken"])
def test_a_reader_below_the_minimum_rate_is_cut(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "service.server.connection"),
        serving(min_read_rate=400_000) as world,
        world.connect(receive_buffer=4096) as client,
    ):
        client.sendall(get(path))
        wait_until(lambda: world.num_held() == 1)
        deadline = time.monotonic() + PATIENCE_S
        while world.num_held():
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                client.recv(4096)
            time.sleep(0.1)
    assert "it read less than 400000 bytes per second" in caplog.text


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


HEADS = {
    "too many headers": (b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 15_900, 431, f"{MAX_HEADERS} headers"),
    "one header too many": (get("/")[:-2] + b"A: b\r\n" * (MAX_HEADERS - 1) + b"B", 431, f"{MAX_HEADERS} headers"),
    "empty headers": (b"GET / HTTP/1.1\r\n" + b"a: \r\n" * 2000, 431, f"{MAX_HEADERS} headers"),
    "a long value": (
        b"GET / HTTP/1.1\r\nLong: " + b"v" * (MAX_HEADER - 3) + b"\r\nA: ",
        431,
        f"{MAX_HEADER} bytes, the header 'Long' has {MAX_HEADER + 1}",
    ),
    "a long name": (b"GET / HTTP/1.1\r\n" + b"n" * MAX_HEADER + b": v\r\nA: ", 431, f"has {MAX_HEADER + 1}"),
    "long values that add up": (
        b"GET / HTTP/1.1\r\n" + (b"A: " + b"v" * (MAX_HEADER - 100) + b"\r\n") * 6,
        431,
        f"{MAX_HEAD} bytes",
    ),
    "a long URL": (b"GET /" + b"u" * MAX_URL + b" HTTP/1.1\r\nA: ", 414, f"{MAX_URL} bytes"),
    "a long query": (b"GET /?" + b"&a" * MAX_URL + b" HTTP/1.1\r\nA: ", 414, f"{MAX_URL} bytes"),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("piece", [1_000, 1_000_000])
def test_a_head_beyond_a_limit_is_refused_before_it_ends(world: World, name: str, piece: int) -> None:
    """An unfinished head of 64 kB was kept as 16,000 headers, which took 1 to 2 MB, until it timed out."""
    head, status, said = HEADS[name]
    with world.connect() as client:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(head), piece):
                client.sendall(head[start : start + piece])
        answer = read_all(client)
    assert problem_in(answer) == (status, "url_too_long" if status == 414 else "head_too_large")
    assert said in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert world.headers == []


def test_a_head_at_the_limits_is_served(world: World) -> None:
    with world.connect() as client:
        long = b"Long: " + b"v" * (MAX_HEADER - 4) + b"\r\n"
        url = b"/" + b"u" * (MAX_URL - 1)
        client.sendall(b"GET " + url + b" HTTP/1.1\r\n" + long + b"A: b\r\n" * (MAX_HEADERS - 1) + b"\r\n")
        assert url in read_answer(client)
    assert len(world.headers[0]) == MAX_HEADERS


def test_headers_are_counted_anew_for_each_request(world: World) -> None:
    with world.connect() as client:
        for _ in range(3):
            client.sendall(b"GET /one HTTP/1.1\r\n" + b"A: b\r\n" * MAX_HEADERS + b"\r\n")
            assert b"/one" in read_answer(client)


CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def test_many_trailers_end_the_request(world: World) -> None:
    with world.connect() as client:
        client.sendall(CHUNKED + b"1\r\na\r\n0\r\n" + b"T: a\r\n" * MAX_HEADERS)
        assert problem_in(read_all(client)) == (431, "head_too_large")


def test_long_chunk_extensions_end_the_request(world: World) -> None:
    """However much body comes between them: each chunk used to start the count anew."""
    with world.connect() as client:
        client.sendall(CHUNKED)
        with contextlib.suppress(ConnectionError):
            client.sendall((b"1;" + b"x" * 1_000 + b"\r\na\r\n") * 1_000)
        assert problem_in(read_all(client)) == (431, "head_too_large")


def test_a_body_in_chunks_of_one_byte_is_served(world: World) -> None:
    with world.connect() as client:
        client.sendall(CHUNKED + b"1\r\na\r\n" * 8_000 + b"0\r\n\r\n")
        assert b"a" * 8_000 in read_all(client)


def test_a_body_in_too_many_small_chunks_is_answered_400_and_parsed_no_further(world: World) -> None:
    """Forty of these at once, with 300,000 chunks each, kept the event loop from everything else for 10 s."""
    with world.connect() as client:
        client.sendall(CHUNKED + b"1\r\nx\r\n" * 8_000)
        time.sleep(0.1)
        with contextlib.suppress(OSError):  # closed meanwhile
            client.sendall(b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n")
        status, kind = problem_in(read_all(client))
    assert (status, kind) == (400, "chunks_too_small")


def test_idle_connections_beyond_the_limit_make_room_for_a_request() -> None:
    with serving(idle_timeout_s=PATIENCE_S, max_connections=10) as small, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(small.connect()) for _ in range(40)]
        client = stack.enter_context(small.connect())
        client.sendall(get("/one", close=True))
        assert b"/one" in read_all(client)
        wait_until(lambda: small.num_held() <= 10)
        assert is_closed(idle[0])
        assert not is_closed(idle[-1])


@pytest.mark.parametrize("kind", ["half a head", "half a body", "not reading"])
def test_whoever_keeps_the_service_waiting_makes_room(kind: str) -> None:
    with serving(idle_timeout_s=PATIENCE_S, max_connections=5) as small, contextlib.ExitStack() as stack:
        sent = {
            "half a head": b"GET / HTTP/1.1\r\nHost: ",
            "half a body": b"POST /slow HTTP/1.1\r\nContent-Length: 5\r\n\r\nhe",
            "not reading": get("/endless"),
        }[kind]
        for _ in range(5):
            client = stack.enter_context(small.connect(receive_buffer=4096))
            client.sendall(sent)
        if kind == "not reading":
            wait_until(lambda: sum(is_stalled(one) for one in small.server.server_state.connections) == 5)
        for _ in range(3):
            client = stack.enter_context(small.connect())
            client.sendall(get("/one", close=True))
            assert b"/one" in read_all(client)


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed a connection on which it has sent nothing."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def is_stalled(connection: object) -> bool:
    assert isinstance(connection, HttpToolsProtocol)
    return connection.flow.write_paused


def test_a_request_that_is_computed_is_not_closed_for_others() -> None:
    with serving(max_connections=5) as small, contextlib.ExitStack() as stack:
        client = stack.enter_context(small.connect())
        client.sendall(get("/slow", close=True))
        wait_until(lambda: len(small.headers) == 1)
        for _ in range(20):
            stack.enter_context(small.connect())
        assert b"/slow" in read_all(client)


def test_large_unfinished_heads_make_room_for_others() -> None:
    with serving(idle_timeout_s=PATIENCE_S) as world, contextlib.ExitStack() as stack:
        head = b"GET / HTTP/1.1\r\n" + (b"A: " + b"v" * 10_000 + b"\r\n") * 5
        clients = [stack.enter_context(world.connect()) for _ in range(MAX_LARGE_HEADS + 10)]
        for client in clients:
            client.sendall(head)
        wait_until(lambda: sum(map(is_closed, clients)) == 10)


def test_endless_trailers_end_the_request(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        with contextlib.suppress(ConnectionError):
            client.sendall(b"T: aaaaaaaaaaa\r\n" * 5_000)
        assert problem_in(read_all(client)) == (431, "head_too_large")


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
        keep_alive(listener)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                # With it Linux resets slow readers whose window stays small.
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_a_body_that_comes_byte_by_byte_wakes_the_application_up_now_and_then(world: World) -> None:
    """Each packet once did, for 300 microseconds: 400 connections that dripped kept everybody else waiting."""
    with world.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"POST /drip HTTP/1.1\r\nHost: a\r\nContent-Length: 400\r\n\r\n")
        for _ in range(400):
            client.sendall(b"x")
            time.sleep(0.001)
        answer = b""
        while b"x" * 400 not in answer:
            piece = client.recv(65536)
            assert piece
            answer += piece
    assert world.num_pieces[-1] <= 10
