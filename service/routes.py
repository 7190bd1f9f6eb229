"""Puts chains on the network with LangServe's `add_routes`, and mends what it gets wrong for them."""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from langserve import add_routes
from langserve.serialization import WellKnownLCSerializer

from chains import Chain
from service.door import Door


class LineSafeSerializer(WellKnownLCSerializer):
    """LangServe's, with Unicode's line ends escaped: its Python client cuts a streamed chunk in two at each of them."""

    LINE_ENDS = ("\u0085", "\u2028", "\u2029")

    def dumps(self, obj: Any) -> bytes:
        """Serialize to JSON."""
        content: bytes = super().dumps(obj)
        for line_end in self.LINE_ENDS:
            content = content.replace(line_end.encode(), f"\\u{ord(line_end):04x}".encode())
        return content


def host(app: FastAPI, chain: Chain, door: Door) -> None:
    """Add a chain's routes: invoke, batch, stream, stream_log, stream_events, schemas and playground."""
    router = APIRouter()  # given the application itself, LangServe would print a banner over our log
    add_routes(
        router,
        chain.runnable,
        path=f"/{chain.name}",
        dependencies=[Depends(door)],
        disabled_endpoints=["token_feedback"],  # type: ignore[list-item]  # left out of LangServe's own annotation
        playground_type=chain.playground,
        serializer=LineSafeSerializer(),
    )
    app.include_router(router)
