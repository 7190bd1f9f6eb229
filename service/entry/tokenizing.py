"""Where requests are made ready: prompts are counted in threads, files are read by turns, so that nobody waits for a
book that somebody else has sent."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

import anyio
import anyio.to_thread

LARGE = 100_000
"""Bytes of a request from which on it takes long to tokenize it, and much memory: seconds and a gigabyte for four
million."""

MAX_FILES = 2
"""Files that are read at once, each by a process that may take a gigabyte."""

T = TypeVar("T")


class Turns:
    """A few places, of which no key has more than one: so nobody waits for more than one turn of each other key.

    Where there are no keys (the key is empty), nobody can be told from others: first come, first served.
    """

    def __init__(self, num_places: int) -> None:
        self._places = anyio.CapacityLimiter(num_places)
        self._of: dict[str, anyio.Lock] = {}  # by key

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Have a place for a key, once one is free and the key has no other."""
        own = self._of.setdefault(key, anyio.Lock()) if key else nullcontext()
        async with own, self._places:
            yield


class Tokenizing:
    """Runs what tokenizes, and says whose file is read next. There is one for all chains.

    Small requests never wait for large ones. Of those there is one at a time, so that they do not take all memory, and
    keys take turns at it.
    """

    def __init__(self) -> None:
        self._small = anyio.CapacityLimiter(os.cpu_count() or 1)  # leaves the other threads to others
        self._large = Turns(1)
        self.files = Turns(MAX_FILES)

    async def run(self, count: Callable[..., T], *arguments: Any, key: str, size: int) -> T:
        """Call a function in a thread, when its turn has come.

        Args:
            count: What to call.
            arguments: What to call it with.
            key: Whose request it is for.
            size: Bytes of the request, unpacked.
        """
        if size < LARGE:
            return await anyio.to_thread.run_sync(count, *arguments, limiter=self._small)
        async with self._large.of(key):
            # The turn is the limit; a limiter of its own, so that it takes none of the threads that others share.
            return await anyio.to_thread.run_sync(count, *arguments, limiter=anyio.CapacityLimiter(1))
