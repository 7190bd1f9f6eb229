"""Server-sent events as the engines write them: LangServe's, and those of OpenAI-style servers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One event, and when its last byte came."""

    arrived_s: float
    name: str
    data: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What an event says of the answer."""

    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    is_last: bool = False
    error: str | None = None


def events(arrivals: Iterable[tuple[float, bytes]]) -> Iterator[Event]:
    """Put the events of a stream together from the pieces in which it came. One that was cut short is left out."""
    name, data = "message", list[str]()
    for arrived_s, line in _lines(arrivals):
        if not line:
            if data or name != "message":
                yield Event(arrived_s, name, "\n".join(data))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)


def _lines(arrivals: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    rest = b""
    for arrived_s, piece in arrivals:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield arrived_s, line.removesuffix(b"\r").decode()


def delta(event: Event) -> Delta:
    """Read an event of any of the engines."""
    if event.name == "error":
        return Delta(error=f"event: error {_message(event.data)}")
    if event.name == "end" or event.data == "[DONE]":
        return Delta(is_last=True)
    if event.name == "metadata":
        return Delta()
    content: Any = json.loads(event.data)
    match content:
        case str():
            return Delta(content)
        case {"error": error}:
            return Delta(error=f"error {_message(error)}")
        case {"choices": choices}:
            return _openai(choices, content.get("usage") or {})
        case {"content": str(text)}:
            usage = content.get("usage_metadata") or {}
            return Delta(text, usage.get("input_tokens"), usage.get("output_tokens"))
    raise ValueError(f"no engine is known to send {event.data[:100]!r}")


def _openai(choices: list[dict[str, Any]], usage: dict[str, Any]) -> Delta:
    choice = choices[0] if choices else {}
    text = (choice.get("delta") or {}).get("content") or ""
    # Some send their usage after the last choice, some with it, and not all close with [DONE].
    return Delta(
        text, usage.get("prompt_tokens"), usage.get("completion_tokens"), is_last=bool(choice.get("finish_reason"))
    )


def _message(error: object) -> str:
    return " ".join(str(error).split())[:200]
