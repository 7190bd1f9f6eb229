"""Who waits for whom: nobody for a book but those with books, and of those no key for more than one of another's."""

import threading
from collections.abc import Callable
from functools import partial

import anyio
import pytest

from service.entry.tokenizing import LARGE, Tokenizing, Turns


async def started(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def test_a_small_request_does_not_wait_for_large_ones() -> None:
    tokenizing, go_on = Tokenizing(), threading.Event()
    async with anyio.create_task_group() as others:
        for _ in range(50):
            others.start_soon(partial(tokenizing.run, go_on.wait, 30, key="eve", size=LARGE))
        with anyio.fail_after(5):
            assert await tokenizing.run(len, "Hi!", key="ada", size=3) == 3
        go_on.set()


async def test_large_ones_come_one_at_a_time_and_keys_take_turns() -> None:
    tokenizing = Tokenizing()
    go_on = threading.Semaphore(0)
    begun: list[str] = []

    def read(name: str) -> None:
        begun.append(name)
        assert go_on.acquire(timeout=30)

    async with anyio.create_task_group() as tasks:
        for name in ("eve 1", "eve 2", "eve 3", "ada 1"):
            tasks.start_soon(partial(tokenizing.run, read, name, key=name[:3], size=LARGE))
            await anyio.sleep(0.01)
        for number in range(1, 5):
            await started(lambda: len(begun) >= number)  # noqa: B023
            await anyio.sleep(0.02)
            assert len(begun) == number, "one at a time"
            go_on.release()
    assert begun == ["eve 1", "ada 1", "eve 2", "eve 3"]


async def test_a_request_that_is_cancelled_gives_its_turn_away() -> None:
    tokenizing, go_on = Tokenizing(), threading.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(tokenizing.run, go_on.wait, 30, key="eve", size=LARGE))
        await anyio.sleep(0.05)
        with anyio.move_on_after(0.05):
            await tokenizing.run(len, "", key="eve", size=LARGE)
        go_on.set()
    with anyio.fail_after(5):
        assert await tokenizing.run(len, "", key="eve", size=LARGE) == 0


@pytest.mark.parametrize(("keys", "at_once"), [("ada ada ada", 1), ("ada bob ada eve", 2), (",,,", 2)])
async def test_a_key_has_one_place_and_where_there_are_no_keys_whoever_comes_first_has_all(
    keys: str, at_once: int
) -> None:
    turns, running, most = Turns(2), 0, 0

    async def take(key: str) -> None:
        nonlocal running, most
        async with turns.of(key):
            running += 1
            most = max(most, running)
            await anyio.sleep(0.02)
            running -= 1

    async with anyio.create_task_group() as others:
        for key in keys.replace(",", " ,").split():
            others.start_soon(take, key.strip(","))
    assert most == at_once
