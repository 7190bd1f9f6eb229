"""Who is let in: how many requests at once, how many of each key, and none any more once the service is to stop.

A request is let in once, and may then have any number of generations; the engine takes turns between requests. Knows
no chain, no body and no header.
"""

import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from llm.caller import Caller
from llm.engine import Engine
from llm.errors import ShuttingDown
from service.entry.quota import Quota
from service.errors import Refusal

MAX_RETRY_AFTER_S = 60
NUM_LEAVINGS = 32
"""How many of the last requests tell how long it takes until there is room again."""


class Admission:
    """The places of a service: as many as the model has slots, and some more that wait for one."""

    def __init__(
        self, engine: Engine, quota: Quota, *, max_queue: int, max_concurrent: int | None, has_keys: bool
    ) -> None:
        """Begin with all places free.

        Args:
            engine: Says how many slots there are.
            quota: Counts what each key asks for.
            max_queue: Requests that may wait for a slot.
            max_concurrent: Requests of one key at once; None: half of all places, or all where there are no keys.
            has_keys: Whether clients have API keys.
        """
        self._engine = engine
        self._quota = quota
        self._max_queue = max_queue
        self._max_concurrent = max_concurrent
        self._has_keys = has_keys
        self._callers: set[Caller] = set()
        self._working: set[Caller] = set()  # those among them whose bodies were read
        self._left: deque[float] = deque(maxlen=NUM_LEAVINGS)
        self._drained_at = math.inf

    @property
    def num_inside(self) -> int:
        """Requests that have a place."""
        return len(self._callers)

    @property
    def num_working(self) -> int:
        """Those among them whose bodies were read: a drain waits for them."""
        return len(self._working)

    @property
    def is_draining(self) -> bool:
        """True once nobody is let in any more."""
        return self._drained_at < math.inf

    @property
    def is_drained(self) -> bool:
        """True once the service can stop: all that had begun have left, or had the time for it."""
        return self.is_draining and (not self._working or time.monotonic() >= self._drained_at)

    async def count_call(self, caller: str) -> None:
        """Count a call against the rate of a key or an address, and raise `Refusal` if it cannot be admitted now.

        Cheap, so that a refused request costs nothing: its body is not read.
        """
        if (wait_s := await self._quota.hit(caller)) is not None:
            what = "key" if self._has_keys else "address"
            message = f"this {what} has called too often: SERVE_RATE_LIMIT says how often it may"
            raise Refusal(429, "rate_limited", message, headers={"Retry-After": str(wait_s)})
        self._check_room()

    @asynccontextmanager
    async def place(self, caller: Caller, *, timeout_s: float) -> AsyncIterator[None]:
        """Let a request in, or raise why not; whatever it still runs when it leaves is ended.

        Args:
            caller: The request; its owner is the name of its key.
            timeout_s: How long it may stay.
        """
        self._check_room()
        limit = self._limit()
        self._callers.add(caller)
        try:
            with anyio.CancelScope(shield=True):  # or a place might be taken and never given back
                has_place = await self._quota.enter(caller.owner, caller.id, limit=limit, timeout_s=timeout_s)
            if not has_place:
                message = f"this key has {limit} requests running or waiting, which is its limit (SERVE_MAX_CONCURRENT)"
                raise Refusal(429, "too_many_at_once", message, headers=self._retry_later())
            try:
                yield
            finally:
                caller.end()
                with anyio.CancelScope(shield=True):
                    await self._quota.leave(caller.owner, caller.id)
                if caller in self._working:  # one that was refused for what it asked tells nothing
                    self._left.append(time.monotonic())
        finally:
            self._callers.discard(caller)
            self._working.discard(caller)

    def start(self, caller: Caller) -> None:
        """Let a request that has a place begin; from now on a drain waits for it. Raises `ShuttingDown`."""
        self._check_draining()
        self._working.add(caller)

    async def close(self) -> None:
        """Let go of what the quota holds."""
        await self._quota.close()

    def drain(self, timeout_s: float) -> None:
        """Let nobody in any more; those inside may take so long to finish."""
        self._drained_at = time.monotonic() + timeout_s

    def end_all(self) -> None:
        """End whoever is still inside; they are told why."""
        for caller in tuple(self._callers):
            caller.end(ShuttingDown("the service was told to stop, and this was not finished in time"))

    def _num_places(self) -> int:
        return self._engine.health().slots + self._max_queue

    def _limit(self) -> int:
        num_places = self._num_places()
        return self._max_concurrent or (math.ceil(num_places / 2) if self._has_keys else num_places)

    def _check_draining(self) -> None:
        if self.is_draining:
            raise ShuttingDown("the service was told to stop: send this to another one, or later")

    def _check_room(self) -> None:
        self._check_draining()
        _ = self._engine.checkpoint  # raises if there is no model, or not yet
        num_places = self._num_places()
        if self.num_inside >= num_places:
            message = (
                f"{num_places} requests run or wait already, of which {self._max_queue} (SERVE_MAX_QUEUE) may wait"
            )
            raise Refusal(503, "queue_full", message, headers=self._retry_later())

    def _retry_later(self) -> dict[str, str]:
        """When those who wait now will likely have been served, going by those who left lately."""
        now = time.monotonic()
        lately = [left for left in self._left if now - left < MAX_RETRY_AFTER_S]
        each_s = (now - lately[0]) / len(lately) if len(lately) > 1 else 1.0
        return {"Retry-After": str(min(MAX_RETRY_AFTER_S, max(1, math.ceil(each_s * self._max_queue))))}
