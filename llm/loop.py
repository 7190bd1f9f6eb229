"""The loop of an engine: lets requests in, reads prompts, makes tokens and hands them over, step by step.

Runs in the engine's thread. Knows nothing of how an engine begins, breaks and ends.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Generic

from llm.errors import EngineDead, GenerationFailed, LLMError, OutOfDeviceMemory
from llm.generation import Chunk, Token, deliver
from llm.job import Job
from llm.runner import Runner, S
from llm.schedule import Schedule

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What the loop counts for the engine, and leaves for its next one if it breaks."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    memory_use: float = 0.0
    trouble: str | None = None
    """What went wrong since a request was last finished."""
    failures: int = 0
    """How often a loop has broken since then."""


class Loop(Generic[S]):
    """Serves the requests of a schedule together, joining and leaving at every step.

    See `Schedule` for who is next. A request that does not fit the memory is not overtaken by those behind it; it is
    tried again when another has left. When memory runs out for those that run, one of them waits as well, and nobody is
    admitted until another has left.
    """

    def __init__(self, runner: Runner[S], schedule: Schedule[S], tally: Tally, lock: threading.Condition) -> None:
        """Begin with nobody running. The lock guards the schedule and the tally: others add to the one, and look at
        both. What runs is changed by this loop alone, which reads it without the lock."""
        self._runner = runner
        self._schedule = schedule
        self._tally = tally
        self._lock = lock
        # Both until a request leaves:
        self._has_room = True  # False when those that run need more memory than there is
        self._refused: Job[S] | None = None  # the request that was next, and did not fit

    def step(self) -> None:
        """Let in who can be let in, read a piece of prompt, make a token for everybody else.

        What fails in it ends the requests that it was about; whatever else goes wrong is raised, and ends the loop.
        """
        self._drop_ended()
        self._admit()
        self._look_at_memory()
        self._prefill()
        self._drop_ended()
        self._deliver(self._decode())

    def _drop_ended(self) -> None:
        """End what is late, in whatever phase, and let go of what has ended while it ran."""
        with self._lock:
            late = self._schedule.late(time.monotonic())
        for generation in late:
            generation.expire()
        for job in [job for job in self._schedule.running if job.generation.is_ended]:
            self._leave(job)

    def _admit(self) -> None:
        """Let requests run whose turn it is, for as long as there are slots and memory."""
        while (job := self._next()) is not None:
            sequence = job.sequence or self._open(job)
            if sequence is None:
                continue
            if self._runner.admit(sequence):
                self._enter(job, sequence)
            elif self._schedule.running:
                self._refused = job
            else:
                self._fail([job], out_of_memory(job))

    def _open(self, job: Job[S]) -> S | None:
        try:
            job.sequence = self._runner.open(job.request)
        except Exception as error:
            self._fail([job], error)
        return job.sequence

    def _next(self) -> Job[S] | None:
        """The request to admit now, if there may be room; another one gives its slot to it if that is fair."""
        with self._lock:
            job = self._schedule.next()
        can_try = self._has_room and job is not self._refused and len(self._schedule.running) < self._runner.slots
        if job is None or can_try:
            return job
        other = self._schedule.gives_way_to(job)
        if other is None:
            return None
        self._pause(other)
        return job

    def _enter(self, job: Job[S], sequence: S) -> None:
        with self._lock:
            is_running = self._schedule.enter(job, sequence)
        if not is_running:  # cancelled in the meantime
            self._runner.release(sequence)
        elif job.generation.timings.admitted is None:
            job.generation.timings.admitted = time.monotonic()

    def _pause(self, job: Job[S]) -> None:
        self._runner.release(self._schedule.running[job])
        with self._lock:
            self._tally.preemptions += 1
            self._schedule.pause(job)

    def _leave(self, job: Job[S]) -> None:
        if job in self._schedule.running:
            self._runner.release(self._schedule.running[job])
            self._look_at_memory()
        with self._lock:
            self._schedule.leave(job)
        self._has_room, self._refused = True, None

    def _look_at_memory(self) -> None:
        memory_use = self._runner.memory_use
        with self._lock:
            self._tally.memory_use = memory_use

    def _prefill(self) -> None:
        """Read a piece of one long prompt, or of several short ones. They take turns."""
        budget = self._runner.prefill_budget
        while (reading := self._next_to_read(budget)) is not None:
            job, sequence = reading
            budget -= sequence.num_to_read
            try:
                self._runner.prefill(sequence)
            except Exception as error:
                self._fail([job], error)

    def _next_to_read(self, budget: int) -> tuple[Job[S], S] | None:
        with self._lock:
            return self._schedule.next_to_read(budget)

    def _decode(self) -> list[tuple[Job[S], Token | LLMError]]:
        """Make one token for each whose prompt is read."""
        batch = self._grow()
        if not batch:
            return []
        try:
            tokens = self._runner.decode([self._schedule.running[job] for job in batch])
        except Exception as error:
            self._fail(batch, error)
            return []
        return list(zip(batch, tokens, strict=True))

    def _grow(self) -> list[Job[S]]:
        """Those whose prompt is read, with room for one token more each; if there is too little, fewer run on."""
        running = self._schedule.running
        batch = [job for job, sequence in running.items() if not sequence.num_to_read]
        for job in batch:
            while job in running and not self._runner.grow(running[job]):
                other = self._schedule.gives_way()
                if other is None:
                    self._fail([job], out_of_memory(job))
                else:
                    self._pause(other)
                    self._has_room = False
        return [job for job in batch if job in running]

    def _deliver(self, made: list[tuple[Job[S], Token | LLMError]]) -> None:
        """Hand over what a step made; those that it finished are released first, so that health is true by then."""
        chunks: list[tuple[Job[S], Chunk]] = []
        failures: list[tuple[Job[S], LLMError]] = []
        for job, token in made:
            if isinstance(token, LLMError):
                failures.append((job, token))
                continue
            try:
                chunks.append((job, job.take(token, num_cached=self._schedule.running[job].num_cached)))
            except LLMError as error:  # its tokens cannot be decoded
                failures.append((job, error))
        try:
            for job, chunk in chunks:
                if job.num_tokens == 1:
                    self._count_prompt(job)
                if chunk.finish_reason is not None:
                    self._finish(job)
        finally:
            deliver((job.generation, chunk) for job, chunk in chunks)
        for job, failure in failures:
            self._fail([job], failure)

    def _count_prompt(self, job: Job[S]) -> None:
        with self._lock:
            self._tally.prompt_tokens += len(job.request.prompt)
            self._tally.cached_tokens += self._schedule.running[job].num_cached

    def _finish(self, job: Job[S]) -> None:
        """A request came to its own end, so the engine is well."""
        self._leave(job)
        with self._lock:
            self._tally.trouble = None
            self._tally.failures = 0

    def _fail(self, jobs: list[Job[S]], error: Exception) -> None:
        """End requests because of an error in a step of theirs, unless it is the end of all."""
        if isinstance(error, EngineDead):
            raise error
        names = [job.request.trace_id for job in jobs]
        about = {"request_id": names[0]} if len(names) == 1 else None
        log.error("Failed: request %s", ", ".join(names), exc_info=error, extra=about)
        failure = error
        if not isinstance(failure, LLMError):
            failure = GenerationFailed(f"generation failed: {type(error).__name__}")
        # Whoever keeps the error must not keep the step's frames, and with them its tensors.
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        try:
            for job in jobs:
                self._leave(job)
            with self._lock:
                self._tally.trouble = str(failure)
        finally:
            for job in jobs:
                job.generation.fail(failure)


def out_of_memory(job: Job[S]) -> OutOfDeviceMemory:
    """A request that would not even fit alone."""
    num_tokens = len(job.request.prompt) + job.num_tokens
    return OutOfDeviceMemory(f"the device has no room for the {num_tokens} tokens of this request")
