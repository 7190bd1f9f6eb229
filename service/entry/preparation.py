"""Prepares requests before they run: parses and validates them, counts their tokens, and says whose file is read next.

This is work for the CPU, and its size is the client's choice. So it runs off the event loop, in time slices that go
round between tenants (`chains/cancellable.py`), and ends when its client leaves.
"""

from asyncio import Lock
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import anyio

from chains.cancellable import run_cancellable

LARGE = 100_000
"""Bytes of a request from which on preparing it takes time and memory: seconds, and ten times its size."""

MAX_LARGE = 8
"""Large requests that are prepared at once, each of another tenant."""

MAX_FILES = 2
"""Files that are read at once, each by a process that may take a gigabyte."""

T = TypeVar("T")


class TenantPermits:
    """A few permits, of which no tenant holds more than one, so that tenants get them in round-robin order."""

    def __init__(self, num_permits: int) -> None:
        self._permits = anyio.CapacityLimiter(num_permits)
        self._locks: WeakValueDictionary[str, Lock] = WeakValueDictionary()  # each for as long as somebody uses it

    @property
    def num_tenants(self) -> int:
        """Tenants that hold a permit or wait for one."""
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, tenant: str) -> AsyncIterator[None]:
        """Hold a permit, once one is free and the tenant has no other."""
        lock = self._locks.get(tenant)
        if lock is None:
            lock = self._locks[tenant] = Lock()
        async with lock, self._permits:
            yield


class Preparation:
    """Runs what prepares requests. There is one for all chains.

    Requests share the CPU by time slices. Of a tenant's large ones there is one at a time. Were there one of all
    tenants, a request would wait, at each step of its own, for a whole step of a larger one.
    """

    def __init__(self) -> None:
        self._large = TenantPermits(MAX_LARGE)
        self.files = TenantPermits(MAX_FILES)

    async def run(self, function: Callable[..., T], *arguments: Any, tenant: str, size: int) -> T:
        """Call a function in a thread.

        Args:
            function: What to call. It ends at its next `checkpoint()` if the request is cancelled.
            arguments: What to call it with.
            tenant: Who sent the request.
            size: Bytes of the request, with what was unpacked of its files.
        """
        if size < LARGE:
            return await run_cancellable(function, *arguments, tenant=tenant)
        async with self._large.hold(tenant):
            return await run_cancellable(function, *arguments, tenant=tenant)
