"""The API's description, mended: LangServe's says what this service does not do."""

from typing import Any

from fastapi import FastAPI

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


def describe_api(app: FastAPI) -> None:
    """Have the application describe itself as it is: its own errors, and no arguments that it would refuse."""
    describe_as_before = app.openapi

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _mended(describe_as_before())
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _mended(description: dict[str, Any]) -> dict[str, Any]:
    schemas = description["components"]["schemas"]
    schemas["HTTPValidationError"] = ERROR
    schemas.pop("ValidationError", None)
    for name, schema in schemas.items():
        if name.endswith("Request"):
            schema["properties"].pop("kwargs", None)
    for operations in description["paths"].values():
        for operation in operations.values():
            parameters = operation.get("parameters", [])
            # Of the functions that LangServe documents, those without a hash in their path have the argument, too.
            operation["parameters"] = [
                parameter for parameter in parameters if parameter["in"] == "path" or parameter["name"] != "config_hash"
            ]
    return description
