"""uvicorn's HTTP protocol with limits, and a timeout for every wait, so that no client can hold a connection for ever.

uvicorn by itself waits without end for the head of a request, and for a reader who does not read. It knows no paths and
no chains: bodies have the door's deadline, and requests that are at work, silent or not, are let be.
"""

import json
import logging
import uuid
from asyncio import TimerHandle, Transport
from http import HTTPStatus
from itertools import chain
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.address import PEER
from service.errors import MAX_NAME, Problem
from service.server.connection_limit import ConnectionLimit
from service.server.sockets import MAX_CONNECTIONS, num_acknowledged, num_unacknowledged

log = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024
"""Bytes of a request's line and headers together. httptools takes any number, and so does uvicorn."""

MAX_URL = 8 * 1024
MAX_HEADER = 16 * 1024
"""Bytes of one header, name and value."""

MAX_HEADERS = 100
"""Headers of a request, trailers included. Each is several Python objects, whatever its length."""

LARGE_HEAD = 4 * 1024
"""Bytes of an unfinished head from which on it counts as a large one: see `ConnectionLimit`."""

SLICE = 16 * 1024
"""Bytes that are parsed at once. A limit is noticed at most so many bytes late."""

BODY_PIECE = 16 * 1024
BODY_WAIT_S = 0.5
"""The application is woken up for so many bytes of a body, for its end, or after so long: not for every packet."""

CHUNK_ALLOWANCE = 16
"""Bytes of framing that a chunk of a body may have, besides twice its size. What exceeds that adds up to `MAX_HEAD`."""

SMALL_CHUNK = 64
MAX_SMALL_CHUNKS = 8_192
"""Chunks of a body, beyond one for each `SMALL_CHUNK` of its bytes. Each costs a call, whatever its size: 300,000
chunks of one byte held all other connections up for 0.25 s."""

LOOKS_PER_TIMEOUT = 4
"""A connection is looked at this often, and so cut at most two looks late: no timer is set or cancelled per request."""

LINGER_S = 1.0
"""Closed at once, with bytes of the peer unread, TCP resets a connection, and what was answered last is lost."""

DEAD_PEER_S = 60
"""A peer whose system acknowledges none of the bytes that wait for it for so long is gone: or the idle timeout, if that
is longer."""


HEAD_TOO_LARGE = Problem(
    431,
    "head_too_large",
    f"the request line and the headers may have at most {MAX_HEAD} bytes together, this request has more",
)
TOO_MANY_HEADERS = Problem(
    431, "head_too_large", f"a request may have at most {MAX_HEADERS} headers and trailers, this request has more"
)
BAD_REQUEST = Problem(400, "bad_request", "this is not a valid HTTP request")
CHUNKS_TOO_SMALL = Problem(
    400,
    "chunks_too_small",
    f"a body may have at most {MAX_SMALL_CHUNKS} chunks more than one for each {SMALL_CHUNK} of its bytes, "
    "this one has more: send it in larger chunks",
)


def timed_protocol(
    idle_timeout_s: float, max_connections: int = MAX_CONNECTIONS, *, min_read_rate: float = 0.0
) -> type[HttpToolsProtocol]:
    """Make the protocol for `uvicorn.Config(http=…)`.

    Args:
        idle_timeout_s: How long a client may make no progress before its connection is closed.
        max_connections: How many connections may be open: see `ConnectionLimit`.
        min_read_rate: Bytes per second that a client must read on average, after `idle_timeout_s`, of an answer that
            waits for it; 0 for any rate.
    """
    limit = ConnectionLimit(max_connections)
    return type(
        "TimedProtocol",
        (Connection,),
        {"idle_timeout_s": idle_timeout_s, "min_read_rate": min_read_rate, "limit": limit},
    )


class LimitExceeded(Exception):
    """From within the parser: a limit is exceeded."""

    def __init__(self, problem: Problem = HEAD_TOO_LARGE) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Pipelined(Exception):
    """From within the parser: a request that comes before the one before it was answered."""


