"""Many things done at once, and their pieces handed on in order. Knows no text and no model."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")

Job = Callable[[asyncio.Event], AsyncGenerator[T]]
"""What yields pieces. The event is set once it is its turn: what it yields from then on goes out at once."""


class Lane(Generic[T]):
    """A job that runs, and those of its pieces that nobody has taken yet."""

    def __init__(self, job: Job[T], *, is_first: bool) -> None:
        self._its_turn = asyncio.Event()
        if is_first:
            self._its_turn.set()
        self._pieces: asyncio.Queue[T | None] = asyncio.Queue()  # None: there are no more
        self.task = asyncio.create_task(self._run(job))

    async def _run(self, job: Job[T]) -> None:
        try:
            async with aclosing(job(self._its_turn)) as pieces:
                async for piece in pieces:
                    self._pieces.put_nowait(piece)
        finally:
            self._pieces.put_nowait(None)

    async def pieces(self) -> AsyncIterator[T]:
        """Take its pieces as they come. Raises what the job raised."""
        self._its_turn.set()
        while (piece := await self._pieces.get()) is not None:
            yield piece
        await self.task


async def in_order(jobs: Iterator[Job[T]], *, ahead: int) -> AsyncGenerator[T]:
    """Run jobs at once, and yield all pieces of the first, then all of the second, and so on.

    A piece of the job whose turn it is goes out as it comes; those of later ones wait. If one fails, or this is closed,
    the others are cancelled.

    Args:
        jobs: Asked for the next one, in a thread, only when there is room for it.
        ahead: How many may run, or have run and wait for their turn.
    """
    lanes: deque[Lane[T]] = deque()
    try:
        job = await asyncio.to_thread(next, jobs, None)
        while job is not None or lanes:
            while job is not None and len(lanes) < ahead:
                lanes.append(Lane(job, is_first=not lanes))
                job = await asyncio.to_thread(next, jobs, None)
            async for piece in lanes[0].pieces():
                yield piece
            lanes.popleft()
    finally:
        for lane in lanes:
            lane.task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*(lane.task for lane in lanes), return_exceptions=True)
