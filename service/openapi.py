"""The API's description, mended: LangServe's says what this service does not do."""

import json
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from service.entry.access import FOR_EVERYBODY

ERROR = {
    "title": "Error",
    "description": "Why a request was not served.",
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "description": "What kind of error it is; programs go by this."},
                "message": {"type": "string", "description": "What is wrong, for people."},
                "field": {"type": "string", "description": "Where in the request, if somewhere."},
                "request_id": {"type": "string", "description": "The log's name for the request."},
            },
            "required": ["type", "message", "request_id"],
        }
    },
    "required": ["error"],
}


KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The key, as `Authorization: Bearer KEY`."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The key."},
    "basic": {"type": "http", "scheme": "basic", "description": "The key as the password, with any user name."},
}
"""The ways to give a key, any one of them."""

EVENT = {
    "title": "Server-sent event",
    "type": "object",
    "properties": {
        "event": {"type": "string", "enum": ["metadata", "data", "error", "end"]},
        "data": {"type": "string", "description": "JSON; of an error, what a refusal's body has."},
    },
    "required": ["event"],
}

REFUSALS = {
    "400": "The body cannot be read.",
    "401": "There is no key, or it is not valid.",
    "403": "A page of another site asks.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "421": "The service is not called by its name.",
    "429": "This key has called too often, or has too many requests at once.",
    "500": "The chain has failed, or the service.",
    "502": "The chain could not use the model's answer, or a tool of it failed.",
    "503": "The queue is full, the model is loading, or the service is stopping.",
    "504": "The request was not finished in time.",
}


def describe_api(app: FastAPI, *, has_keys: bool) -> None:
    """Have the application describe itself as it is: its keys and errors, and no arguments that it would refuse."""
    describe_as_before = app.openapi

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _mended(describe_as_before(), has_keys=has_keys)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]

    @cache
    def content(root_path: str) -> bytes:
        servers = {"servers": [{"url": root_path}]} if root_path else {}
        return json.dumps({**describe(), **servers}, ensure_ascii=False, separators=(",", ":")).encode()

    async def send(request: Request) -> Response:
        return Response(content(request.scope.get("root_path", "").rstrip("/")), media_type="application/json")

    # FastAPI's own route makes the JSON anew for each request: 10 ms of the event loop.
    routes = app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", None) != app.openapi_url]
    app.add_route(str(app.openapi_url), send, include_in_schema=False)


def _mended(description: dict[str, Any], *, has_keys: bool) -> dict[str, Any]:
    schemas = description["components"]["schemas"]
    schemas["HTTPValidationError"] = ERROR
    schemas.pop("ValidationError", None)
    for name, schema in schemas.items():
        if name.endswith("Request"):
            schema["properties"].pop("kwargs", None)
    if has_keys:
        description["components"]["securitySchemes"] = KEY_SCHEMES
        description["security"] = [{name: []} for name in KEY_SCHEMES]
    for path, operations in description["paths"].items():
        if path in FOR_EVERYBODY:
            operations["get"]["security"] = []
        for method, operation in operations.items():
            if method == "post":
                if "/stream" in path:
                    operation["responses"]["200"]["content"] = {"text/event-stream": {"schema": EVENT}}
                for status, what in REFUSALS.items():
                    content = {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}}
                    operation["responses"].setdefault(status, {"description": what, "content": content})
            parameters = operation.get("parameters", [])
            # Of the functions that LangServe documents, those without a hash in their path have the argument, too.
            operation["parameters"] = [
                parameter for parameter in parameters if parameter["in"] == "path" or parameter["name"] != "config_hash"
            ]
    return description
