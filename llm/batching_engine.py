"""An engine that serves many requests together, joining and leaving at every step. Knows threads and errors, no torch.

What makes the tokens is a `Runner`: it is opened and run in the engine's own thread and nowhere else.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Generic

from llm.checkpoint import Checkpoint
from llm.engine import EngineHealth, EngineState, Request
from llm.errors import (
    EngineDead,
    EngineLoading,
    EngineRestarted,
    GenerationFailed,
    LLMError,
    OutOfDeviceMemory,
    QueueFull,
)
from llm.generation import Generation, Token, deliver
from llm.job import Job
from llm.runner import Runner, S
from llm.schedule import Schedule

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10
"""How long closing waits for the step, or at a program's end for the load, that is in progress."""

MAX_RESTARTS = 3
"""How often the loop starts again after it failed, without a request being finished in between."""


class BatchingEngine(Generic[S]):
    """Takes requests from any thread, and serves them together in one thread of its own.

    See `Schedule` for who is next. A request that does not fit the memory is not overtaken by those behind it; it is
    tried again when another has left. When memory runs out for those that run, one of them waits as well, and nobody is
    admitted until another has left.
    """

    def __init__(self, name: str, open_runner: Callable[[], Runner[S]], *, max_queue: int | None) -> None:
        """Return at once; the model loads in the background.

        Args:
            name: The model reference.
            open_runner: Loads the model. Called once, in the engine's thread.
            max_queue: Requests that may wait for their first slot, when none is free; one more is refused with
                `QueueFull`. None: any number.
        """
        self._name = name
        self._open_runner = open_runner
        self._max_queue = max_queue
        # Changed by the engine's thread alone; both until a request leaves:
        self._has_room = True  # False when those that run need more memory than there is
        self._refused: Job[S] | None = None  # the request that was next, and did not fit
        # Guards everything below. What runs is changed by the engine's thread alone, which reads it without the lock.
        # No runner and no generation is called with it held: the one takes its time, the other has a lock of its own.
        self._changed = threading.Condition()
        self._schedule: Schedule[S] = Schedule()
        self._numbers = count()
        self._checkpoint: Checkpoint | None = None
        self._slots = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._restarts = 0
        self._failures = 0  # restarts since a request was last finished
        self._trouble: str | None = None
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
        generation = Generation(self._forget, deadline=request.deadline)
        job: Job[S] = Job(request, self.checkpoint, generation, next(self._numbers))
        with self._changed:
            self._loaded()  # still
            if self._is_full():
                raise QueueFull(self._schedule.num_new)
            self._schedule.add(job)
            self._changed.notify_all()
        return generation

    def health(self) -> EngineHealth:
        """A look at the engine."""
        with self._changed:
            return EngineHealth(
                state=self._state(),
                model=self._name,
                running=len(self._schedule.running),
                waiting=self._schedule.num_waiting,
                is_full=self._is_full(),
                slots=self._slots,
                context=0 if self._checkpoint is None else self._checkpoint.context,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                restarts=self._restarts,
                error=self._trouble if self._death is None else str(self._death),
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
        """Slots that are free, and that memory does not keep from being used, are not waited for."""
        if self._max_queue is None:
            return False
        refused = self._refused
        can_enter = self._has_room and (refused is None or refused.generation.is_ended)
        free = max(0, self._slots - len(self._schedule.running)) if can_enter else 0
        return self._schedule.num_new >= self._max_queue + free

    def _state(self) -> EngineState:
        if self._death is not None:
            return EngineState.DEAD
        if self._checkpoint is None:
            return EngineState.LOADING
        return EngineState.READY if self._trouble is None else EngineState.DEGRADED

    def _forget(self, generation: Generation) -> None:
        """A cancelled request leaves the queue at once; if it runs, after the step that it is in."""
        with self._changed:
            self._schedule.forget(generation)

    # The engine's thread: its life.

    def _run(self) -> None:
        runner: Runner[S] | None = None
        death: LLMError = EngineDead("it was closed")
        try:
            runner = self._load()
            while not self._is_closing:
                try:
                    self._serve(runner)
                except Exception as error:
                    self._restart(runner, error)
        except LLMError as error:
            death = error
            log.error("The engine has stopped: %s", error)
        except BaseException as error:
            death = EngineDead(f"{type(error).__name__}: {error}")
            log.exception("The engine has stopped")
        finally:
            self._die(death)
            if runner is not None:
                runner.close()

    def _load(self) -> Runner[S]:
        started = time.monotonic()
        runner = self._open_runner()
        with self._changed:
            self._checkpoint, self._slots = runner.checkpoint, runner.slots
            self._was_loaded = True
            self._changed.notify_all()
        log.info("The model %s is ready after %.1f s", self._name, time.monotonic() - started)
        return runner

    def _restart(self, runner: Runner[S], error: Exception) -> None:
        """After a failure outside of a step nobody knows what state things are in: begin anew, with the same weights.

        Raises the error if that cannot help, or did not help before.
        """
        if isinstance(error, EngineDead) or self._failures == MAX_RESTARTS:
            raise error
        log.error("The engine has failed and starts again", exc_info=error)
        failure = EngineRestarted(f"the engine failed and starts again: {type(error).__name__}")
        with self._changed:
            self._failures += 1
            self._restarts += 1
            self._trouble = str(failure)
            generations = self._schedule.clear()
        for generation in generations:
            generation.fail(failure)
        runner.reset()
        self._has_room, self._refused = True, None

    def _die(self, death: LLMError) -> None:
        with self._changed:
            self._death = death
            self._checkpoint, self._slots = None, 0
            generations = self._schedule.clear()
            self._changed.notify_all()
        atexit.unregister(self._end_with_the_program)
        for generation in generations:
            generation.fail(EngineDead(f"the engine has stopped: {death}"))

    # The engine's thread: its loop.

    def _serve(self, runner: Runner[S]) -> None:
        """Serve until closed. A step that fails ends the requests in it; whatever else goes wrong is raised."""
        while self._has_work():
            self._drop_ended(runner)
            self._admit(runner)
            self._prefill(runner)
            self._drop_ended(runner)
            self._deliver(runner, self._decode(runner))

    def _has_work(self) -> bool:
        """Wait until there is some. False when the engine is to close."""
        with self._changed:
            self._changed.wait_for(lambda: self._schedule.has_work or self._is_closing)
            return not self._is_closing

    def _drop_ended(self, runner: Runner[S]) -> None:
        """End what is late, in whatever phase, and let go of what has ended while it ran."""
        with self._changed:
            late = self._schedule.late(time.monotonic())
        for generation in late:
            generation.expire()
        for job in [job for job in self._schedule.running if job.generation.is_ended]:
            self._leave(runner, job)

    def _admit(self, runner: Runner[S]) -> None:
        """Let requests run whose turn it is, for as long as there are slots and memory."""
        while (job := self._next(runner)) is not None:
            sequence = job.sequence or self._open(runner, job)
            if sequence is None:
                continue
            if runner.admit(sequence):
                self._enter(runner, job, sequence)
            elif self._schedule.running:
                self._refused = job
            else:
                self._fail(runner, [job], out_of_memory(job))

    def _open(self, runner: Runner[S], job: Job[S]) -> S | None:
        try:
            job.sequence = runner.open(job.request)
        except Exception as error:
            self._fail(runner, [job], error)
        return job.sequence

    def _next(self, runner: Runner[S]) -> Job[S] | None:
        """The request to admit now, if there may be room; another one gives its slot to it if that is fair."""
        with self._changed:
            job = self._schedule.next()
        can_try = self._has_room and job is not self._refused and len(self._schedule.running) < runner.slots
        if job is None or can_try:
            return job
        other = self._schedule.gives_way_to(job)
        if other is None:
            return None
        self._pause(runner, other)
        return job

    def _enter(self, runner: Runner[S], job: Job[S], sequence: S) -> None:
        with self._changed:
            is_running = self._schedule.enter(job, sequence)
        if not is_running:  # cancelled in the meantime
            runner.release(sequence)
        elif job.generation.timings.admitted is None:
            job.generation.timings.admitted = time.monotonic()

    def _pause(self, runner: Runner[S], job: Job[S]) -> None:
        runner.release(self._schedule.running[job])
        with self._changed:
            self._schedule.pause(job)

    def _leave(self, runner: Runner[S], job: Job[S]) -> None:
        if job in self._schedule.running:
            runner.release(self._schedule.running[job])
        with self._changed:
            self._schedule.leave(job)
        self._has_room, self._refused = True, None

    def _prefill(self, runner: Runner[S]) -> None:
        """Read a piece of one long prompt, or of several short ones. They take turns."""
        budget = runner.prefill_budget
        while (reading := self._next_to_read(budget)) is not None:
            job, sequence = reading
            budget -= sequence.num_to_read
            try:
                runner.prefill(sequence)
            except Exception as error:
                self._fail(runner, [job], error)

    def _next_to_read(self, budget: int) -> tuple[Job[S], S] | None:
        with self._changed:
            return self._schedule.next_to_read(budget)

    def _decode(self, runner: Runner[S]) -> list[tuple[Job[S], Token | LLMError]]:
        """Make one token for each whose prompt is read."""
        batch = self._grow(runner)
        if not batch:
            return []
        try:
            tokens = runner.decode([self._schedule.running[job] for job in batch])
        except Exception as error:
            self._fail(runner, batch, error)
            return []
        return list(zip(batch, tokens, strict=True))

    def _grow(self, runner: Runner[S]) -> list[Job[S]]:
        """Those whose prompt is read, with room for one token more each; if there is too little, fewer run on."""
        running = self._schedule.running
        batch = [job for job, sequence in running.items() if not sequence.num_to_read]
        for job in batch:
            while job in running and not runner.grow(running[job]):
                other = self._schedule.gives_way()
                if other is None:
                    self._fail(runner, [job], out_of_memory(job))
                else:
                    self._pause(runner, other)
                    self._has_room = False
        return [job for job in batch if job in running]

    def _deliver(self, runner: Runner[S], made: list[tuple[Job[S], Token | LLMError]]) -> None:
        """Hand over what a step made; those that it finished are released first, so that health is true by then."""
        chunks = [
            (job, job.take(token, num_cached=self._schedule.running[job].num_cached))
            for job, token in made
            if not isinstance(token, LLMError)
        ]
        try:
            for job, chunk in chunks:
                if job.num_tokens == 1:
                    self._count_prompt(job)
                if chunk.finish_reason is not None:
                    self._finish(runner, job)
        finally:
            deliver((job.generation, chunk) for job, chunk in chunks)
        for job, token in made:
            if isinstance(token, LLMError):
                self._fail(runner, [job], token)

    def _count_prompt(self, job: Job[S]) -> None:
        with self._changed:
            self._prompt_tokens += len(job.request.prompt)
            self._cached_tokens += self._schedule.running[job].num_cached

    def _finish(self, runner: Runner[S], job: Job[S]) -> None:
        """A request came to its own end, so the engine is well."""
        self._leave(runner, job)
        with self._changed:
            self._trouble = None
            self._failures = 0

    def _fail(self, runner: Runner[S], jobs: list[Job[S]], error: Exception) -> None:
        """End requests because of an error in a step of theirs, unless it is the end of all."""
        if isinstance(error, EngineDead):
            raise error
        log.error("Failed: %s", ", ".join(f"request {job.request.trace_id}" for job in jobs), exc_info=error)
        failure = error
        if not isinstance(failure, LLMError):
            failure = GenerationFailed(f"generation failed: {type(error).__name__}")
        # Whoever keeps the error must not keep the step's frames, and with them its tensors.
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        try:
            for job in jobs:
                self._leave(runner, job)
            with self._changed:
                self._trouble = str(failure)
        finally:
            for job in jobs:
                job.generation.fail(failure)


def out_of_memory(job: Job[S]) -> OutOfDeviceMemory:
    """A request that would not even fit alone."""
    num_tokens = len(job.request.prompt) + job.num_tokens
    return OutOfDeviceMemory(f"the device has no room for the {num_tokens} tokens of this request")
