"""What is told of one request, in its log line and in the metrics. Knows texts only where they are asked for."""

import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import Scope

from llm.caller import Report
from service.errors import Problem

MAX_PATH = 200
"""Characters of a path in the log."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One request and what became of it. Times are seconds."""

    id: str
    method: str
    path: str
    """As it was sent, percent-encoded: there is no line end in it."""
    client: str
    key: str = ""
    """The name of the API key; "" without one."""
    chain: str = ""
    """"" where no chain was asked for, or nobody may know yet whether there is such a chain."""
    endpoint: str = ""
    status: int = 0
    """0: the client went away before anything was sent."""
    problem: Problem | None = None
    """What went wrong, if something did, before the first byte or after it."""
    is_whole: bool = False
    """True once the last byte of the answer was sent."""
    started: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    """Of generations that got a slot."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    """How its generations ended."""
    queue_s: float | None = None
    """The longest that one of its generations waited for a slot."""
    first_token_s: float | None = None
    """From its start to the first token of any."""
    request_text: str | None = None
    answer_text: str | None = None
    """What was sent both ways; None unless the log is to show it."""

    def add(self, report: Report) -> None:
        """Add up what its generations took."""
        self.prompt_tokens += 0 if report.timings.admitted is None else report.prompt_tokens
        self.cached_tokens += report.cached_tokens
        self.completion_tokens += report.completion_tokens
        self.finish_reasons[report.finish_reason] += 1
        timings = report.timings
        if timings.admitted is not None:
            self.queue_s = max(self.queue_s or 0.0, timings.admitted - timings.queued)
        if timings.first_token is not None:
            since_start = timings.first_token - self.started
            self.first_token_s = since_start if self.first_token_s is None else min(self.first_token_s, since_start)


current_record: ContextVar[Record | None] = ContextVar("current_record", default=None)
"""The request that the current code works for."""


def record_of(scope: Scope) -> Record:
    """The record of a request: the outermost layer has put it there."""
    record: Record = scope["state"]["record"]
    return record
