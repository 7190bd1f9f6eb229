"""On whose behalf the current code runs: set by the service per HTTP request, read by the adapters."""

import threading
import uuid
from contextvars import ContextVar

from llm.generation import Generation


class Caller:
    """One HTTP request, however many generations it submits. When it ends, so do they.

    Generations are cancelled by whoever reads them, too; but a reader that is itself cancelled may not come to it in
    time, and one whose neighbour in a batch has failed is not told at all.
    """

    def __init__(self, *, id: str | None = None, owner: str = "", deadline: float | None = None) -> None:  # noqa: A002
        """Begin.

        Args:
            id: Its name in logs; a new one if not given.
            owner: Whose prompts may share computed prefixes: the name of an API key; "" for everybody without one.
            deadline: `time.monotonic()` seconds after which everything that it submitted ends.
        """
        self.id = id or uuid.uuid4().hex
        self.owner = owner
        self.deadline = deadline
        self._lock = threading.Lock()
        self._generations: set[Generation] = set()
        self._is_ended = False

    def adopt(self, generation: Generation) -> None:
        """Let a generation end with this caller."""
        with self._lock:
            self._generations = {other for other in self._generations if not other.is_ended} | {generation}
            is_ended = self._is_ended
        if is_ended:
            generation.cancel()

    def end(self) -> None:
        """Cancel whatever still runs or waits."""
        with self._lock:
            self._is_ended = True
            generations, self._generations = self._generations, set()
        for generation in generations:
            generation.cancel()


current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)
