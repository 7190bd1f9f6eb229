"""How often a key may call, and how many requests it may have at once. Knows no request but its id.

Counted in this process, or in Redis where several processes stand for one service. While Redis cannot be reached each
process counts for itself: a service without limits would be worse, and one that refuses everybody too.
"""

import logging
import math
import time
from collections import Counter
from contextlib import suppress
from typing import Protocol

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis import asyncio as redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

REDIS_TIMEOUT_S = 0.5
REDIS_PAUSE_S = 5.0
"""After a failure nobody asks Redis, and waits for it in vain, for this long."""

PREFIX = "llama3-langserve"
"""What our names in Redis begin with."""

ENTER = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[1])
redis.call('EXPIRE', KEYS[1], math.max(redis.call('TTL', KEYS[1]), tonumber(ARGV[3])))
return 1
"""
"""Takes a place for a request, unless a key has all of its own: one that a process took and died with ends in time."""


def parse_rate(rate: str) -> RateLimitItem | None:
    """`6000/minute`, `10 per second`, …; empty: no limit. Raises ValueError."""
    return parse(rate) if rate.strip() else None


class Quota(Protocol):
    """Counts what keys ask for."""

    async def hit(self, key: str) -> int | None:
        """Count a call. None if it is within the rate, else the seconds until one is again."""
        ...

    async def enter(self, key: str, request_id: str, *, limit: int, timeout_s: float) -> bool:
        """Take one of the key's places, for so long at most. False if it has all of them."""
        ...

    async def leave(self, key: str, request_id: str) -> None:
        """Give the place back."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class Rate:
    """Calls per time, by the library `limits`."""

    def __init__(self, rate: RateLimitItem | None, storage: Storage) -> None:
        self._rate = rate
        self._window = SlidingWindowCounterRateLimiter(storage)

    async def hit(self, key: str) -> int | None:
        """See `Quota`."""
        if self._rate is None or await self._window.hit(self._rate, key):
            return None
        reset_time = (await self._window.get_window_stats(self._rate, key)).reset_time
        return max(1, math.ceil(reset_time - time.time()))


class LocalQuota:
    """Counts in this process."""

    def __init__(self, rate: RateLimitItem | None) -> None:
        self._rate = Rate(rate, MemoryStorage())
        self._num_inside: Counter[str] = Counter()

    async def hit(self, key: str) -> int | None:
        return await self._rate.hit(key)

    async def enter(self, key: str, request_id: str, *, limit: int, timeout_s: float) -> bool:
        if self._num_inside[key] >= limit:
            return False
        self._num_inside[key] += 1
        return True

    async def leave(self, key: str, request_id: str) -> None:
        self._num_inside[key] = max(0, self._num_inside[key] - 1)
        if not self._num_inside[key]:
            del self._num_inside[key]

    async def close(self) -> None:
        pass


class SharedQuota:
    """Counts in Redis, together with all processes that use the same one."""

    def __init__(self, rate: RateLimitItem | None, url: str) -> None:
        """Connect when first asked.

        Args:
            rate: Calls per time.
            url: `redis://host:6379/0` or `rediss://…`.
        """
        self._pool = redis.ConnectionPool.from_url(
            url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
        )
        storage = RedisStorage(
            f"async+{url}",
            implementation="redispy",
            key_prefix=PREFIX,
            connection_pool=self._pool,  # type: ignore[arg-type]  # as its documentation has it
        )
        self._rate = Rate(rate, storage)
        self._redis = redis.Redis(connection_pool=self._pool)
        self._enter = self._redis.register_script(ENTER)
        self._local = LocalQuota(rate)
        self._entered: set[str] = set()  # requests that are counted in Redis
        self._owed: list[tuple[str, str]] = []  # places that may still be taken there, and are free
        self._silent_until = -math.inf

    async def hit(self, key: str) -> int | None:
        if self._is_reachable():
            try:
                return await self._rate.hit(key)
            except (RedisError, OSError, TimeoutError) as error:
                await self._fail(error)
        return await self._local.hit(key)

    async def enter(self, key: str, request_id: str, *, limit: int, timeout_s: float) -> bool:
        if self._is_reachable():
            try:
                await self._settle()
                arguments = (request_id, limit, math.ceil(timeout_s))
                is_in = bool(await self._enter(keys=(self._place(key),), args=arguments))
            except (RedisError, OSError, TimeoutError) as error:
                self._owed.append((self._place(key), request_id))  # it may have come through
                await self._fail(error)
            else:
                self._entered.update([request_id] if is_in else [])
                return is_in
        return await self._local.enter(key, request_id, limit=limit, timeout_s=timeout_s)

    async def leave(self, key: str, request_id: str) -> None:
        if request_id not in self._entered:
            await self._local.leave(key, request_id)
            return
        self._entered.discard(request_id)
        self._owed.append((self._place(key), request_id))
        if self._is_reachable():
            try:
                await self._settle()
            except (RedisError, OSError, TimeoutError) as error:
                await self._fail(error)

    async def close(self) -> None:
        await self._pool.disconnect()

    def _place(self, key: str) -> str:
        return f"{PREFIX}:inside:{key}"

    def _is_reachable(self) -> bool:
        return time.monotonic() >= self._silent_until

    async def _settle(self) -> None:
        """Give back what could not be given back before."""
        owed, self._owed = self._owed, []
        try:
            while owed:
                await self._redis.zrem(*owed[-1])
                owed.pop()
        finally:
            self._owed += owed

    async def _fail(self, error: Exception) -> None:
        if not self._is_reachable():  # another request has said so
            return
        self._silent_until = time.monotonic() + REDIS_PAUSE_S
        log.warning("Redis cannot be reached, so this process counts for itself: %s", type(error).__name__)
        with suppress(RedisError, OSError, TimeoutError):
            await self.close()  # what is connected to a Redis that has gone would fail once more each when it is back


def open_quota(rate: str, redis_url: str) -> Quota:
    """Count in Redis if there is a URL, else here. Raises ValueError for a rate or a URL that is none."""
    limit = parse_rate(rate)
    if not redis_url:
        return LocalQuota(limit)
    try:
        return SharedQuota(limit, redis_url)
    except Exception:  # of many kinds, some of which show the password
        raise ValueError("SERVE_REDIS_URL is no URL of a Redis, like redis://host:6379/0") from None
