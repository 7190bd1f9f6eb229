import anyio
import pytest
from starlette.types import Message, Receive, Scope, Send

from llm.errors import EngineLoading
from service.errors import describe
from service.server.disconnect import CancelOnDisconnect


async def test_an_error_while_the_body_is_not_yet_read_is_that_error() -> None:
    """The body's next piece, which nobody took any more, failed as well, and of two errors callers saw neither."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(0.01)
        raise EngineLoading("later")

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    with pytest.raises(ExceptionGroup) as caught:
        await CancelOnDisconnect(refuse)({"type": "http", "state": {}}, receive, send)
    assert describe(caught.value).kind == "loading"
