"""Reads request bodies before a request is admitted: in time, within a memory budget, and counted as JSON on the way.

A body that comes slowly so takes no capacity from requests that are complete. What all bodies together may hold in
memory is bounded, and no tenant may hold more than half of it. Where there is no room, a tenant that holds less than
another takes the place of an unfinished body of that one. Knows no chain, and nothing of what a body says.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from service.entry.json_structure import StructureCounter
from service.errors import Refusal

MAX_DEPTH = 100
"""Arrays and objects inside each other in a body: below what Python's own recursion limit lets later readers take."""

MAX_VALUES = 200_000
"""Values in a body: more would take long to validate, and much memory."""

VALUE_BYTES = 300
"""Memory that a value of a body takes besides its text, as a part of a message or an input: measured on chats."""

MAX_READING = 512
"""Bodies that are read at once, of which one tenant may have an eighth: slow ones cost CPU time with every packet."""

RETRY_AFTER_S = 5


class BodyLease:
    """A body, and the part of the memory budget that it holds until its request ends."""

    def __init__(self, reader: "BodyReader", tenant: str) -> None:
        self.content = bytearray()
        self.length = 0
        """Bytes that have come."""
        self.size = 0
        """Bytes of memory that are counted against the budget."""
        self._reader = reader
        self._tenant = tenant
        self._wait: anyio.CancelScope | None = None
        """While it waits for its next piece."""
        self._is_evicted = False

    def evict(self) -> None:
        """Give up an unfinished body at once: its place goes to another tenant."""
        self._is_evicted = True
        self.content = bytearray()
        self.resize(0)
        if self._wait is not None:
            self._wait.cancel()

    def resize(self, size: int) -> None:
        """Hold this many bytes from now on. Raises `Refusal` if the budget has no room for more, or never will."""
        self._reader._resize(self._tenant, self.size, size)
        self.size = size


