"""A client that looks closely and leaves as clients do: one request per connection, over a bare socket.

It notes when what came, and whether the answer came whole. It parses nothing that it is not asked for: it runs on the
cores that the service needs. Knows HTTP/1.1, and server-sent events by their first bytes alone.
"""

import asyncio
import contextlib
import json
import socket
import struct
import time
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from random import Random
from typing import Any

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends RST."""

PIECE = 64 * 1024


def request(path: str, body: object = None, **headers: str) -> bytes:
    """An HTTP request as bytes: POST with a JSON body, or GET without one. Underscores in header names mean dashes."""
    content = b"" if body is None else json.dumps(body).encode()
    named = {"Host": "localhost", "Connection": "close", **{name.replace("_", "-"): headers[name] for name in headers}}
    if body is not None:
        named |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


class Manner(Enum):
    """How a client goes away."""

    FIN = "close"
    RST = "reset"
    HALF = "half-close"
    """It says that it sends no more, and stays to see what comes."""


class Moment(Enum):
    """When it goes."""

    SENDING = "before its request was sent whole"
    ASKED = "after it asked"
    FIRST = "after the first token"
    LATER = "some time after the first token"


@dataclass(frozen=True, slots=True)
class Departure:
    """A client's early leave."""

    moment: Moment
    manner: Manner
    share: float = 0.5
    """Of the request that is sent, when it leaves while sending."""
    after_s: float = 0.0
    go: asyncio.Event | None = None
    """What a client waits for that leaves after it asked, in place of `after_s`."""

    @classmethod
    def drawn(cls, chance: Random, *, within_s: float) -> "Departure":
        """Any of them."""
        return cls(
            chance.choice(list(Moment)), chance.choice(list(Manner)), chance.random(), chance.uniform(0, within_s)
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times are those of `time.perf_counter()`."""

    started_s: float
    ended_s: float
    raw: bytes = b""
    """All that came, head included."""
    first_byte_s: float | None = None
    first_token_s: float | None = None
    """When the first `event: data` came."""
    has_left: bool = False
    error: str | None = None
    """What went wrong with the connection, if that did."""

    @property
    def took_s(self) -> float:
        return self.ended_s - self.started_s

    @cached_property
    def status(self) -> int | None:
        """None: no status line came."""
        line = self.raw[: self.raw.find(b"\r\n")].split(b" ")
        return int(line[1]) if len(line) > 1 and line[0].startswith(b"HTTP/") else None

    @cached_property
    def headers(self) -> dict[str, str]:
        lines = self.raw.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @cached_property
    def body(self) -> bytes:
        """Without the marks of chunks."""
        content = self.raw.partition(b"\r\n\r\n")[2]
        if self.headers.get("transfer-encoding") != "chunked":
            return content
        pieces = []
        while content:
            size, _, content = content.partition(b"\r\n")
            length = int(size or b"0", 16)
            pieces.append(content[:length])
            content = content[length + 2 :]
        return b"".join(pieces)

    @cached_property
    def is_whole(self) -> bool:
        """True if HTTP says that all of it has come, and events that they have ended."""
        content = self.raw.partition(b"\r\n\r\n")[2]
        if "content-length" in self.headers:
            return len(content) == int(self.headers["content-length"])
        if not content.endswith(b"\r\n0\r\n\r\n") and content != b"0\r\n\r\n":
            return False
        return not self.is_stream or b"event: end\r\n" in content[-100:]

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def is_answered(self) -> bool:
        """True if it is what was asked for, to its end."""
        return self.status == 200 and self.is_whole

    @cached_property
    def problem(self) -> dict[str, Any]:
        """The error that it says: of a refusal its body, of a stream its last event. Empty if there is none."""
        content = self.body
        if self.is_stream:
            _, found, rest = content.rpartition(b"event: error\r\ndata: ")
            content = rest.partition(b"\r\n")[0] if found else b"{}"
        elif self.status is None or self.status < 400:
            return {}
        with contextlib.suppress(ValueError, AttributeError):
            error = json.loads(content).get("error")
            return error if isinstance(error, dict) else {}
        return {}

    @property
    def kind(self) -> str | None:
        """The error's type."""
        return self.problem.get("type")

    @property
    def label(self) -> str:
        """A word or two for counting."""
        if self.has_left:
            return "left"
        if self.status is None or (self.error and not self.is_whole):
            return self.error or "no answer"
        if self.is_answered:
            return "whole"
        return f"{self.status} {self.kind or ('cut' if not self.is_whole else '')}".strip()


class _Reader:
    """Reads an answer to its end, and notes when it came."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.pieces: list[bytes] = []
        self.first_byte_s: float | None = None
        self.first_token_s: float | None = None
        self.has_token = asyncio.Event()
        self._reader = reader

    async def read(self) -> None:
        while piece := await self._reader.read(PIECE):
            now = time.perf_counter()
            if self.first_byte_s is None:
                self.first_byte_s = now
            if self.first_token_s is None and (b"event: data" in piece or b"event: data" in b"".join(self.pieces[-2:])):
                self.first_token_s = now
                self.has_token.set()
            self.pieces.append(piece)


async def ask(
    port: int, message: bytes, *, departure: Departure | None = None, timeout_s: float = 100, host: str = "127.0.0.1"
) -> Outcome:
    """Send a request and see what becomes of it; leave early if told to."""
    started_s = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return Outcome(started_s, time.perf_counter(), error=type(error).__name__)
    seen = _Reader(reader)
    has_left, said = False, None
    try:
        async with asyncio.timeout(timeout_s):
            if departure is None:
                writer.write(message)
                await seen.read()
            else:
                has_left = await _ask_and_leave(writer, seen, message, departure)
    except TimeoutError:
        said = f"nothing more within {timeout_s:g} s"
    except OSError as error:
        said = type(error).__name__
    finally:
        await _close(writer)
    return Outcome(
        started_s,
        time.perf_counter(),
        b"".join(seen.pieces),
        seen.first_byte_s,
        seen.first_token_s,
        has_left,
        said if not has_left else None,
    )


async def _ask_and_leave(writer: asyncio.StreamWriter, seen: _Reader, message: bytes, departure: Departure) -> bool:
    """Do so; false if the answer was there before."""
    if departure.moment is Moment.SENDING:
        writer.write(message[: max(1, int(departure.share * (len(message) - 1)))])
        await asyncio.sleep(departure.after_s)
    else:
        writer.write(message)
        reading = asyncio.create_task(seen.read())
        try:
            if departure.moment in (Moment.FIRST, Moment.LATER):
                token = asyncio.create_task(seen.has_token.wait())
                await asyncio.wait((reading, token), return_when=asyncio.FIRST_COMPLETED, timeout=departure.after_s + 5)
                token.cancel()
            if departure.go is not None:
                await departure.go.wait()
            elif departure.moment is not Moment.FIRST:
                await asyncio.wait((reading,), timeout=departure.after_s)
            if reading.done():
                await reading
                return False
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await reading
    if departure.manner is Manner.HALF:
        writer.write_eof()
        with contextlib.suppress(OSError):
            await seen.read()
    elif departure.manner is Manner.RST:
        reset(writer)
    return True


def reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort() if writer.transport.is_closing() else writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), 5)
