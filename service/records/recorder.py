"""The outermost layer: gives each request its id and its record, and passes the record on when all is over."""

import re
import uuid
from collections.abc import Callable, MutableSequence
from urllib.parse import quote, unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.records.record import MAX_PATH, Record, current_record

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What a caller may name a request; anything else gets an id of ours."""

SHARED = re.compile(r"/c/[^/]+")

MAX_SEGMENT = 40
"""Characters of a path between two slashes: longer ones are not logged. Packed options are longer."""

MAX_TEXT = 100_000
"""Bytes of a request or an answer that are kept for the log."""


class Recorder:
    """Around the whole application."""

    def __init__(self, app: ASGIApp, *, tell: Callable[[Record], None], keeps_texts: bool) -> None:
        """Wrap an application.

        Args:
            app: What answers.
            tell: Given the record of each request that has ended.
            keeps_texts: Whether the record holds what was sent both ways.
        """
        self.app = app
        self._tell = tell
        self._keeps_texts = keeps_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wanted_id = Headers(scope=scope).get("X-Request-ID", "")
        record = Record(
            id=wanted_id if REQUEST_ID.fullmatch(wanted_id) else uuid.uuid4().hex,
            method=scope["method"],
            path=path_of(scope),
            client=scope["client"][0] if scope.get("client") else "",
        )
        scope.setdefault("state", {})["record"] = record
        token = current_record.set(record)
        got: list[bytes] = []
        answered: list[bytes] = []

        async def take() -> Message:
            message = await receive()
            if self._keeps_texts:
                _keep(got, message)
            return message

        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = record.id
            elif self._keeps_texts:
                _keep(answered, message)
            await send(message)
            record.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, take, forward)
        finally:
            record.key = scope["state"].get("key", "")
            if self._keeps_texts:
                record.request_text = b"".join(got).decode(errors="replace")
                record.answer_text = b"".join(answered).decode(errors="replace")
            self._tell(record)
            current_record.reset(token)


def path_of(scope: Scope) -> str:
    """The path as it was sent, less what a proxy strips, and less the options in a share link, or in a misspelt one."""
    sent: bytes = scope.get("raw_path", b"")
    path = sent.decode("latin-1").removeprefix(scope.get("root_path", ""))
    decoded = unquote(path, errors="replace")  # routes go by the decoded path
    if SHARED.search(decoded) or any(len(segment) > MAX_SEGMENT for segment in decoded.split("/")):
        pieces = SHARED.sub("/c/…", decoded).split("/")
        path = "/".join("…" if piece == "…" or len(piece) > MAX_SEGMENT else quote(piece) for piece in pieces)
    return path[:MAX_PATH]


def _keep(pieces: MutableSequence[bytes], message: Message) -> None:
    room = MAX_TEXT - sum(map(len, pieces))
    if room > 0 and (body := message.get("body")):
        pieces.append(body[:room])
