"""A server that speaks to Redis clients and answers with whatever a test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

MAX_SENT = 64 * 1024 * 1024
"""Bytes of an endless answer, should a client take all of it."""


class NonsenseRedis:
    """Greets clients as Redis does, and then answers every command in the same way."""

    def __init__(self, answer: Callable[[], AsyncIterator[bytes]], *, greets: bool) -> None:
        self._answer = answer
        self._greets = greets
        self.num_asked = 0
        self.num_sent = 0
        self.url = ""
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while command := await self._read_command(reader):
                if self._greets and command[0] in (b"CLIENT", b"SELECT"):
                    writer.write(b"+OK\r\n")
                    continue
                self.num_asked += 1
                async for piece in self._answer():
                    writer.write(piece)
                    await writer.drain()
                    self.num_sent += len(piece)
        writer.transport.abort()
        await asyncio.sleep(0)

    async def _read_command(self, reader: asyncio.StreamReader) -> list[bytes]:
        if not (head := await reader.readline()):
            return []
        words = []
        for _ in range(int(head[1:])):
            size = int((await reader.readline())[1:])
            words.append((await reader.readexactly(size + 2))[:-2])
        return words


@asynccontextmanager
async def nonsense_redis(
    answer: bytes | Callable[[], AsyncIterator[bytes]], *, greets: bool = True
) -> AsyncIterator[NonsenseRedis]:
    """Run one on a free port of the loopback interface."""

    async def once() -> AsyncIterator[bytes]:
        assert isinstance(answer, bytes)
        yield answer

    redis = NonsenseRedis(once if isinstance(answer, bytes) else answer, greets=greets)
    server = await asyncio.start_server(redis.serve, "127.0.0.1", 0)
    redis.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    try:
        yield redis
    finally:
        server.close()
        for task in redis.tasks:
            task.cancel()
        await asyncio.gather(*redis.tasks)
        await asyncio.sleep(0)  # transports close in the next step of the loop
