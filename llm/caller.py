"""On whose behalf the current code runs: set by the service per HTTP request, read by the adapters."""

import threading
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from llm.errors import LLMError
from llm.generation import Generation, Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a generation."""

    prompt_tokens: int
    """Of the whole prompt, even if it was never read: see `timings.admitted`."""
    cached_tokens: int
    """How many of these did not have to be computed. 0 as well if it did not come to its own end."""
    completion_tokens: int
    finish_reason: str
    """A `FinishReason`, or "error"."""
    error: LLMError | None
    timings: Timings


class Caller:
    """One HTTP request, however many generations it submits. When it ends, so do they.

    Generations are cancelled by whoever reads them, too; but a reader that is itself cancelled may not come to it in
    time, and one whose neighbour in a batch has failed is not told at all.
    """

    def __init__(
        self,
        *,
        trace_id: str = "",
        owner: str = "",
        deadline: float | None = None,
        max_output_tokens: int | None = None,
        on_ended: Callable[[Report], None] | None = None,
    ) -> None:
        """Begin.

        Args:
            trace_id: Its name in logs. Callers may choose it, so nothing goes by it.
            owner: Whose prompts may share computed prefixes: the name of an API key; "" for everybody without one.
            deadline: `time.monotonic()` seconds after which everything that it submitted ends.
            max_output_tokens: Tokens of each answer at most, whatever is asked for.
            on_ended: Told once of each generation, some time after it has ended: before `end` returns, or if it is
                adopted later than that, at once. In whatever thread submits or ends, but never in two at a time.
        """
        self.id = uuid.uuid4().hex
        self.trace_id = trace_id or self.id
        self.owner = owner
        self.deadline = deadline
        self.max_output_tokens = max_output_tokens
        self._on_ended = on_ended
        self._lock = threading.RLock()  # held while reports are made: when `end` returns, there are none on their way
        self._generations: list[Generation] = []  # not yet reported
        self._is_ended = False
        self._error: LLMError | None = None

    def adopt(self, generation: Generation) -> None:
        """Let a generation end with this caller."""
        running: list[Generation] = []
        ended: list[Generation] = []
        with self._lock:
            for each in (*self._generations, generation):
                (ended if each.is_ended or self._is_ended else running).append(each)
            self._generations = running
            self._finish(ended)

    def end(self, error: LLMError | None = None) -> None:
        """End whatever still runs or waits, and what is yet to be adopted: cancel it, or abort it with an error.

        Harmless when ended; the first time counts.
        """
        with self._lock:
            if not self._is_ended:
                self._is_ended, self._error = True, error
            generations, self._generations = self._generations, []
            self._finish(generations)

    def _finish(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            if self._error is None:
                generation.cancel()
            else:
                generation.abort(self._error)
        if self._on_ended is not None:
            for generation in generations:
                self._on_ended(_report(generation))


def _report(generation: Generation) -> Report:
    usage = generation.usage
    assert usage is not None, "a generation that has not ended"
    return Report(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        finish_reason=str(generation.finish_reason or "error"),
        error=generation.error,
        timings=generation.timings,
    )


current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)
