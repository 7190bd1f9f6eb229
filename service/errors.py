"""Errors as callers see them: their status, and one JSON shape. Knows no application.

{"error": {"type": …, "message": …, "field": …, "request_id": …}}
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from langchain_core.exceptions import ContextOverflowError, OutputParserException
from langchain_core.tools import ToolException
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from chains import errors as chain_errors
from llm import errors as llm_errors

NO_HEADERS: Mapping[str, str] = {}


class Refusal(Exception):
    """A request that is not served. `field` is where in the request the trouble is."""

    def __init__(
        self, status: int, kind: str, message: str, *, field: str | None = None, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        super().__init__(message)
        self.problem = Problem(status, kind, message, field, headers)


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


MAX_MESSAGE = 1_000
MAX_NAME = 100
"""Characters: what a caller sent is not sent back to it at full length."""

SOON = {"Retry-After": "5"}

PROBLEMS: Sequence[tuple[type[Exception], int, str, Mapping[str, str]]] = (
    (chain_errors.TooLarge, 413, "input_too_large", {}),
    (chain_errors.UnreadableFile, 422, "unreadable_file", {}),
    (chain_errors.InputError, 422, "invalid_input", {}),
    (llm_errors.InvalidOption, 422, "invalid_option", {}),
    (llm_errors.InvalidMessage, 422, "invalid_message", {}),
    (ContextOverflowError, 422, "context_overflow", {}),
    (llm_errors.EngineLoading, 503, "loading", SOON),
    (llm_errors.EngineDead, 503, "engine_dead", {}),
    (llm_errors.ShuttingDown, 503, "shutting_down", SOON),
    (llm_errors.OutOfDeviceMemory, 503, "out_of_device_memory", SOON),
    (llm_errors.EngineRestarted, 503, "engine_restarted", SOON),
    (llm_errors.DeadlineExceeded, 504, "deadline_exceeded", {}),
    (llm_errors.GenerationFailed, 500, "generation_failed", {}),
)
"""Errors of chains and the model, their status and type; the first that fits. Their messages are meant for callers."""

ERROR_STATUSES = {status for status in HTTPStatus if status >= 400}
"""A chain's own HTTPException may have any number for a status, or one that is no error."""

INTERNAL = Problem(
    500, "internal_error", "something went wrong in the service; its log says what, under this request_id"
)


class NotSerializable(Exception):
    """An output, or a part of a log of runs, that JSON has no form for."""


CHAIN_FAILURES: Sequence[tuple[type[BaseException], int, str, str]] = (
    (OutputParserException, 502, "output_parser_failed", "the chain {chain} could not parse the model's answer"),
    (ToolException, 502, "tool_failed", "a tool of the chain {chain} failed"),
    (NotSerializable, 500, "not_serializable", "an output of the chain {chain}, or of a step of it, has no JSON form"),
    (BaseException, 500, "chain_failed", "the chain {chain} failed with {error}"),
)
"""Failures of a chain's own steps: their status, type and message; the first that fits."""

WRONG_OUTPUT = Problem(
    500,
    "invalid_output",
    "the output of the chain is not of its output type; the service's log says where, under this request_id",
)
LANGSERVE_RESPONSES = ("InvokeResponse", "BatchResponse")
"""Ends of the names of LangServe's models of responses. It puts a chain's output into one, without a check before."""


class ChainFailed(Exception):
    """A step of a chain has raised an error that is none of the model's, of an input, or of the service."""

    def __init__(self, chain: str, error: BaseException) -> None:
        """Describe a failure by its type alone: its message may quote the model, or a caller.

        Args:
            chain: Its name.
            error: What was raised.
        """
        error = only(error)
        status, kind, message = next(row[1:] for row in CHAIN_FAILURES if isinstance(error, row[0]))
        said = message.format(chain=chain, error=type(error).__name__)
        super().__init__(said)
        self.problem = Problem(status, kind, f"{said}; the service's log says where, under this request_id")


def describe(error: BaseException) -> Problem:
    """How callers see an error. Of those that nobody foresaw they see no detail."""
    error = only(error)
    if isinstance(error, Refusal | ChainFailed):
        return error.problem
    if isinstance(error, RequestValidationError):
        return _describe_validation(error)
    if isinstance(error, HTTPException) and error.status_code in ERROR_STATUSES:
        kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return Problem(error.status_code, kind, str(error.detail), headers=error.headers or {})
    if isinstance(error, ValidationError) and error.title.endswith(LANGSERVE_RESPONSES):
        return WRONG_OUTPUT
    for kind_of_error, status, kind, headers in PROBLEMS:
        if isinstance(error, kind_of_error):
            return Problem(status, kind, str(error), getattr(error, "field", None), headers)
    return INTERNAL


def only(error: BaseException) -> BaseException:
    """The error itself, of a group of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _describe_validation(error: RequestValidationError) -> Problem:
    problems = [problem for problem in error.errors() if isinstance(problem, dict)]
    if not problems:
        return Problem(422, "invalid_request", "the request is not valid")
    return Problem(422, "invalid_request", problems[0]["msg"], location(problems[0]["loc"]))


def location(parts: Sequence[str | int]) -> str:
    """Where in a request something is, as people write it: `input.messages[2].content`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:MAX_NAME]}" for part in parts).lstrip(".")
