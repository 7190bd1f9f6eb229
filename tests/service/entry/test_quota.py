"""Rates and places, counted here and in a real Redis."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import redis

from service.entry.quota import LocalQuota, Quota, SharedQuota, open_quota, parse_rate
from tests.redis_server import RedisServer


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


@pytest.mark.parametrize("rate", ["often", "0.5/fortnight", "-1/minute"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match=r"couldn't parse|rate"):
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
