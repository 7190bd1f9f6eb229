"""Clients that send a request drop by drop: they are cut, and nobody else notices."""

import asyncio
import contextlib

from tests.chaos.client import ask, request
from tests.chaos.watch import few_fds, held, idle
from tests.server import Server

HELLO = request("/translate/invoke", {"input": {"text": "Hi!", "target_language": "German"}})
HEAD = b"POST /translate/invoke HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
CLOSING = HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def drip(port: int, head: bytes, rest: bytes, *, pause_s: float = 0.1, within_s: float = 60) -> bytes:
    """Send the rest of a request a byte at a time; return what came until the other side had enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1024):
                said.extend(piece)

    reading = asyncio.create_task(read())
    try:
        async with asyncio.timeout(within_s):
            writer.write(head)
            for byte in rest:
                if (await asyncio.wait((reading,), timeout=pause_s))[0]:
                    break
                writer.write(bytes([byte]))
            await reading
    finally:
        writer.transport.abort()
    return bytes(said)


async def test_heads_that_drip_are_cut(attacked_server: Server) -> None:
    await ask(attacked_server.port, HELLO)  # starts the process that renders templates
    before = held(attacked_server)
    dripping = [drip(attacked_server.port, b"GET / HTTP/1.1\r\n", b"X-Drip: drop\r\n" * 100) for _ in range(50)]
    said, hello = await asyncio.gather(asyncio.gather(*dripping), ask(attacked_server.port, HELLO))
    assert {answer[:13] for answer in said} == {b"HTTP/1.1 408 "}
    assert hello.is_answered
    await few_fds(attacked_server, before.fds)


async def test_bodies_that_drip_are_cut_when_their_time_is_up(attacked_server: Server) -> None:
    dripping = [drip(attacked_server.port, CLOSING, b" " * 500) for _ in range(20)]
    said, hello = await asyncio.gather(asyncio.gather(*dripping), ask(attacked_server.port, HELLO))
    assert {answer[:13] for answer in said} == {b"HTTP/1.1 408 "}
    assert hello.is_answered
    await idle(attacked_server)


async def test_without_a_key_a_body_is_not_waited_for(guarded_server: Server) -> None:
    """Who may not call is told so before the body comes, and cannot hold a connection with it."""
    before = held(guarded_server)
    said = await asyncio.gather(*(drip(guarded_server.port, HEAD, b" " * 500) for _ in range(20)))
    assert {answer[:13] for answer in said} == {b"HTTP/1.1 401 "}
    await few_fds(guarded_server, before.fds)