class Connection(HttpToolsProtocol):
    """One connection. It is looked at now and then, from `connection_made` to `connection_lost`."""

    idle_timeout_s: float
    min_read_rate: float
    limit: ConnectionLimit

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None  # no WebSockets here: they would leave this class, and its timeouts, behind
        self._next_look: TimerHandle
        self._head_since: float | None = None  # when the head now awaited began; None between requests and in bodies
        self._num_loose = 0  # bytes since a head began; in a body, its framing beyond what each chunk may have
        self._num_headers = 0
        self._num_small = 0.0  # chunks beyond what a body of its size may have
        self._body: list[bytes] = []  # pieces that the application does not know of yet
        self._body_size = 0
        self._body_timer: TimerHandle | None = None
        self._unread: int | None = None  # what the peer had not taken when it last took some; None if it need not hurry
        self._unread_since = 0.0
        self._acked: tuple[int, float] | None = None  # bytes that the peer's system has, and since when no more
        self._slow_since: tuple[float, int] | None = None  # when a wait for the reader began; unread then
        self._is_refused = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(MAX_HEAD)  # as it is without TLS, where asyncio takes eight times as much
        self._head_since = self.loop.time()
        self._look()
        self.limit.add(self, self.client[0] if self.client else "")

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        self._drop_body()
        self.limit.remove(self)
        super().connection_lost(exc)

    def evict(self) -> None:
        """Close at once: `ConnectionLimit` needs the room."""
        self._next_look.cancel()
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Uvicorn's, without its keep-alive timer's cancellation (see below), its log lines and its upgrades."""
        for start in range(0, len(data), SLICE):
            if self._is_refused or self.transport.is_closing():
                return
            self._parse(data[start : start + SLICE])
        if self._head_since is not None and self._num_loose > LARGE_HEAD:
            self.limit.hold_large_head(self)

    def _parse(self, data: bytes) -> None:
        self._num_loose += len(data)
        self._num_small = max(0.0, self._num_small - 1)  # a body that is not chunked comes once per call
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # answered as if it had not asked for one; the parser takes no more
        except httptools.HttpParserError as error:  # with what a callback raised as its context
            if isinstance(error.__context__, Pipelined):
                self.cycle.keep_alive = False  # its sender may ask again elsewhere; see `on_message_begin`
                self._is_refused = True
                return
            self._refuse(error.__context__.problem if isinstance(error.__context__, LimitExceeded) else BAD_REQUEST)
        else:
            if self._num_loose > MAX_HEAD:
                self._refuse(HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        if self._is_answering():
            # uvicorn would stop reading until it is answered, and not notice that the peer has gone away.
            raise Pipelined
        super().on_message_begin()
        self._drop_body()
        self._num_loose = 0  # what is read along with a head's first byte may not be its own, and is not counted
        self._num_headers = 0
        self._num_small = 0.0
        self.scope["state"][PEER] = self.client
        if self._head_since is None:
            self._head_since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > MAX_URL:
            message = f"a URL may have at most {MAX_URL} bytes, this request has a longer one"
            raise LimitExceeded(Problem(414, "url_too_long", message))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise LimitExceeded(TOO_MANY_HEADERS)
        if (size := len(name) + len(value)) > MAX_HEADER:
            named = name[:MAX_NAME].decode("latin-1")
            message = f"a header may have at most {MAX_HEADER} bytes, the header {named!r} has {size}"
            raise LimitExceeded(Problem(431, "head_too_large", message))
        if self._head_since is not None:  # else it is a trailer, which is not used
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > MAX_HEAD:
            raise LimitExceeded
        super().on_headers_complete()
        self._head_since = None
        self._num_loose = 0
        self.limit.release_head(self)
        self.limit.wait(self)  # for the body, from now on

    def on_body(self, body: bytes) -> None:
        self._num_loose = max(0, self._num_loose - CHUNK_ALLOWANCE - 3 * len(body))  # once for the body itself
        self._num_small = max(0.0, self._num_small + 1 - len(body) / SMALL_CHUNK)
        if self._num_small > MAX_SMALL_CHUNKS:
            raise LimitExceeded(CHUNKS_TOO_SMALL)
        self._body.append(body)
        self._body_size += len(body)
        if self._body_size >= BODY_PIECE:
            self._pass_body()
        elif self._body_timer is None:
            self._body_timer = self.loop.call_later(min(BODY_WAIT_S, self.idle_timeout_s / 2), self._pass_body)

    def _pass_body(self) -> None:
        """Hand what has come of a body to the application. In larger pieces: each wakes it up."""
        body = b"".join(self._body)
        self._drop_body()
        if body and self._is_answering():
            super().on_body(body)

    def _drop_body(self) -> None:
        self._body, self._body_size = [], 0
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def on_message_complete(self) -> None:
        self._pass_body()
        super().on_message_complete()
        self._note_wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._note_wait()

    def timeout_keep_alive_handler(self) -> None:
        """Where uvicorn cancels this at any byte, and so waits for ever after a stray one, it is asked if it holds."""
        if self._head_since is None and not self._is_answering():
            super().timeout_keep_alive_handler()

    def resume_writing(self) -> None:
        self._unread = self._slow_since = None
        super().resume_writing()
        self._note_wait()

    def _note_wait(self) -> None:
        """Say who waits for whom."""
        if self._is_answering() and not (self.cycle.more_body or self.flow.write_paused):
            self.limit.work(self)
        else:
            self.limit.wait(self)

    def _look(self) -> None:
        self._next_look = self.loop.call_later(self.idle_timeout_s / LOOKS_PER_TIMEOUT, self._look)
        now = self.loop.time()
        dead_peer_s = max(DEAD_PEER_S, self.idle_timeout_s)
        if self._silent_for(now) >= dead_peer_s:
            self._cut(f"its system took nothing for {dead_peer_s:g} s")
        elif self.flow.write_paused or self.transport.is_closing():
            # Nothing is added to what waits here now, so that any change means that the peer has taken some.
            unread = self.transport.get_write_buffer_size() + num_unacknowledged(self.transport)
            if unread != self._unread:
                self._unread, self._unread_since = unread, now
            elif now - self._unread_since >= self.idle_timeout_s:
                self._cut(f"it read nothing for {self.idle_timeout_s:g} s")
                return
            self._slow_since = self._slow_since or (now, unread)
            since, unread_then = self._slow_since
            if unread_then - unread < self.min_read_rate * (now - since - self.idle_timeout_s):
                self._cut(f"it read less than {self.min_read_rate:g} bytes per second")
        elif self._head_since is not None and now - self._head_since >= self.idle_timeout_s:
            if self._is_answering():
                return  # an answer goes before what follows it
            if self.scope is None:
                log.info("Cut %s: it sent nothing for %g s", self._peer(), self.idle_timeout_s)
                self.transport.close()
            else:
                said = f"the head of the request did not come within {self.idle_timeout_s:g} s (SERVE_IDLE_TIMEOUT_S)"
                self._refuse(Problem(408, "timeout", said))

    def _silent_for(self, now: float) -> float:
        """Seconds since the peer's system last acknowledged a byte, if there are any to acknowledge."""
        acked = num_acknowledged(self.transport) if num_unacknowledged(self.transport) else None
        if acked is None:
            self._acked = None
            return 0.0
        if self._acked is None or self._acked[0] != acked:
            self._acked = acked, now
        return now - self._acked[1]

    def _cut(self, reason: str) -> None:
        self._next_look.cancel()
        log.info("Cut %s: %s", self._peer(), reason)
        self.transport.abort()

    def _refuse(self, problem: Problem) -> None:
        """Answer in place of the application, which gets a disconnect, and close. Amid an answer, only close."""
        request_id = uuid.uuid4().hex
        # Its message may quote a header's name.
        reason = problem.kind if problem.status == 431 else problem.message
        log.info("Refused %s: %s", self._peer(), reason, extra={"request_id": request_id})
        self._is_refused, self._head_since = True, None
        self.limit.release_head(self)
        if self._is_answering():
            if self.cycle.response_started or not self.cycle.more_body:
                self.transport.close()
                return
            self._drop_body()
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.url, self.headers, self.scope = b"", [], None  # type: ignore[assignment]  # they may be large
        body = json.dumps(problem.body(request_id)).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-content-type-options", b"nosniff"),
            (b"x-request-id", request_id.encode()),
        ]
        status = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}".encode()
        lines = [status, *(name + b": " + value for name, value in headers), b"", body]
        self.transport.write(b"\r\n".join(lines))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _is_answering(self) -> bool:
        # The latest request's: those before it are answered first.
        return self.cycle is not None and not self.cycle.response_complete

    def _peer(self) -> str:
        return "{}:{}".format(*self.client) if self.client else "a client"
