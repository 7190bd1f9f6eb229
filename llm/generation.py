"""What an engine gives back for a request: chunks that can be iterated sync and async, and cancelled at any time.

One producer (the engine's thread) and one consumer (any thread, or any event loop). What is ready at once leaves as
one chunk, and the producer never waits for the consumer: what piles up for one who has stopped reading is one small
piece per token, so at most the request's `max_tokens` of them.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Self

from llm.errors import DeadlineExceeded, LLMError


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model ended its turn, or a stop string was reached."""
    LENGTH = "length"
    """`max_tokens` or the end of the context was reached."""
    CANCELLED = "cancelled"
    """Somebody called `cancel()`."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that did not have to be computed."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities under the model's own distribution, before any sampling option."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest alternatives, best first, as (token id, log-probability)."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token."""

    id: int
    logprob: TokenLogprob | None = None
    """Present if the request asked for log-probabilities."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. Only the last one has `finish_reason`, `stop_reason` and `usage`.

    `text` may lag behind `token_ids`: it holds whole characters only, and nothing that could begin a stop string.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop_reason: str | None = None
    """The stop string that ended it, by the name that vLLM gives it; None if the model ended its turn."""

    @classmethod
    def join(cls, chunks: Iterable["Chunk"]) -> "Chunk":
        """Make one of many."""
        pieces = tuple(chunks)
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            "".join(piece.text for piece in pieces),
            tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
            tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
            next((piece.finish_reason for piece in reversed(pieces) if piece.finish_reason is not None), None),
            next((piece.usage for piece in reversed(pieces) if piece.usage is not None), None),
            next((piece.stop_reason for piece in reversed(pieces) if piece.stop_reason is not None), None),
        )

    def __add__(self, other: "Chunk") -> "Chunk":
        return self.join((self, other))


@dataclass(slots=True)
class Timings:
    """When things happened, in `time.monotonic()` seconds; None: not yet."""

    queued: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    tokens: list[float] = field(default_factory=list)
    """Of each piece that brought tokens."""
    ended: float | None = None

    @property
    def first_token(self) -> float | None:
        """Time to first token begins at `queued`."""
        return self.tokens[0] if self.tokens else None


class Generation:
    """An answer in the making. Iterate it (`for` or `async for`) to get its chunks; `cancel()` to end it.

    It always ends: after a chunk with a `finish_reason`, or by raising the typed error that stopped it. What became of
    it can be told from then on, whoever reads it.
    """

    def __init__(
        self, on_cancel: Callable[["Generation"], None], *, deadline: float | None = None, prompt_tokens: int = 0
    ) -> None:
        """Begin.

        Args:
            on_cancel: Told once if it is cancelled or aborted, or if its time is up.
            deadline: `time.monotonic()` seconds at which it ends. Its reader watches it, too: an engine that hangs
                must not hang others.
            prompt_tokens: For its `usage`, should the engine not come to tell it.
        """
        self.timings = Timings()
        self.finish_reason: FinishReason | None = None
        """None while it runs, and if an error ended it."""
        self.error: LLMError | None = None
        """What ended it, if not a `finish_reason`."""
        self.usage: Usage | None = None
        """None while it runs. The engine's own count if it came to its own end; else of what had come by then."""
        self._on_cancel = on_cancel
        self._deadline = deadline
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._ready = threading.Condition()
        self._waiter: asyncio.Future[None] | None = None  # of an event loop; a thread waits for `_ready` itself
        self._is_wanted_whole = False
        self._pending: list[Chunk] = []
        self._is_ended = False

    @property
    def is_ended(self) -> bool:
        """True once nothing more will be produced."""
        return self._is_ended

    def cancel(self) -> None:
        """End it now, in whatever phase it is. The engine frees its slot within one step. Harmless when ended."""
        if self._put(Chunk(finish_reason=FinishReason.CANCELLED)):
            self._on_cancel(self)

    def abort(self, error: LLMError) -> None:
        """`cancel`, but so that its reader does not take for whole what has come: after that, the error is raised."""
        if self._put(error):
            self._on_cancel(self)

    def expire(self) -> None:
        """Abort it because its time is up."""
        waited_s = time.monotonic() - self.timings.queued
        self.abort(DeadlineExceeded(f"the request was not finished in time: ended after {waited_s:.1f} s"))

    # The consumer's side.

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        with self._ready:
            while not self._has_news():
                if not self._ready.wait(self._left_s()):
                    self.expire()
            chunk = self._take()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            with self._ready:
                if self._has_news():
                    chunk = self._take()
                    break
                loop = asyncio.get_running_loop()
                self._waiter = waiter = loop.create_future()
            left_s = self._left_s()
            timer = None if left_s is None else loop.call_later(left_s, self.expire)  # cheaper than asyncio.wait_for
            try:
                await waiter
            finally:
                if timer is not None:
                    timer.cancel()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def whole(self) -> Chunk:
        """All of it that was not read yet. Cheaper than to iterate: the reader sleeps until it has ended."""
        self._is_wanted_whole = True
        return Chunk.join(self)

    async def awhole(self) -> Chunk:
        """`whole`, awaited."""
        self._is_wanted_whole = True
        return Chunk.join([chunk async for chunk in self])

    def _left_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _has_news(self) -> bool:
        return self._is_ended or (bool(self._pending) and not self._is_wanted_whole)

    def _take(self) -> Chunk | None:
        """What has come since the last call; None when all has been taken. Raises what ended the generation."""
        if self._pending:
            chunks, self._pending = self._pending, []
            return Chunk.join(chunks)
        if self.error is not None:
            raise self.error
        return None

    # The producer's side.

    def deliver(self, chunk: Chunk) -> None:
        """Hand over a piece; one with a `finish_reason` is the last. Ignored once ended."""
        deliver([(self, chunk)])

    def fail(self, error: LLMError) -> None:
        """End with an error, as `abort` does, by the engine itself. Ignored once ended."""
        self._put(error)

    def _put(self, piece: Chunk | LLMError, *, wake: Callable[[asyncio.Future[None]], None] | None = None) -> bool:
        """Add what has come. False if it has ended before, and nothing has changed."""
        with self._ready:
            if self._is_ended:
                return False
            if isinstance(piece, LLMError):
                self.error = piece
            else:
                self._pending.append(piece)
                self.finish_reason, self.usage = piece.finish_reason, piece.usage
                if piece.token_ids:
                    self._completion_tokens += len(piece.token_ids)
                    self.timings.tokens.append(time.monotonic())
            if self.error is not None or self.finish_reason is not None:
                self.usage = self.usage or Usage(self._prompt_tokens, self._completion_tokens)
                self.timings.ended = time.monotonic()
                self._is_ended = True  # the last: others look at it without the lock
            if not self._has_news():
                return True
            self._ready.notify_all()
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            (wake or wake_up)(waiter)
        return True


def deliver(pieces: Iterable[tuple[Generation, Chunk]]) -> None:
    """Hand over what one step made, as `Generation.deliver` does.

    An event loop is woken once for all of its readers, since each time costs a system call: 50 µs less for 16 of them.
    """
    waiters: list[asyncio.Future[None]] = []
    for generation, chunk in pieces:
        generation._put(chunk, wake=waiters.append)
    wake_up(*waiters)


def wake_up(*waiters: asyncio.Future[None]) -> None:
    """End what is awaited, in whatever event loop; from any thread. Harmless when ended."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        by_loop.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, its_waiters in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the consumer's loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, its_waiters)


def _resolve(waiters: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
