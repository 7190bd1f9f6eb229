"""An engine that serves many requests together: how it loads, takes requests, breaks, starts again and ends.

What makes the tokens is a `Runner`: it is opened and run in the engine's own thread and nowhere else. See `Loop` for
what is done there.
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
from llm.errors import EngineDead, EngineLoading, EngineRestarted, LLMError
from llm.generation import Generation
from llm.job import Job
from llm.loop import Loop, Tally
from llm.runner import Runner, S
from llm.schedule import Schedule

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10
"""How long closing waits for the step, or at a program's end for the load, that is in progress."""

MAX_RESTARTS = 3
"""How often the loop starts again after it failed, without a request being finished in between."""


class BatchingEngine(Generic[S]):
    """Takes requests from any thread, and serves them together in one thread of its own."""

    def __init__(self, name: str, open_runner: Callable[[], Runner[S]]) -> None:
        """Return at once; the model loads in the background.

        Args:
            name: The model reference.
            open_runner: Loads the model. Called once, in the engine's thread.
        """
        self._name = name
        self._open_runner = open_runner
        # Guards everything below, and the loop's access to it. No runner and no generation is called with it held: the
        # one takes its time, the other has a lock of its own.
        self._changed = threading.Condition()
        self._schedule: Schedule[S] = Schedule()
        self._tally = Tally()
        self._numbers = count()
        self._checkpoint: Checkpoint | None = None
        self._slots = 0
        self._restarts = 0
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
        generation = Generation(self._forget, deadline=request.deadline, prompt_tokens=len(request.prompt))
        job: Job[S] = Job(request, self.checkpoint, generation, next(self._numbers))
        with self._changed:
            self._loaded()  # still
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
                slots=self._slots,
                context=0 if self._checkpoint is None else self._checkpoint.context,
                prompt_tokens=self._tally.prompt_tokens,
                cached_tokens=self._tally.cached_tokens,
                memory_use=self._tally.memory_use,
                preemptions=self._tally.preemptions,
                restarts=self._restarts,
                error=self._tally.trouble if self._death is None else str(self._death),
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

    def _state(self) -> EngineState:
        if self._death is not None:
            return EngineState.DEAD
        if self._checkpoint is None:
            return EngineState.LOADING
        return EngineState.READY if self._tally.trouble is None else EngineState.DEGRADED

    def _forget(self, generation: Generation) -> None:
        """A cancelled request leaves the queue at once; if it runs, after the step that it is in."""
        with self._changed:
            self._schedule.forget(generation)

    # The engine's thread.

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
            death = EngineDead(type(error).__name__)  # callers see it; what it says is for the log
            log.exception("The engine has stopped")
        finally:
            _drop_frames(death)
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

    def _serve(self, runner: Runner[S]) -> None:
        loop = Loop(runner, self._schedule, self._tally, self._changed)
        while self._has_work():
            loop.step()

    def _has_work(self) -> bool:
        """Wait until there is some. False when the engine is to close."""
        with self._changed:
            self._changed.wait_for(lambda: self._schedule.has_work or self._is_closing)
            return not self._is_closing

    def _restart(self, runner: Runner[S], error: Exception) -> None:
        """After a failure outside of a step nobody knows what state things are in: begin anew, with the same weights.

        Raises the error if that cannot help, or did not help before.
        """
        if isinstance(error, EngineDead) or self._tally.failures == MAX_RESTARTS:
            raise error
        log.error("The engine has failed and starts again", exc_info=error)
        failure = EngineRestarted(f"the engine failed and starts again: {type(error).__name__}")
        with self._changed:
            self._tally.failures += 1
            self._restarts += 1
            self._tally.trouble = str(failure)
            self._tally.memory_use = 0.0
            generations = self._schedule.clear()
        for generation in generations:
            generation.fail(failure)
        runner.reset()

    def _die(self, death: LLMError) -> None:
        with self._changed:
            self._death = death
            self._checkpoint, self._slots = None, 0
            self._tally.memory_use = 0.0
            generations = self._schedule.clear()
            self._changed.notify_all()
        atexit.unregister(self._end_with_the_program)
        for generation in generations:
            generation.fail(EngineDead(f"the engine has stopped: {death}"))


def _drop_frames(error: BaseException) -> None:
    """Let an error, and what caused it, be kept without the frames it passed: their variables hold the weights."""
    chain, seen = [error], set()
    while chain:
        link = chain.pop()
        link.__traceback__ = None
        seen.add(link)
        chain += [cause for cause in (link.__cause__, link.__context__) if cause is not None and cause not in seen]
