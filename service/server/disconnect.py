"""A request's work ends with its client, and in time, on every endpoint."""

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm.errors import DeadlineExceeded


class CancelOnDisconnect:
    """Cancels a request's work when its client disconnects, or when its time is up.

    LangServe (0.3.3) notices a disconnect only in streams: an `/invoke` or `/batch` goes on for nobody. Until when the
    work may go on is said by whoever knows, in the `deadline` of the cancel scope that stands as `work` in the state.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # One message at a time, so that a body is read no faster than the application takes it.
        put, get = anyio.create_memory_object_stream[Message]()
        is_complete = is_gone = False

        async def pump() -> None:
            nonlocal is_gone
            with put:
                while (message := await receive())["type"] != "http.disconnect":
                    await put.send(message)
            if not is_complete:
                is_gone = True
                work.cancel_scope.cancel()

        async def take() -> Message:
            try:
                return await get.receive()
            except anyio.EndOfStream:
                return {"type": "http.disconnect"}

        async def forward(message: Message) -> None:
            nonlocal is_complete
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        async with get, anyio.create_task_group() as work:  # closed last, or `pump` would fail too and hide an error
            scope["state"]["work"] = work.cancel_scope
            work.start_soon(pump)
            await self.app(scope, take, forward)
            work.cancel_scope.cancel()
        if not (is_complete or is_gone) and anyio.current_time() >= work.cancel_scope.deadline:
            raise DeadlineExceeded("the request was not finished in time")
