"""What every answer tells browsers to keep to, and how HEAD is answered. Knows no route.

A page may load scripts and styles from here alone, and none may stand in the page itself: whatever of somebody else's
ends up in one does not run. A route whose page needs more sends a policy of its own, made by `policy`.
"""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SOURCES = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


def policy(*, script: str = "", style: str = "") -> dict[str, str]:
    """The header with what pages may do.

    Args:
        script: What else scripts may be or do.
        style: What else styles may be.
    """
    more = {"script-src": script, "style-src": style}
    sources = {name: f"{source} {more.get(name, '')}".strip() for name, source in SOURCES.items()}
    return {"Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in sources.items())}


EVERYWHERE = {
    **policy(),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # a share link holds options
    # Of what is embedded as images and scripts are. Who may read an answer with `fetch` is a matter of CORS.
    "Cross-Origin-Resource-Policy": "same-origin",
}


class SecurityHeaders:
    """Puts them on every answer that has none of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in EVERYWHERE.items():
                    headers.setdefault(name, value)
                # What has a version is a file of ours: the browser may keep it, and asks whether it is still the same.
                headers.setdefault("Cache-Control", "private, no-cache" if "etag" in headers else "no-store")
            await send(message)

        await self.app(scope, receive, add)


class AnswerHead:
    """Answers HEAD as GET without the body: FastAPI's own routes refuse it, and those who watch services send it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def leave_out_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, leave_out_body)
