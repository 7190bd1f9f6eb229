"""Many things done at once, and their pieces handed on in order. Knows no text and no model."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Generic, TypeVar

import anyio

from chains.cancellable import run_cancellable

T = TypeVar("T")

WAITING = 3
"""Jobs that have run, or are to run next, for each that runs: so all places stay busy behind a slow one."""

Job = Callable[[asyncio.Event], AsyncGenerator[T]]
"""What yields pieces. The event is set once it is its turn: what it yields from then on goes out at once."""


class Lane(Generic[T]):
    """A job, and those of its pieces that nobody has taken yet."""

    def __init__(self, job: Job[T], places: asyncio.Semaphore, *, is_first: bool) -> None:
        self._places = places
        self._its_turn = asyncio.Event()
        if is_first:
            self._its_turn.set()
        self._pieces: asyncio.Queue[T | None] = asyncio.Queue()  # None: there are no more
        self.task = asyncio.create_task(self._run(job))

    async def _run(self, job: Job[T]) -> None:
        try:
            async with self._places, aclosing(job(self._its_turn)) as pieces:
                async for piece in pieces:
                    self._pieces.put_nowait(piece)
        finally:
            self._pieces.put_nowait(None)

    async def pieces(self) -> AsyncGenerator[T]:
        """Take its pieces as they come. Raises what the job raised."""
        self._its_turn.set()
        while (piece := await self._pieces.get()) is not None:
            yield piece
        await self.task


async def in_order(jobs: Iterator[Job[T]], *, at_once: int) -> AsyncGenerator[T]:
    """Run jobs at once, and yield all pieces of the first, then all of the second, and so on.

    A piece of the job whose turn it is goes out as it comes; those of later ones wait. If one fails, or this is closed,
    the others are cancelled.

    Args:
        jobs: Asked for the next one, in a thread, only when there is room for it.
        at_once: How many may run. `WAITING` times as many may have run and wait for their turn.
    """
    places = asyncio.Semaphore(at_once)
    room = asyncio.Semaphore(at_once * (1 + WAITING))
    lanes: asyncio.Queue[Lane[T] | None] = asyncio.Queue()  # None: there are no more
    tasks: set[asyncio.Task[None]] = set()

    def keep(task: asyncio.Task[None]) -> None:
        tasks.add(task)
        task.add_done_callback(forget)

    def forget(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        _ = task.cancelled() or task.exception()  # told to whoever takes its pieces, or to nobody: it is no news then

    async def open_lanes() -> None:
        is_first = True
        try:
            while await room.acquire() and (job := await run_cancellable(next, jobs, None)) is not None:
                lane = Lane(job, places, is_first=is_first)
                keep(lane.task)
                lanes.put_nowait(lane)
                is_first = False
        finally:
            lanes.put_nowait(None)

    opening = asyncio.create_task(open_lanes())
    keep(opening)
    try:
        while (lane := await lanes.get()) is not None:
            async with aclosing(lane.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
            room.release()
        await opening
    finally:
        left = [*tasks]
        for task in left:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*left, return_exceptions=True)
