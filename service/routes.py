"""Puts chains on the network with LangServe's `add_routes`, and mends what it gets wrong for them."""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from langserve import add_routes
from langserve.serialization import WellKnownLCSerializer

from chains import Chain
from service.entry.door import Door
from service.errors import ChainFailed, NotSerializable
from service.hosted import Hosted
from service.pages.playground import add_playground
from service.pages.schemas import add_schemas
from service.stream_log import LinearLog

TAKEN = ("docs", "health", "metrics", "ready", "static", "static-offline-docs")


class LineSafeSerializer(WellKnownLCSerializer):
    """LangServe's, with Unicode's line ends escaped: its Python client cuts a streamed chunk in two at each of them."""

    LINE_ENDS = ("\u0085", "\u2028", "\u2029")

    def __init__(self, chain: str) -> None:
        """Serialize for one chain.

        Args:
            chain: Its name.
        """
        self._chain = chain

    def dumps(self, obj: Any) -> bytes:
        """Serialize to JSON. Raises ChainFailed for what has no JSON form."""
        try:
            content: bytes = super().dumps(obj)
        except Exception as error:  # orjson's, or of a method of the object
            raise ChainFailed(self._chain, NotSerializable()) from error
        for line_end in self.LINE_ENDS:
            content = content.replace(line_end.encode(), f"\\u{ord(line_end):04x}".encode())
        return content


def host(app: FastAPI, chain: Chain, door: Door) -> None:
    """Add a chain's routes: invoke, batch, stream, stream_log, stream_events, schemas and playground.

    Raises ValueError for a name under which there is something else.
    """
    if chain.name in TAKEN:
        raise ValueError(f"no chain can be called {chain.name}: the service's own page is there")
    add_playground(app, chain, [Depends(door)])
    add_schemas(app, chain, [Depends(door)])
    hosted = Hosted(bound=chain.runnable, chain=chain.name)
    router = APIRouter()  # given the application itself, LangServe would print a banner over our log
    add_routes(
        router,
        hosted if chain.playground == "chat" else LinearLog(bound=hosted),
        path=f"/{chain.name}",
        dependencies=[Depends(door)],
        # `add_playground` has added that. The other is left out of LangServe's own annotation.
        disabled_endpoints=["playground", "token_feedback"],  # type: ignore[list-item]
        serializer=LineSafeSerializer(chain.name),
    )
    app.include_router(router)
