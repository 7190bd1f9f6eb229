"""How often a key may call, and how many requests it may have at once. Knows no request but its id.

Counted in this process, or in Redis where several processes stand for one service. While Redis cannot be reached each
process counts for itself: a service without limits would be worse, and one that refuses everybody too.
"""

import asyncio
import logging
import math
import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis import asyncio as redis
from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import InvalidResponse, RedisError

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CALLERS = 20_000
"""Callers that a `BoundedRate` remembers. Each takes about 200 bytes."""

REDIS_TIMEOUT_S = 0.5
"""How long a connection or a reply may take."""
REDIS_DEADLINE_S = 1.0
"""How long one operation may take, with connecting and redis-py's retries."""
MAX_REPLY_LINES = 100
MAX_REPLY_BYTES = 64 * 1024
"""What a reply may consist of. Those to our commands have five lines, and fewer than 100 bytes in each."""
MAX_OWED = 1_000
"""Places that are to be given back once Redis can be reached. Those forgotten end by themselves in time."""
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


RATE = re.compile(r"[1-9]\d*\s*(?:/|per)\s*(?:[1-9]\d*\s*)?(?:second|minute|hour|day|month|year)s?", re.IGNORECASE)


def parse_rate(rate: str) -> RateLimitItem | None:
    """`6000/minute`, `10 per second`, …; empty: no limit. Raises ValueError."""
    if not rate.strip():
        return None
    if not RATE.fullmatch(rate.strip()):
        raise ValueError("must be a rate of at least one call, like 6000/minute or 10 per 5 seconds")
    return parse(rate)


class Quota(Protocol):
    """Counts what keys ask for."""

    async def hit(self, caller: str) -> int | None:
        """Count a call of a key, or of an address where there are no keys.

        Returns None if it is within the rate, else the seconds until one is again.
        """
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
        stats = await self._window.get_window_stats(self._rate, key)
        if stats.remaining >= self._rate.amount:
            raise InvalidResponse("a call was refused though none was counted")
        return min(self._rate.get_expiry(), max(1, math.ceil(stats.reset_time - time.time())))


class BoundedRate:
    """Calls per time of any number of callers, counted in this process, in bounded memory.

    By the generic cell rate algorithm: a caller may send as many calls at once as the rate says, and gets each back
    after its part of the rate's time. Of more than `MAX_CALLERS`, those that were counted longest ago are forgotten.
    """

    def __init__(self, rate: RateLimitItem | None, max_callers: int = MAX_CALLERS) -> None:
        self._interval_s = 0.0 if rate is None else rate.get_expiry() / rate.amount
        self._tolerance_s = 0.0 if rate is None else self._interval_s * (rate.amount - 1) + 1e-6
        self._max_callers = max_callers
        self._free_at: OrderedDict[str, float] = OrderedDict()  # when all of a caller's calls will have come back

    def __len__(self) -> int:
        return len(self._free_at)

    def hit(self, caller: str) -> int | None:
        """Count a call. Returns None if it is within the rate, else the seconds until one is again."""
        if not self._interval_s:
            return None
        now = time.monotonic()
        free_at = max(now, self._free_at.get(caller, now))
        if (wait_s := free_at - now - self._tolerance_s) > 0:
            return math.ceil(wait_s)
        self._free_at[caller] = free_at + self._interval_s
        self._free_at.move_to_end(caller)
        if len(self._free_at) > self._max_callers:
            self._free_at.popitem(last=False)
        return None


class LocalQuota:
    """Counts in this process."""

    def __init__(self, rate: RateLimitItem | None) -> None:
        self._rate = BoundedRate(rate)
        self._num_inside: Counter[str] = Counter()

    async def hit(self, key: str) -> int | None:
        return self._rate.hit(key)

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


