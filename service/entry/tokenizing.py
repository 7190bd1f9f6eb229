"""Where prompts are counted: in threads, so that nobody waits for a book that somebody else has sent."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

LARGE = 100_000
"""Bytes of a request from which on it takes long to tokenize it, and much memory: seconds and a gigabyte for four
million."""

T = TypeVar("T")


class Tokenizing:
    """Runs what tokenizes.

    Small requests never wait for large ones. Of those there is one at a time, so that they do not take all memory, and
    keys take turns at it.
    """

    def __init__(self) -> None:
        self._small = anyio.CapacityLimiter(os.cpu_count() or 1)  # leaves the other threads to others
        self._large = anyio.CapacityLimiter(1)
        self._large_of: dict[str, anyio.Lock] = {}  # by key

    async def run(self, count: Callable[..., T], *arguments: Any, key: str, size: int) -> T:
        """Call a function in a thread, when its turn has come.

        Args:
            count: What to call.
            arguments: What to call it with.
            key: Whose request it is for.
            size: Bytes of the request.
        """
        if size < LARGE:
            return await anyio.to_thread.run_sync(count, *arguments, limiter=self._small)
        async with self._large_of.setdefault(key, anyio.Lock()):
            return await anyio.to_thread.run_sync(count, *arguments, limiter=self._large)
