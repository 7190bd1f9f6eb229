"""An engine that serves one request at a time, in the order in which they came. Knows queues and threads, no torch.

What makes the tokens is a `TokenSource`: it is opened and run in the engine's own thread and nowhere else.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from llm.checkpoint import Checkpoint
from llm.engine import EngineHealth, EngineState, Request, check_limits
from llm.errors import EngineDead, EngineLoading, GenerationFailed, LLMError, QueueFull
from llm.generation import Chunk, FinishReason, Generation, Token, Usage
from llm.text import TextStream

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10
"""How long closing waits for the step, or at a program's end for the load, that is in progress."""


class TokenSource(Protocol):
    """What an engine runs."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Names, ids and limits of the model."""
        ...

    def steps(self, request: Request) -> Generator[Token | None]:
        """Yield after every step: a token, or None where a step made none (a piece of the prompt was read).

        Goes on for as long as the engine asks.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    request: Request
    max_tokens: int
    generation: Generation


class SerialEngine:
    """Takes requests from any thread, and serves them in one thread of its own, first come first served."""

    def __init__(self, name: str, open_source: Callable[[], TokenSource], *, max_queue: int | None) -> None:
        """Return at once; the model loads in the background.

        Args:
            name: The model reference.
            open_source: Loads the model. Called once, in the engine's thread.
            max_queue: Requests that may wait; one more is refused with `QueueFull`. None: any number.
        """
        self._name = name
        self._open_source = open_source
        self._max_queue = max_queue
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._checkpoint: Checkpoint | None = None
        self._death: LLMError | None = None
        self._was_loaded = False
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"engine {self._name}", daemon=True)
        self._thread.start()
        atexit.register(self._end_with_the_program)

    # What everybody else calls.

    @property
    def checkpoint(self) -> Checkpoint:
        """Names, ids and limits of the model. Raises `EngineLoading` or `EngineDead` while there is none."""
        with self._changed:
            return self._loaded()

    def wait_until_ready(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait for the model. Raises what kept it from loading, or `EngineLoading` after a timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._checkpoint is not None or self._death is not None, timeout_s)
            if self._death is not None and not self._was_loaded:
                raise self._death
            return self._loaded()

    def generate(self, request: Request) -> Generation:
        """Queue a request and return at once, or raise why it cannot be served."""
        with self._changed:
            max_tokens = check_limits(request, self._loaded())
            job = _Job(request, max_tokens, Generation(self._forget, deadline=request.deadline))
            if self._is_full():
                raise QueueFull(len(self._waiting))
            self._waiting.append(job)
            self._changed.notify_all()
        return job.generation

    def health(self) -> EngineHealth:
        """A look at the engine."""
        with self._changed:
            if self._death is not None:
                state = EngineState.DEAD
            else:
                state = EngineState.LOADING if self._checkpoint is None else EngineState.READY
            return EngineHealth(
                state=state,
                model=self._name,
                running=0 if self._running is None else 1,
                waiting=len(self._waiting),
                is_full=self._is_full(),
                slots=1,
                context=0 if self._checkpoint is None else self._checkpoint.context,
                error=None if self._death is None else str(self._death),
            )

    def close(self) -> None:
        """End everything that runs or waits, and free the model. A load in progress is left to end by itself."""
        with self._changed:
            self._is_closing = True
            is_loading = self._checkpoint is None and self._death is None
            self._changed.notify_all()
        if not is_loading:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _end_with_the_program(self) -> None:
        """A thread that is inside torch when the interpreter goes away takes the process down with SIGABRT."""
        self.close()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _loaded(self) -> Checkpoint:
        if self._death is not None:
            raise EngineDead(f"the engine has stopped: {self._death}") from self._death
        if self._checkpoint is None:
            raise EngineLoading(f"the model {self._name} is still loading")
        return self._checkpoint

    def _is_full(self) -> bool:
        return self._max_queue is not None and len(self._waiting) >= self._max_queue

    def _forget(self, generation: Generation) -> None:
        """A cancelled request leaves the queue at once; a running one stops after the step it is in."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if job.generation is not generation)

    # The engine's thread.

    def _run(self) -> None:
        death: LLMError = EngineDead("it was closed")
        try:
            started = time.monotonic()
            source = self._open_source()
            with self._changed:
                self._checkpoint = source.checkpoint
                self._was_loaded = True
                self._changed.notify_all()
            log.info("The model %s is ready after %.1f s", self._name, time.monotonic() - started)
            while (job := self._next()) is not None:
                self._serve(job, source)
                with self._changed:
                    self._running = None
        except LLMError as error:
            death = error
            log.error("The engine has stopped: %s", error)
        except BaseException as error:
            death = EngineDead(f"{type(error).__name__}: {error}")
            log.exception("The engine has stopped")
        finally:
            self._die(death)

    def _next(self) -> _Job | None:
        """The request whose turn it is; None when the engine is to close."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if self._is_closing:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _serve(self, job: _Job, source: TokenSource) -> None:
        generation, checkpoint = job.generation, source.checkpoint
        generation.timings.admitted = time.monotonic()
        text = TextStream(checkpoint.tokenizer, job.request.sampling.stop)
        num_tokens = 0
        self._expire()
        try:
            with closing(source.steps(job.request)) as steps:
                while not (generation.is_ended or self._is_closing):
                    token = next(steps)
                    self._expire()
                    if token is not None:
                        num_tokens += 1
                        generation.deliver(_chunk(job, checkpoint, text, token, num_tokens))
        except Exception as error:
            log.exception("Request %s failed", job.request.trace_id)
            generation.fail(GenerationFailed(f"generation failed: {type(error).__name__}"))
        generation.fail(EngineDead("the engine was closed"))  # ignored unless that is why the loop ended

    def _expire(self) -> None:
        """End what has run out of time, whether it runs or waits."""
        now = time.monotonic()
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            late = [job for job in jobs if job.request.deadline is not None and job.request.deadline <= now]
            self._waiting = deque(job for job in self._waiting if job not in late)
        for job in late:
            job.generation.expire()

    def _die(self, death: LLMError) -> None:
        with self._changed:
            self._death = death
            self._checkpoint = None
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._running = None
            self._changed.notify_all()
        atexit.unregister(self._end_with_the_program)
        for job in jobs:
            error = EngineDead(f"the engine has stopped: {death}")
            error.__cause__ = death
            job.generation.fail(error)


def _chunk(job: _Job, checkpoint: Checkpoint, text: TextStream, token: Token, num_tokens: int) -> Chunk:
    """What a new token adds to the answer, and whether it ends it."""
    finish_reason = None
    new_text = ""
    if token.id in checkpoint.stop_ids:
        finish_reason = FinishReason.STOP
    else:
        new_text = text.push([token.id])
        if text.is_stopped:
            finish_reason = FinishReason.STOP
        elif num_tokens == job.max_tokens:
            finish_reason = FinishReason.LENGTH
    return Chunk(
        text=new_text + (text.flush() if finish_reason else ""),
        token_ids=(token.id,),
        logprobs=() if token.logprob is None else (token.logprob,),
        finish_reason=finish_reason,
        usage=Usage(len(job.request.prompt), num_tokens) if finish_reason else None,
    )
