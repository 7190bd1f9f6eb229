"""The schemas of a chain's input, output and options. LangServe makes them anew for each request, for up to 14 ms."""

import json
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter, FastAPI
from fastapi.params import Depends
from fastapi.responses import Response

from chains import Chain


def add_schemas(app: FastAPI, chain: Chain, dependencies: Sequence[Depends]) -> None:
    """Add a chain's schema routes, in front of LangServe's: these are the same for every request, made once.

    They are left out of the API's description, which has LangServe's.
    """
    router = APIRouter(include_in_schema=False, dependencies=list(dependencies))
    runnable = chain.runnable
    for name, schema in (
        ("input_schema", runnable.get_input_jsonschema()),
        ("output_schema", runnable.get_output_jsonschema()),
        ("config_schema", runnable.get_config_jsonschema(include=["configurable"])),
    ):
        body = json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode()
        for path in (f"/{chain.name}/{name}", f"/{chain.name}/c/{{config_hash}}/{name}"):
            router.add_api_route(path, _sender(body), methods=["GET"])
    app.include_router(router)


def _sender(body: bytes) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(body, media_type="application/json")

    return send
