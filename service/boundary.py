"""Where errors leave the application: as a response of the one shape, or as the last event of a stream."""

import json
import logging

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import INTERNAL, WRONG_OUTPUT, ChainFailed, Problem, describe, only
from service.records.record import record_of

log = logging.getLogger(__name__)


async def answer_error(request: Request, error: Exception) -> Response:
    """FastAPI's exception handler for errors that have a status of their own."""
    problem = describe(error)
    record = record_of(request.scope)
    record.problem = problem
    return JSONResponse(problem.body(record.id), problem.status, problem.headers)


class ErrorBoundary:
    """Turns whatever escapes from the application into the one shape above.

    In a stream the status is out already. LangServe then sends an error event without content and lets the exception
    go on; that event is held back here, and one that says what happened is sent instead. The response ends after it:
    a browser that sees a connection break throws away what it has received and not yet read, the error event too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = record_of(scope)
        is_started = is_stream = is_complete = False

        async def forward(message: Message) -> None:
            nonlocal is_started, is_stream, is_complete
            if message["type"] == "http.response.start":
                is_started = True
                is_stream = Headers(scope=message).get("content-type", "").startswith("text/event-stream")
            elif is_error_event(message):
                return
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, forward)
        except Exception as error:
            problem = record.problem = describe(error)
            if problem is INTERNAL:
                log.exception("The request failed")
            elif problem is WRONG_OUTPUT:
                log.error("The request failed: %s", problem.kind, exc_info=error)
            elif isinstance(failure := only(error), ChainFailed):
                log.error("The request failed: %s", failure.problem.kind, exc_info=failure.__cause__)
            if is_stream and not is_complete:
                await send({"type": "http.response.body", "body": error_event(problem, record.id)})
            if is_started:
                return
            headers = {**problem.headers, **({"Connection": "close"} if problem.status == 500 else {})}
            response = JSONResponse(problem.body(record.id), problem.status, headers)
            await response(scope, receive, send)


def is_error_event(message: Message) -> bool:
    """True for LangServe's error event: sse-starlette sends each event as one body message."""
    return bool(message.get("body", b"").startswith(b"event: error\r\n"))


def error_event(problem: Problem, request_id: str) -> bytes:
    """A stream's last event. `status_code` and `message` are what LangServe's own clients read."""
    content = {**problem.body(request_id), "status_code": problem.status, "message": problem.message}
    return b"event: error\r\ndata: " + json.dumps(content).encode() + b"\r\n\r\n"
