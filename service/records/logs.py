"""How the service logs: lines for people, or JSON; each with the id of the request that it is about.

One line tells of each request: who, what, how long, how many tokens. No text of a caller's is in it, unless asked for.
"""

import logging
import time
from typing import Any, Literal, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from service.records.record import Record, current_record
from service.records.redaction import OURS, RedactingHandler, redact, redact_stderr

log = logging.getLogger("service.requests")

QUIET_PATHS = ("/health", "/ready", "/metrics")
"""What is asked every few seconds, and says nothing."""


def start_logging(level: str, kind: Literal["human", "json"], *, has_texts: bool = False) -> None:
    """Log to standard error from now on.

    Args:
        level: Of this program's own loggers; those of libraries log no more than `info`.
        kind: Lines for people, or JSON.
        has_texts: Whether user text may be in it; if not, exceptions and libraries' lines lose their messages.
    """
    handler = log_handler(kind, has_texts=has_texts)
    logging.basicConfig(level=max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]), handlers=[handler])
    if not has_texts:
        redact_stderr()
    for ours in OURS:  # libraries would log what is streamed
        logging.getLogger(ours).setLevel(level.upper())
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def log_handler(
    kind: Literal["human", "json"], stream: TextIO | None = None, *, has_texts: bool = False
) -> logging.Handler:
    """Writes to a stream; None: standard error."""
    handler = logging.StreamHandler(stream) if has_texts else RedactingHandler(stream)
    handler.addFilter(_name_request)
    if not has_texts:
        handler.addFilter(redact)
    handler.setFormatter(HumanFormatter() if kind == "human" else json_formatter())
    return handler


def _is_news(entry: logging.LogRecord) -> bool:
    """Uvicorn tells that a stream was broken off: that was on purpose, and the request's own line says why."""
    return entry.msg != "ASGI callable returned without completing response."


def _name_request(entry: logging.LogRecord) -> bool:
    """Every line says which request it is about, whoever writes it."""
    record = current_record.get()
    if record is not None and not hasattr(entry, "request_id"):
        entry.request_id = record.id
    return True


class HumanFormatter(logging.Formatter):
    """Lines for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's own name
        line = super().formatMessage(record)
        request_id = getattr(record, "request_id", None)
        return line if request_id is None else f"{line} [{request_id}]"


def json_formatter() -> logging.Formatter:
    """One JSON object a line."""
    return OrjsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "traceback"},
        timestamp="time",
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
    )


def log_request(record: Record) -> None:
    """Write the line of a request that has ended."""
    told = _told(record)
    level = logging.INFO
    if record.path in QUIET_PATHS:
        level = logging.DEBUG
    elif record.problem is not None and record.problem.status >= 500:
        level = logging.WARNING
    log.log(level, _sentence(record), extra=told)


def _told(record: Record) -> dict[str, Any]:
    """The fields of the line, less those that say nothing. Times are seconds."""
    told = {
        "request_id": record.id,
        "method": record.method,
        "path": record.path,
        "client": record.client,
        "chain": record.chain,
        "endpoint": record.endpoint,
        "key": record.key,
        "status": record.status,
        "error": None if record.problem is None else record.problem.kind,
        "gone": not record.is_whole,
        "duration_s": round(time.monotonic() - record.started, 4),
        "queue_s": None if record.queue_s is None else round(record.queue_s, 4),
        "first_token_s": None if record.first_token_s is None else round(record.first_token_s, 4),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reasons": dict(record.finish_reasons),
        "request_text": record.request_text,
        "answer_text": record.answer_text,
    }
    return {name: value for name, value in told.items() if value or isinstance(value, float) or name == "status"}


def _sentence(record: Record) -> str:
    parts = [f"{record.method} {record.path} {record.status} after {time.monotonic() - record.started:.3f} s"]
    if record.key:
        parts.append(f"key {record.key}")
    if record.completion_tokens:
        parts.append(f"{record.prompt_tokens} + {record.completion_tokens} tokens")
    if record.first_token_s is not None:
        parts.append(f"the first after {record.first_token_s:.3f} s")
    if record.problem is not None:
        parts.append(record.problem.kind)
    elif not record.is_whole:
        parts.append("the client went away")
    if record.request_text is not None:
        parts.append(f"got {record.request_text!r}, answered {record.answer_text!r}")
    return ", ".join(parts)
