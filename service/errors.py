"""Errors as callers see them: one JSON shape, and an event of the same content where a stream has begun.

{"error": {"type": …, "message": …, "field": …, "request_id": …}}
"""

import asyncio
import dataclasses
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from langchain_core.exceptions import ContextOverflowError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm import errors as llm_errors

log = logging.getLogger(__name__)


class Refusal(Exception):
    """A request that is not served. `field` is where in the request the trouble is."""

    def __init__(self, status: int, kind: str, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(status, kind, message, field)


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as callers see it."""

    status: int
    kind: str
    message: str
    field: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON of it."""
        message = self.message if len(self.message) <= MAX_MESSAGE else f"{self.message[:MAX_MESSAGE]}…"
        error = {"type": self.kind, "message": message, "field": self.field, "request_id": request_id}
        return {"error": {key: value for key, value in error.items() if value is not None}}


BREAK_OFF_DELAY_S = 0.1
"""A browser that sees a connection break throws away what it has received and not yet read, the error event too."""

MAX_MESSAGE = 1_000
MAX_NAME = 100
"""Characters: what a caller sent is not sent back to it at full length."""

SOON = {"Retry-After": "5"}

LLM_PROBLEMS: Sequence[tuple[type[Exception], int, str, Mapping[str, str]]] = (
    (llm_errors.InvalidOption, 422, "invalid_option", {}),
    (llm_errors.InvalidMessage, 422, "invalid_message", {}),
    (ContextOverflowError, 422, "context_overflow", {}),
    (llm_errors.EngineLoading, 503, "loading", SOON),
    (llm_errors.EngineDead, 503, "engine_dead", {}),
    (llm_errors.QueueFull, 503, "queue_full", SOON),
    (llm_errors.OutOfDeviceMemory, 503, "out_of_device_memory", SOON),
    (llm_errors.EngineRestarted, 503, "engine_restarted", SOON),
    (llm_errors.DeadlineExceeded, 504, "deadline_exceeded", {}),
    (llm_errors.GenerationFailed, 500, "generation_failed", {}),
)
"""Errors of the model, their status and type; the first that fits. Their messages are meant for callers."""

INTERNAL = Problem(
    500, "internal_error", "something went wrong in the service; its log says what, under this request_id"
)


def describe(error: BaseException) -> Problem:
    """How callers see an error. Of those that nobody foresaw they see no detail."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Refusal):
        return error.problem
    if isinstance(error, RequestValidationError):
        return _describe_validation(error)
    if isinstance(error, HTTPException):
        kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return Problem(error.status_code, kind, str(error.detail), headers=error.headers or {})
    for kind_of_error, status, kind, headers in LLM_PROBLEMS:
        if isinstance(error, kind_of_error):
            return Problem(status, kind, str(error), getattr(error, "field", None), headers)
    return INTERNAL


def _describe_validation(error: RequestValidationError) -> Problem:
    problems = [problem for problem in error.errors() if isinstance(problem, dict)]
    if not problems:
        return Problem(422, "invalid_request", "the request is not valid")
    return Problem(422, "invalid_request", problems[0]["msg"], location(problems[0]["loc"]))


def location(parts: Sequence[str | int]) -> str:
    """Where in a request something is, as people write it: `input.messages[2].content`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:MAX_NAME]}" for part in parts).lstrip(".")


async def answer_error(request: Request, error: Exception) -> Response:
    """FastAPI's exception handler for errors that have a status of their own."""
    problem = describe(error)
    return JSONResponse(problem.body(request.state.request_id), problem.status, problem.headers)


class ErrorBoundary:
    """Around the whole application: gives each request an id, and turns whatever escapes into the one shape above.

    In a stream the status is out already. LangServe then sends an error event without content and lets the exception
    go on; that event is held back here, and one that says what happened is sent instead. The connection is broken off
    after it, since LangServe's playgrounds notice a failure only by that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        is_started = False

        async def forward(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            elif is_error_event(message):
                return
            await send(message)

        try:
            await self.app(scope, receive, forward)
        except Exception as error:
            problem = describe(error)
            if problem is INTERNAL:
                log.exception("Request %s failed", request_id)
            else:
                log.warning("Request %s failed: %s", request_id, problem.message)
            if is_started:
                await send({"type": "http.response.body", "body": error_event(problem, request_id), "more_body": True})
                await asyncio.sleep(BREAK_OFF_DELAY_S)
                return
            headers = {**problem.headers, "Connection": "close", "X-Request-ID": request_id}
            response = JSONResponse(problem.body(request_id), problem.status, headers)
            await response(scope, receive, send)


def is_error_event(message: Message) -> bool:
    """True for LangServe's error event: sse-starlette sends each event as one body message."""
    return bool(message.get("body", b"").startswith(b"event: error\r\n"))


def error_event(problem: Problem, request_id: str) -> bytes:
    """A stream's last event. `status_code` and `message` are what LangServe's own clients read."""
    content = {**problem.body(request_id), "status_code": problem.status, "message": problem.message}
    return b"event: error\r\ndata: " + json.dumps(content).encode() + b"\r\n\r\n"
