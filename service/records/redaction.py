"""Keeps user text out of the log: exceptions without their messages, lines of libraries without their arguments.

The message of an exception may quote a prompt, an answer or an input: LangChain's parsers, pydantic and json all do.
So does what libraries log and warn of. What is left says as much as can be said without: types, files and lines.
"""

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from logging import LogRecord
from types import TracebackType
from typing import TextIO

from llm import errors as llm_errors

OURS = ("serve", "service", "llm")
"""Loggers of this program: their messages hold no user text."""

TRUSTED = (*OURS, "uvicorn")
"""And of the server, which sees no texts but in the tracebacks that it makes messages of."""

ASYNCIO_MESSAGES = (
    "Task exception was never retrieved",
    "Future exception was never retrieved",
    "Task was destroyed but it is pending!",
    "Unhandled exception in event loop",
    "Exception in callback",
    "an error occurred during closing of asynchronous generator",
)
"""How asyncio's own messages begin. Reprs of tasks and arguments follow."""

SAFE = (llm_errors.ModelError, llm_errors.EngineError)
"""Exceptions whose messages are ours and contain no user text."""

MAX_ERRORS = 20
"""Exceptions of one chain of causes, or group, that are written."""

PLAIN = frozenset(LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}
"""What every log record has."""

log = logging.getLogger("service.log")


def redact(entry: LogRecord) -> bool:
    """Take out of a log record what may hold user text. A filter for `logging`."""
    if entry.exc_info:
        error = entry.exc_info[1]
        entry.exc_text = None if error is None else traceback_of(error)
        entry.exc_info = None
    entry.stack_info = None
    is_traceback = isinstance(entry.msg, str) and entry.msg.startswith("Traceback")
    if entry.name.split(".")[0] not in TRUSTED or is_traceback:
        entry.msg, entry.args = _message(entry), ()
        for name in entry.__dict__.keys() - PLAIN - {"request_id"}:
            delattr(entry, name)
    return True


def _message(entry: LogRecord) -> str:
    """A library's message without what it is about. Without arguments it was put together before."""
    where = f"{os.path.basename(entry.pathname)}:{entry.lineno}"
    if entry.name == "asyncio":
        said = str(entry.msg).casefold()
        known = next((known for known in ASYNCIO_MESSAGES if said.startswith(known.casefold())), None)
        return f"{known or 'a message was left out'} ({where})"
    if entry.args and isinstance(entry.msg, str) and "%" in entry.msg:
        return f"{entry.msg} ({where}; arguments left out, SERVE_LOG_TEXTS)"
    return f"a message of {entry.name} was left out ({where}, SERVE_LOG_TEXTS)"


def traceback_of(error: BaseException) -> str:
    """The traceback of an exception and its causes: types, files and lines, and no messages but safe ones."""
    return "\n".join(_lines(error, set()))


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen and len(seen) < MAX_ERRORS:
        yield from _lines(before, seen)
        how = "The above exception was the direct cause of the following exception:"
        yield f"\n{how if error.__cause__ else 'During handling of the above exception, another exception occurred:'}\n"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):"
        yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield _name(error)
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            if id(each) not in seen and len(seen) < MAX_ERRORS:
                yield from (f"  | {line}" for part in _lines(each, seen) for line in part.split("\n"))


def _name(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(error, SAFE):
        with suppress(Exception):  # a subclass from another package may raise here
            return f"{name}: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name}: [Errno {error.errno}] {os.strerror(error.errno)}"
    return name


class RedactingHandler(logging.StreamHandler[TextIO]):
    """Writes to a stream; a record that cannot be formatted is reported without its arguments."""

    def handleError(self, record: LogRecord) -> None:  # logging's own name
        """Report what `logging` would, less the message and its arguments."""
        error = sys.exc_info()[1]
        where = f"{record.pathname}:{record.lineno}"
        if error is not None and sys.stderr is not None:
            sys.stderr.write(f"A log message of {where} could not be written: {_name(error)}\n")


def redact_stderr() -> None:
    """Send to the log what Python would write to standard error: warnings, and uncaught exceptions."""

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        log.warning("%s at %s:%d; its message is left out (SERVE_LOG_TEXTS)", category.__name__, filename, lineno)

    def thread_failed(arguments: threading.ExceptHookArgs) -> None:
        name = arguments.thread.name if arguments.thread else "unknown"
        if arguments.exc_type is not SystemExit:
            log.error("The thread %s has failed", name, exc_info=arguments.exc_value)

    def unraisable(arguments: "sys.UnraisableHookArgs") -> None:
        log.error("Exception ignored in %s", _owner(arguments.object), exc_info=arguments.exc_value)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("The program has failed", exc_info=error)

    warnings.showwarning = show_warning
    threading.excepthook = thread_failed
    sys.unraisablehook = unraisable
    sys.excepthook = uncaught


def _owner(where: object) -> str:
    """Whose finaliser it was: a function's name, or a type's. Never a repr, which may hold a text."""
    return str(getattr(where, "__qualname__", None) or type(where).__qualname__)
