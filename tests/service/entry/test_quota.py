"""Rates and places, counted here and in a real Redis."""

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

from service.entry.quota import MAX_OWED, BoundedRate, LocalQuota, Quota, SharedQuota, open_quota, parse_rate
from tests.nonsense_redis import MAX_SENT, nonsense_redis
from tests.redis_server import RedisServer
from tests.server import free_port


@pytest.fixture(params=["here", "in Redis"])
async def quota(request: pytest.FixtureRequest) -> AsyncIterator[Quota]:
    is_shared = request.param == "in Redis"
    quota = open_quota("3/hour", request.getfixturevalue("redis_server").url if is_shared else "")
    assert isinstance(quota, SharedQuota if is_shared else LocalQuota)
    yield quota
    await quota.close()


async def enter(quota: Quota, key: str, request_id: str, limit: int = 2) -> bool:
    return await quota.enter(key, request_id, limit=limit, timeout_s=60)


async def test_calls_beyond_the_rate_are_told_how_long_to_wait(quota: Quota) -> None:
    assert [await quota.hit("ada") for _ in range(3)] == [None] * 3
    wait_s = await quota.hit("ada")
    assert wait_s is not None
    assert 1 <= wait_s <= 3600
    assert await quota.hit("bob") is None


async def test_a_key_has_so_many_places_and_gets_them_back(quota: Quota) -> None:
    assert await enter(quota, "ada", "1")
    assert await enter(quota, "ada", "2")
    assert not await enter(quota, "ada", "3")
    assert await enter(quota, "bob", "4")
    await quota.leave("ada", "1")
    assert await enter(quota, "ada", "5")
    assert not await enter(quota, "ada", "6")


async def test_no_rate_is_any_number() -> None:
    quota = open_quota("", "")
    assert [await quota.hit("ada") for _ in range(1000)] == [None] * 1000


@pytest.mark.parametrize(
    "rate", ["often", "0.5/fortnight", "-1/minute", "0/minute", "1/0second", "1/minute;2/hour", "5/minute please"]
)
def test_what_is_no_rate_is_refused(rate: str) -> None:
    """A rate of 0 was taken, and every call failed with 500; of two rates the second was ignored."""
    with pytest.raises(ValueError, match="must be a rate"):
        open_quota(rate, "")


async def test_processes_that_share_a_redis_count_together(redis_server: RedisServer) -> None:
    one, two = (SharedQuota(parse_rate("3/hour"), redis_server.url) for _ in range(2))
    assert [await each.hit("ada") for each in (one, two, one)] == [None] * 3
    assert await two.hit("ada") is not None
    assert await enter(one, "ada", "1")
    assert await enter(two, "ada", "2")
    assert not await enter(one, "ada", "3")
    await one.leave("ada", "1")
    assert await enter(two, "ada", "4")
    await one.close()
    await two.close()


async def test_the_places_of_a_process_that_died_are_free_in_time(redis_server: RedisServer) -> None:
    dead, alive = (SharedQuota(None, redis_server.url) for _ in range(2))
    assert await dead.enter("ada", "1", limit=1, timeout_s=1)
    assert not await alive.enter("ada", "2", limit=1, timeout_s=60)
    await asyncio.sleep(2.1)  # Redis counts whole seconds here
    assert await alive.enter("ada", "2", limit=1, timeout_s=60)
    await dead.close()
    await alive.close()


