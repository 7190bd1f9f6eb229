"""LangServe's playgrounds, mended: of a request that failed the form shows nothing, and the chat "network error".

A script in their pages watches their requests and shows what the service said.
"""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SCRIPT = Path(__file__).with_name("playground_failures.html")


class ExplainFailures:
    """Puts the script into the pages of the playgrounds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._script = SCRIPT.read_bytes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].endswith("/playground/"):
            await self.app(scope, receive, send)
            return
        start: MutableMapping[str, Any] = {}

        async def insert(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            # LangServe sends the page in one piece.
            page = message.get("body", b"").replace(b"</body>", self._script + b"</body>")
            if start:
                MutableHeaders(scope=start)["Content-Length"] = str(len(page))
                await send(start)
                start = {}
            await send({**message, "body": page})

        await self.app(scope, receive, insert)
