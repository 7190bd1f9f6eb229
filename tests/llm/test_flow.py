"""What is handed on waits for the reader of the events, in whatever thread it is handed on."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from llm.flow import MAX_AHEAD, Flow, current_flow, wait_for_reader


@pytest.mark.parametrize("is_own_loop", [False, True])
async def test_it_waits_while_the_reader_is_busy(is_own_loop: bool) -> None:
    queue: asyncio.Queue[int | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    total, most = 5 * MAX_AHEAD, 0

    async def produce() -> None:
        for number in range(total):
            await wait_for_reader(None)
            loop.call_soon_threadsafe(queue.put_nowait, number)
        loop.call_soon_threadsafe(queue.put_nowait, None)

    async def events() -> AsyncGenerator[int]:
        task = asyncio.create_task(asyncio.to_thread(asyncio.run, produce()) if is_own_loop else produce())
        while (number := await queue.get()) is not None:
            yield number
        await task

    numbers = []
    async with asyncio.timeout(30), aclosing(Flow().read(events())) as read:
        async for number in read:
            numbers.append(number)
            await asyncio.sleep(0.001)
            most = max(most, queue.qsize())
    assert numbers == [*range(total)]
    assert MAX_AHEAD / 2 < most <= MAX_AHEAD + 1


async def test_it_waits_no_longer_than_its_deadline_and_for_no_reader_that_has_left() -> None:
    async def events() -> AsyncGenerator[int]:
        while True:
            yield 1

    flow = Flow()
    read = flow.read(events())
    await anext(read)
    for _ in range(MAX_AHEAD):
        await flow.wait_for_reader(None)
    began = time.monotonic()
    await flow.wait_for_reader(began + 0.1)
    assert time.monotonic() - began >= 0.1
    waiting = asyncio.create_task(flow.wait_for_reader(None))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await read.aclose()
    async with asyncio.timeout(5):
        await waiting
        for _ in range(2 * MAX_AHEAD):
            await flow.wait_for_reader(None)


async def test_without_a_flow_nothing_waits() -> None:
    assert current_flow.get() is None
    async with asyncio.timeout(5):
        for _ in range(2 * MAX_AHEAD):
            await wait_for_reader(None)