class BoundedParser(_AsyncRESP2Parser):
    """Reads a reply, unless it is larger than any to our commands: redis-py would wait for gigabytes, and keep them."""

    _num_lines = 0

    async def read_response(self, disable_decoding: bool = False) -> Any:
        """Read one reply."""
        self._num_lines = 0
        return await super().read_response(disable_decoding)

    async def _readline(self) -> bytes:
        self._num_lines += 1
        if self._num_lines > MAX_REPLY_LINES:
            raise InvalidResponse(f"a reply has more than {MAX_REPLY_LINES} lines")
        line: bytes = await super()._readline()
        return line

    async def _read(self, length: int) -> bytes:
        if not 0 <= length <= MAX_REPLY_BYTES:
            raise InvalidResponse(f"a reply has a text of {length} bytes")
        text: bytes = await super()._read(length)
        return text


class SharedQuota:
    """Counts in Redis, together with all processes that use the same one.

    Whatever goes wrong there, be it the connection or what Redis answers, this process counts for itself.
    """

    def __init__(self, rate: RateLimitItem | None, url: str) -> None:
        """Connect when first asked.

        Args:
            rate: Calls per time.
            url: `redis://host:6379/0` or `rediss://…`.
        """
        self._pool = redis.ConnectionPool.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            protocol=2,
            parser_class=BoundedParser,
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
        self._owed: deque[tuple[str, str]] = deque(maxlen=MAX_OWED)  # places that may be taken there, and are free
        self._silent_until = -math.inf

    async def hit(self, key: str) -> int | None:
        if self._is_reachable():
            try:
                return await self._ask(lambda: self._rate.hit(key))
            except Exception as error:
                await self._fail(error)
        return await self._local.hit(key)

    async def enter(self, key: str, request_id: str, *, limit: int, timeout_s: float) -> bool:
        async def ask() -> bool:
            await self._settle()
            reply = await self._enter(keys=(self._place(key),), args=(request_id, limit, math.ceil(timeout_s)))
            if reply not in (0, 1):
                raise InvalidResponse("neither 0 nor 1")
            return bool(reply)

        if self._is_reachable():
            try:
                is_in = await self._ask(ask)
            except Exception as error:
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
                await self._ask(self._settle)
            except Exception as error:
                await self._fail(error)

    async def close(self) -> None:
        await self._pool.disconnect()

    def _place(self, key: str) -> str:
        return f"{PREFIX}:inside:{key}"

    def _is_reachable(self) -> bool:
        return time.monotonic() >= self._silent_until

    async def _ask(self, operation: Callable[[], Awaitable[T]]) -> T:
        async with asyncio.timeout(REDIS_DEADLINE_S):
            return await operation()

    async def _settle(self) -> None:
        """Give back what could not be given back before."""
        while self._owed:
            place, request_id = self._owed.pop()
            try:
                await self._redis.zrem(place, request_id)
            except BaseException:
                self._owed.append((place, request_id))
                raise

    async def _fail(self, error: Exception) -> None:
        if not self._is_reachable():  # another request has said so
            return
        self._silent_until = time.monotonic() + REDIS_PAUSE_S
        problem = "gives invalid answers" if _is_nonsense(error) else "cannot be reached"
        log.warning("Redis %s, so this process counts for itself: %s", problem, type(error).__name__)
        with suppress(Exception):
            await self._ask(self.close)  # what is connected to a Redis that has gone would fail again when it is back


def _is_nonsense(error: Exception) -> bool:
    return isinstance(error, InvalidResponse) or not isinstance(error, RedisError | OSError | TimeoutError)


def open_quota(rate: str, redis_url: str) -> Quota:
    """Count in Redis if there is a URL, else here. Raises ValueError for a rate or a URL that is none."""
    limit = parse_rate(rate)
    if not redis_url:
        return LocalQuota(limit)
    try:
        return SharedQuota(limit, redis_url)
    except Exception:  # of many kinds, some of which show the password
        raise ValueError("SERVE_REDIS_URL is no URL of a Redis, like redis://host:6379/0") from None
