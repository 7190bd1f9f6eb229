"""Clients that ask for much and do not read it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.chaos.client import request
from tests.server import Server

STALLED = 8

BUFFER = 8192
"""Bytes that the system takes over for either side: with its own megabytes nobody would stall in a test's time."""

SMALL_BUFFERS = {"FRAGILE_SEND_BUFFER": str(BUFFER)}
"""The environment of a `fragile_server.py` that notices soon."""

LONG = request("/chat/stream", {"input": {"messages": [["user", "x" * 8000]]}})
"""Its answer takes well over ten seconds, and more than a megabyte."""


@asynccontextmanager
async def stalled(server: Server, *, pause_s: float | None) -> AsyncIterator[list[socket.socket]]:
    """Clients that have asked and read nothing, or a byte now and then."""
    loop = asyncio.get_running_loop()
    connections: list[socket.socket] = []

    async def read(connection: socket.socket, pause_s: float) -> None:
        with contextlib.suppress(OSError):
            while await loop.sock_recv(connection, 1):  # noqa: ASYNC110
                await asyncio.sleep(pause_s)

    with contextlib.ExitStack() as stack:
        for _ in range(STALLED):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", server.port))
            await loop.sock_sendall(connection, LONG)
            connections.append(connection)
        reading = [] if pause_s is None else [asyncio.create_task(read(each, pause_s)) for each in connections]
        try:
            yield connections
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
