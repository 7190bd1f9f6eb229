"""On whose behalf the current code runs: set by the service per HTTP request, read by the adapters."""

import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Caller:
    """One HTTP request, however many generations it submits."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    owner: str = ""
    """Whose prompts may share computed prefixes: the name of an API key; "" for everybody without one."""
    deadline: float | None = None
    """`time.monotonic()` seconds after which everything that the caller submitted ends."""


current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)
