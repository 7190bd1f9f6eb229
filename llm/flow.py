"""Back pressure where events go through a queue without bound: a chain and its models wait for the events' reader.

LangChain runs a chain whose events or log are streamed in a task of its own, and queues whatever happens there
(`langchain_core.tracers.memory_stream`). Knows of events only when their reader waits for the next one: then the queue
is empty, whichever events its filters let through. So it cannot hold up a chain while the reader has nothing to read.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import TypeVar

from llm.generation import wake_up

T = TypeVar("T")

MAX_AHEAD = 64
"""Chunks that a chain, or its models, hand on while the reader is busy. Each makes an event per step of the chain."""

MODEL, CHAIN = "model", "chain"
"""Sources of chunks. A chunk of a model is mostly a chunk of its chain, too: so each source is counted apart."""


class Flow:
    """How far a chain is ahead of the reader of its events. Its models may run in any event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The reader's; None while there is no reader: then models do not wait."""
        self._is_reader_waiting = True
        self._num_ahead: Counter[str] = Counter()  # of each source
        self._waiters: list[asyncio.Future[None]] = []

    async def wait_for_reader(self, deadline: float | None, source: str = MODEL) -> None:
        """Return when a model, or the chain itself, may hand on another chunk.

        Args:
            deadline: `time.monotonic()` seconds at which it returns in any case; None: it has no such time.
            source: Whose chunks are counted: `MODEL` or `CHAIN`.
        """
        with self._lock:
            self._num_ahead[source] += 1
            if self._loop is None or self._num_ahead[source] <= MAX_AHEAD:
                return
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._waiters.append(waiter)
            self._resume_soon()
        timer = None if deadline is None else loop.call_later(max(0.0, deadline - time.monotonic()), wake_up, waiter)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    async def read(self, events: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """Yield the events; close them at the end. The chain must not have begun: it is begun here."""
        # Not reset: a generator may be closed in another context, and no model waits for one that was read.
        current_flow.set(self)
        self._loop = asyncio.get_running_loop()
        async with aclosing(events):
            try:
                while True:
                    with self._lock:
                        self._is_reader_waiting = True
                        self._resume_soon()
                    try:
                        event = await anext(events)
                    except StopAsyncIteration:
                        return
                    self._is_reader_waiting = False
                    yield event
            finally:  # before the events are closed: LangChain waits for the chain there
                with self._lock:
                    self._loop = None
                self._resume()

    def _resume_soon(self) -> None:
        """Call `_resume` after the reader has taken what is there: if it then still waits, the queue is empty."""
        if self._loop is not None and self._waiters and self._is_reader_waiting:
            # Once to put the events that LangChain has scheduled into the queue, and once to wake the reader.
            self._loop.call_soon_threadsafe(self._loop.call_soon, self._resume)

    def _resume(self) -> None:
        """Let the models go on, unless the reader is busy."""
        with self._lock:
            if self._loop is not None and not self._is_reader_waiting:
                return
            self._num_ahead.clear()
            waiters, self._waiters = self._waiters, []
        wake_up(*waiters)


current_flow: ContextVar[Flow | None] = ContextVar("current_flow", default=None)


async def wait_for_reader(deadline: float | None, source: str = MODEL) -> None:
    """`Flow.wait_for_reader` of the current flow, if there is one."""
    flow = current_flow.get()
    if flow is not None:
        await flow.wait_for_reader(deadline, source)
