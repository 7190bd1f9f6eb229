"""Jobs at once, pieces in order."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial

import pytest

from chains.documents.in_order import WAITING, Job, in_order


class Yard:
    """Jobs that say when they run, and go on when they are told to."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.running: set[int] = set()
        self.gates: dict[int, asyncio.Event] = {}

    async def job(self, index: int, its_turn: asyncio.Event) -> AsyncGenerator[str]:
        self.started.append(index)
        self.running.add(index)
        try:
            yield f"{index}a "
            if index in self.gates:
                await self.gates[index].wait()
            await asyncio.sleep(0)
            yield f"{index}b "
        finally:
            self.running.discard(index)

    def jobs(self, num: int) -> Iterator[Job[str]]:
        return (partial(self.job, index) for index in range(num))


async def test_pieces_come_in_the_order_of_their_jobs() -> None:
    pieces = [piece async for piece in in_order(Yard().jobs(20), at_once=4)]
    assert "".join(pieces) == "".join(f"{index}a {index}b " for index in range(20))


async def test_no_jobs_give_no_pieces() -> None:
    jobs: Iterator[Job[str]] = iter(())
    assert [piece async for piece in in_order(jobs, at_once=4)] == []


async def test_a_piece_of_the_first_goes_out_before_its_job_is_done() -> None:
    yard = Yard()
    yard.gates[0] = asyncio.Event()
    async with aclosing(in_order(yard.jobs(3), at_once=2)) as pieces:
        assert await anext(pieces) == "0a "
        assert 0 in yard.running


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0.002)


async def test_all_places_stay_busy_behind_a_slow_one() -> None:
    yard = Yard()
    yard.gates = {index: asyncio.Event() for index in (0, 3, 4)}
    async with aclosing(in_order(yard.jobs(20), at_once=3)) as pieces:
        await anext(pieces)
        await settle()
        assert yard.running == {0, 3, 4}
        assert yard.started == [0, 1, 2, 3, 4]
        for gate in yard.gates.values():
            gate.set()
        assert "".join([piece async for piece in pieces]).startswith("0b 1a 1b 2a")


async def test_no_more_run_ahead_than_may_even_if_they_are_done() -> None:
    yard = Yard()
    yard.gates[0] = asyncio.Event()
    async with aclosing(in_order(yard.jobs(20), at_once=2)) as pieces:
        await anext(pieces)
        await settle()
        may = 2 * (1 + WAITING)
        assert yard.started == list(range(may)), "all others wait for the first, and no other has begun"
        assert yard.running == {0}
        yard.gates[0].set()
        assert len([piece async for piece in pieces]) == 39


async def test_a_failure_to_find_the_next_one_is_told_after_those_before_it() -> None:
    def jobs() -> Iterator[Job[str]]:
        yield from Yard().jobs(2)
        raise LookupError("no more")

    pieces = in_order(jobs(), at_once=6)
    assert [await anext(pieces) for _ in range(4)] == ["0a ", "0b ", "1a ", "1b "]
    with pytest.raises(LookupError, match="no more"):
        await anext(pieces)


async def test_each_is_told_when_it_is_its_turn() -> None:
    turns: list[asyncio.Event] = []

    async def job(its_turn: asyncio.Event) -> AsyncGenerator[int]:
        turns.append(its_turn)
        await its_turn.wait()
        yield len([turn for turn in turns if turn.is_set()])

    async with aclosing(in_order(iter([job] * 3), at_once=3)) as pieces:
        for taken in (1, 2, 3):
            assert await anext(pieces) == taken
            await settle()
            assert [turn.is_set() for turn in turns] == [True] * taken + [False] * (3 - taken)


async def test_when_one_fails_the_others_end() -> None:
    yard = Yard()
    yard.gates = {index: asyncio.Event() for index in range(2, 8)}

    async def failing(its_turn: asyncio.Event) -> AsyncGenerator[str]:
        yield "so far"
        raise LookupError("no more")

    def jobs() -> Iterator[Job[str]]:
        yield failing
        yield from yard.jobs(8)

    pieces = in_order(jobs(), at_once=6)
    assert await anext(pieces) == "so far"
    with pytest.raises(LookupError, match="no more"):
        await anext(pieces)
    assert yard.running == set()


async def test_failures_after_the_first_are_nobody_s_news(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(its_turn: asyncio.Event) -> AsyncGenerator[str]:
        raise LookupError("no more")
        yield ""

    pieces = in_order(iter([failing] * 3), at_once=3)
    with pytest.raises(LookupError, match="no more"):
        await anext(pieces)
    await settle()
    gc.collect()
    assert caplog.records == []


async def test_closing_it_ends_all() -> None:
    yard = Yard()
    yard.gates = {index: asyncio.Event() for index in range(8)}
    async with aclosing(in_order(yard.jobs(8), at_once=6)) as pieces:
        await anext(pieces)
        await settle()
        assert len(yard.running) == 6
    assert yard.running == set()


async def test_cancelling_who_reads_it_ends_all() -> None:
    yard = Yard()
    yard.gates = {index: asyncio.Event() for index in range(8)}

    async def read() -> None:
        async with aclosing(in_order(yard.jobs(8), at_once=6)) as pieces:
            async for _ in pieces:
                pass

    reader = asyncio.create_task(read())
    async with asyncio.timeout(5):
        while len(yard.running) < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert yard.running == set()