class BodyReader:
    """Reads the bodies of all chains' requests within one budget."""

    def __init__(self, *, max_total: int, timeout_s: float, idle_timeout_s: float, min_rate: float) -> None:
        """Begin with nothing read.

        Args:
            max_total: Bytes of memory of all bodies together, from their first byte to the end of their request.
            timeout_s: Seconds that a body may take to arrive.
            idle_timeout_s: Seconds that may pass between two pieces of a body.
            min_rate: Bytes per second that a body must come at on average, after `idle_timeout_s`; 0 for any rate.
        """
        self._max_total = max_total
        self._timeout_s = timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._min_rate = min_rate
        self._held: Counter[str] = Counter()
        self._reading: dict[str, set[BodyLease]] = {}
        """Unfinished bodies."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are held now."""
        return self._held.total()

    @asynccontextmanager
    async def read(self, request: Request, max_body: int, *, tenant: str) -> AsyncIterator[BodyLease]:
        """Read a body, and hold its part of the budget while the context is open.

        Args:
            request: Its body must not have been read.
            max_body: Bytes that it may have.
            tenant: Who sends it.

        Raises:
            Refusal: It is too large, too slow, incomplete, or has too many values; or the budget is used up.
        """
        lease = BodyLease(self, tenant)
        try:
            await self._read(request, max_body, lease)
            yield lease
        finally:
            lease.content = bytearray()
            lease.resize(0)

    async def _read(self, request: Request, max_body: int, lease: BodyLease) -> None:
        too_large = Refusal(
            413, "body_too_large", f"a body may have {max_body} bytes at most (SERVE_MAX_BODY)", field="body"
        )
        declared = request.headers.get("Content-Length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_body:
            raise too_large
        tenant = lease._tenant
        self._check_number(tenant)
        structure, started = StructureCounter(), time.monotonic()
        self._reading.setdefault(tenant, set()).add(lease)
        try:
            stream = request.stream()
            while piece := await self._next(stream, started, lease):
                if lease.length + len(piece) > max_body:
                    raise too_large
                structure.feed(piece)
                check_structure(structure)
                lease.resize(lease.length + len(piece) + VALUE_BYTES * (structure.num_values - 1))
                lease.content += piece
                lease.length += len(piece)
        except ClientDisconnect as error:
            raise Refusal(400, "incomplete", "the client went away before its body had come") from error
        finally:
            self._end(lease)

    async def _next(self, stream: AsyncIterator[bytes], started: float, lease: BodyLease) -> bytes:
        """The next piece, or no bytes at the body's end."""
        now, size = time.monotonic(), lease.length
        late_at, message = min(
            (now + self._idle_timeout_s, f"nothing came for {self._idle_timeout_s:g} s (SERVE_IDLE_TIMEOUT_S)"),
            (started + self._timeout_s, f"it took more than {self._timeout_s:g} s (SERVE_BODY_TIMEOUT_S)"),
            (
                started + self._idle_timeout_s + size / self._min_rate if self._min_rate else float("inf"),
                f"it came at less than {self._min_rate:g} bytes per second (SERVE_MIN_BODY_RATE)",
            ),
        )
        with anyio.move_on_after(max(0.0, late_at - now)) as lease._wait:
            async for piece in stream:
                if piece and not lease._is_evicted:
                    return piece
            if not lease._is_evicted:
                return b""
        if lease._is_evicted:
            raise _busy("this one was not complete, and made room for one of a key or address that holds less")
        raise Refusal(408, "timeout", f"the body did not come in time: {message}; {size} bytes had come")

    def _check_number(self, tenant: str) -> None:
        """Make room for one more unfinished body of a tenant, or raise `Refusal`."""
        num_own, total = len(self._reading.get(tenant, ())), sum(map(len, self._reading.values()))
        if num_own < MAX_READING // 8 and total >= MAX_READING:
            most = max(self._reading.values(), key=len)
            if len(most) > num_own + 1:
                self._evict(min(most, key=lambda lease: lease.length))
                return
        if total >= MAX_READING or num_own >= MAX_READING // 8:
            raise _busy(f"{total} bodies are being read, {num_own} of them yours")

    def _evict(self, lease: BodyLease) -> None:
        self._end(lease)
        lease.evict()

    def _end(self, lease: BodyLease) -> None:
        """Count a body as unfinished no more. Harmless when it is not."""
        unfinished = self._reading.get(lease._tenant, set())
        unfinished.discard(lease)
        if not unfinished:
            self._reading.pop(lease._tenant, None)

    def _resize(self, tenant: str, before: int, after: int) -> None:
        growth = after - before
        if growth > 0:
            share = self._max_total // 2
            if after > share:  # whenever it is tried again
                message = (
                    f"the request takes {after} bytes of memory, with the text of its files; one key or address may "
                    f"have {share} bytes, half of SERVE_MAX_BODY_TOTAL"
                )
                raise Refusal(413, "body_too_large", message, field="body")
            if self._held[tenant] + growth > share:
                raise _busy(f"the bodies of one key or address may have {share} bytes, half of SERVE_MAX_BODY_TOTAL")
            while self.num_bytes + growth > self._max_total:
                most = max(self._reading, key=self._held.__getitem__, default=tenant)
                if self._held[most] <= self._held[tenant] + growth:
                    raise _busy(f"the bodies of all requests may have {self._max_total} bytes (SERVE_MAX_BODY_TOTAL)")
                self._evict(max(self._reading[most], key=lambda lease: lease.size))
        self._held[tenant] += growth
        if not self._held[tenant]:
            del self._held[tenant]


def check_structure(structure: StructureCounter) -> None:
    """Raise `Refusal` for more values, or deeper ones, than a body may have."""
    if structure.num_values > MAX_VALUES:
        raise Refusal(400, "invalid_json", f"a body may hold {MAX_VALUES} values at most", field="body")
    if structure.max_depth > MAX_DEPTH:
        raise Refusal(400, "invalid_json", f"the body may be nested {MAX_DEPTH} deep at most", field="body")


def _busy(reason: str) -> Refusal:
    message = f"too many request bodies are held at once: {reason}"
    return Refusal(503, "bodies_full", message, headers={"Retry-After": str(RETRY_AFTER_S)})