async def test_a_place_that_redis_did_not_hear_of_in_time_is_given_back_when_it_listens_again(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped has run, later, what nobody waited for any more: places were taken for an hour."""
    monkeypatch.setattr("service.entry.quota.REDIS_PAUSE_S", 0.2)
    quota = SharedQuota(None, redis_server.url)
    assert await enter(quota, "ada", "1")
    redis_server.signal(signal.SIGSTOP)
    assert await enter(quota, "ada", "2"), "counted here"
    await quota.leave("ada", "1")
    await quota.leave("ada", "2")
    redis_server.signal(signal.SIGCONT)
    await asyncio.sleep(0.3)
    assert await enter(quota, "ada", "3", limit=1)
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.zrange("llama3-langserve:inside:ada", 0, -1) == [b"3"]
    await quota.close()


@pytest.mark.parametrize("url", ["http://localhost", "redis://:se/cret@h:1/0", "redsi://:secret@h", "nonsense"])
def test_what_is_no_redis_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="SERVE_REDIS_URL is no URL of a Redis") as caught:
        open_quota("", url)
    assert "cret" not in str(caught.value)


async def test_without_redis_each_process_counts_for_itself(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.entry.quota.REDIS_PAUSE_S", 0.2)
    quota = SharedQuota(parse_rate("1000/minute"), redis_server.url)
    assert await enter(quota, "ada", "1", limit=1)
    redis_server.stop()
    assert await quota.hit("ada") is None
    assert await enter(quota, "ada", "2", limit=1), "here nobody of that key is inside"
    assert not await enter(quota, "ada", "3", limit=1)
    await quota.leave("ada", "2")
    await quota.leave("ada", "1")
    assert "Redis cannot be reached" in caplog.text
    redis_server.start()
    await asyncio.sleep(0.3)
    assert await enter(quota, "ada", "4", limit=1)
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.zcard("llama3-langserve:inside:ada") == 1
    await quota.close()


async def endless_text() -> AsyncIterator[bytes]:
    yield b"$10000000000\r\n"
    for _ in range(MAX_SENT // 65_536):
        yield b"x" * 65_536


async def endless_list() -> AsyncIterator[bytes]:
    yield b"*1000000000\r\n"
    for _ in range(MAX_SENT // 65_536):
        yield b":1\r\n" * 16_384


async def endless_line() -> AsyncIterator[bytes]:
    for _ in range(MAX_SENT // 65_536):
        yield b"+" + b"x" * 65_535


async def drip() -> AsyncIterator[bytes]:
    yield b"*1000\r\n"
    for _ in range(1000):
        yield b":1\r\n"
        await asyncio.sleep(0.1)


NONSENSE: dict[str, Any] = {
    "deeply nested lists": b"*1\r\n" * 100_000 + b":1\r\n",
    "lists within the limit": b"*1\r\n" * 90 + b":1\r\n",
    "a text": b"$5\r\nhello\r\n",
    "a word": b"+OK\r\n",
    "nothing": b"$-1\r\n",
    "no list": b"*-1\r\n",
    "an empty list": b"*0\r\n",
    "a number": b":7\r\n",
    "a negative number": b":-7\r\n",
    "a number of 5,000 digits": b":" + b"9" * 5_000 + b"\r\n",
    "a list of texts": b"*4\r\n" + b"$1\r\nx\r\n" * 4,
    "an error": b"-ERR no such command\r\n",
    "a demand for a password": b"-NOAUTH Authentication required.\r\n",
    "a negative length": b"$-7\r\nhello\r\n",
    "a length of words": b"$ten\r\nhello\r\n",
    "garbage": bytes(range(256)) * 10,
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "RESP3": b"%1\r\n+a\r\n:1\r\n",
    "a text beyond all bounds": endless_text,
    "a list beyond all bounds": endless_list,
    "a line beyond all bounds": endless_line,
    "a list that drips": drip,
}


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("greets", [True, False], ids=["after a greeting", "from the start"])
async def test_whatever_redis_answers_requests_are_served(
    name: str, greets: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeply nested lists were a RecursionError, and a 500 for the caller; a long text filled the memory."""
    monkeypatch.setattr("service.entry.quota.REDIS_DEADLINE_S", 0.2)
    monkeypatch.setattr("service.entry.quota.REDIS_PAUSE_S", 0.0)
    async with nonsense_redis(NONSENSE[name], greets=greets) as redis:
        quota = SharedQuota(parse_rate("100/hour"), redis.url)
        for request_id in ("1", "2"):
            assert await quota.hit("ada") is None
            assert await enter(quota, "ada", request_id)
        await quota.leave("ada", "1")
        await quota.leave("ada", "2")
        await quota.close()
        assert redis.num_asked > 0
        assert redis.num_sent < MAX_SENT / 4, "what nobody waits for was read"
    assert "this process counts for itself" in caplog.text


async def test_a_cancelled_request_is_no_failure_of_redis(caplog: pytest.LogCaptureFixture) -> None:
    async with nonsense_redis(drip) as redis:
        quota = SharedQuota(parse_rate("100/hour"), redis.url)
        task = asyncio.create_task(quota.hit("ada"))
        while not redis.num_asked:  # noqa: ASYNC110  # the server's event would be one more thing to go wrong
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await quota.close()
    assert caplog.text == ""


async def test_places_owed_to_a_redis_that_stays_away_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.entry.quota.REDIS_PAUSE_S", 0.0)
    quota = SharedQuota(None, f"redis://127.0.0.1:{free_port()}/0")
    for number in range(MAX_OWED + 10):
        quota._owed.append(("place", str(number)))
    assert await enter(quota, "ada", "1")
    assert len(quota._owed) == MAX_OWED
    await quota.close()


def test_a_rate_gives_back_what_was_used_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.entry.quota.time.monotonic", lambda: now)
    rate = BoundedRate(parse_rate("3/minute"))
    assert [rate.hit("ada") for _ in range(5)] == [None, None, None, 20, 20]
    assert rate.hit("bob") is None
    now += 19.5
    assert rate.hit("ada") == 1
    now += 0.5
    assert [rate.hit("ada") for _ in range(2)] == [None, 20]
    now += 3600
    assert [rate.hit("ada") for _ in range(4)] == [None, None, None, 20]


def test_a_rate_forgets_whom_it_counted_longest_ago() -> None:
    rate = BoundedRate(parse_rate("1/hour"), max_callers=100)
    assert rate.hit("first") is None
    for number in range(1000):
        assert rate.hit(str(number)) is None
    assert len(rate) == 100
    assert rate.hit("first") is None
    assert rate.hit("999") is not None


def test_an_empty_rate_counts_nothing() -> None:
    rate = BoundedRate(None)
    assert [rate.hit("ada") for _ in range(1000)] == [None] * 1000
    assert len(rate) == 0
