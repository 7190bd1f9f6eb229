"""Request bodies: read once, and made into calls of a chain, or refused with where in the body the trouble is.

Knows LangServe's wire format, and what clients in Python and JavaScript send along. Knows no chain and no model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import anyio
import orjson
from fastapi import Request
from langserve.lzstring import LZString
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from llm.errors import shown
from service.errors import Refusal, location

MAX_DEPTH = 100
"""Nesting of a body: below what Python's own recursion limit lets later readers take."""

MAX_VALUES = 200_000
MAX_KEYS = 1_000
MAX_CALLS = 10_000
"""What is more than these would hold everybody up while it is validated."""

FOREIGN_KEYS = re.compile(r"thread_id|(checkpoint_|langgraph_|__).*", re.DOTALL)
"""Keys that LangChain and LangGraph add to `configurable` unasked: dropped."""

MAX_HASH = 4096
"""Characters of a share link's hash: few kilobytes of it can stand for gigabytes."""

Model = TypeVar("Model", bound=BaseModel)

Strings = Annotated[list[str], Field(fail_fast=True)]


class Config(BaseModel):
    """A RunnableConfig as clients send it. All but `configurable` is for the client's own side; names are those of
    LangChain in Python and JavaScript."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True)

    configurable: dict[str, Any] = Field(default_factory=dict)
    tags: Strings | None = None
    metadata: dict[str, Any] | None = None
    run_name: Annotated[str | None, Field(alias="runName")] = None
    run_id: Annotated[UUID | None, Field(alias="runId")] = None
    max_concurrency: Annotated[int | None, Field(alias="maxConcurrency", ge=1)] = None
    recursion_limit: Annotated[int | None, Field(alias="recursionLimit", ge=1)] = None
    timeout: float | None = None
    store: Any = None


class Arguments(BaseModel):
    """Call arguments: there are none. LangChain.js puts the version of the events here; ours are v2."""

    model_config = ConfigDict(extra="forbid")

    version: Literal["v2"] | None = None


class Body(BaseModel):
    """What all endpoints take."""

    model_config = ConfigDict(extra="forbid")

    # LangChain.js sends one per input on /batch.
    kwargs: Arguments | Annotated[list[Arguments], Field(fail_fast=True, max_length=MAX_CALLS)] = Field(
        default_factory=Arguments
    )


class InvokeBody(Body):
    """The body of /invoke and /stream."""

    input: Any
    config: Config = Field(default_factory=Config)


class BatchBody(Body):
    """The body of /batch."""

    inputs: Annotated[list[Any], Field(min_length=1)]
    config: Config | Annotated[list[Config], Field(fail_fast=True, max_length=MAX_CALLS)] = Field(
        default_factory=Config
    )


Names = Strings | None


class StreamLogBody(InvokeBody):
    """The body of /stream_log and /stream_events."""

    diff: bool = True
    """Whatever it says, /stream_log sends differences: LangChain.js says false on both, and reads differences."""

    include_names: Names = None
    include_types: Names = None
    include_tags: Names = None
    exclude_names: Names = None
    exclude_types: Names = None
    exclude_tags: Names = None


BODIES: Mapping[str, type[InvokeBody | BatchBody]] = {
    "invoke": InvokeBody,
    "batch": BatchBody,
    "stream": InvokeBody,
    "stream_log": StreamLogBody,
    "stream_events": StreamLogBody,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One input and its options, with where they stand in the body."""

    at: str
    input: Any
    options_at: str
    options: dict[str, Any]


def calls(body: InvokeBody | BatchBody, shared: Mapping[str, Any], *, max_batch: int) -> list[Call]:
    """The calls that a body asks for; its own options come before those that a share link brought."""
    if isinstance(body, InvokeBody):
        options = {**shared, **own_options(body.config.configurable)}
        return [Call("input", body.input, "config.configurable", options)]
    num_inputs = len(body.inputs)
    if num_inputs > max_batch:
        raise Refusal(
            422,
            "invalid_request",
            f"inputs: at most {max_batch} at once (SERVE_MAX_BATCH), got {num_inputs}",
            field="inputs",
        )
    if isinstance(body.config, Config):
        at = ["config.configurable"] * num_inputs
        configs = [body.config] * num_inputs
    else:
        at = [f"config[{index}].configurable" for index in range(num_inputs)]
        configs = body.config or [Config()] * num_inputs  # LangChain.js sends an empty list for none
    if len(configs) != num_inputs:
        message = f"config: one for all or one for each of {num_inputs} inputs, got {len(configs)}"
        raise Refusal(422, "invalid_request", message, field="config")
    return [
        Call(f"inputs[{index}]", value, at[index], {**shared, **own_options(configs[index].configurable)})
        for index, value in enumerate(body.inputs)
    ]


async def read_json(request: Request, max_body: int, *, idle_timeout_s: float) -> tuple[Any, int]:
    """Read a body of at most so many bytes, no longer than so after the last piece of it has come.

    Returns what it says, and its number of bytes.
    """
    too_large = Refusal(
        413, "body_too_large", f"a body may have {max_body} bytes at most (SERVE_MAX_BODY)", field="body"
    )
    declared = request.headers.get("Content-Length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_body:
        raise too_large
    pieces, size = [], 0
    stream = request.stream()
    try:
        while True:
            with anyio.move_on_after(idle_timeout_s) as waiting:
                piece = await anext(stream, None)
            if waiting.cancelled_caught:
                message = f"nothing more of the body came for {idle_timeout_s:g} s (SERVE_IDLE_TIMEOUT_S)"
                raise Refusal(408, "timeout", message)
            if piece is None:
                break
            size += len(piece)
            if size > max_body:
                raise too_large
            pieces.append(piece)
    except ClientDisconnect as error:
        raise Refusal(400, "incomplete", "the client went away before its body had come") from error
    return _parse(b"".join(pieces)), size


def _parse(content: bytes) -> Any:
    try:
        value = orjson.loads(content)  # strict: no NaN, no infinity, no lone surrogate, no invalid UTF-8
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "invalid_json", f"the body is not valid JSON: {error}", field="body") from error
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Refuse what would take long to validate, or too deep for Python to walk."""
    level, num_values = [value], 0
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for parent in level:
            if isinstance(parent, dict | list):
                num_values += len(parent)
                if num_values > MAX_VALUES or (isinstance(parent, dict) and len(parent) > MAX_KEYS):
                    message = f"a body may hold {MAX_VALUES} values, and an object {MAX_KEYS} keys, at most"
                    raise Refusal(400, "invalid_json", message, field="body")
                children.extend(parent.values() if isinstance(parent, dict) else parent)
        if not children:
            return
        level = children
    raise Refusal(400, "invalid_json", f"the body may be nested {MAX_DEPTH} deep at most", field="body")


def validate(at: str, kind: type[Model], value: Any) -> Model:
    """Hold what stands at some place in a body against a type."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = location([part for part in (at, *_path(problem, value)) if part != ""]) or "body"
        said = "Input should be an object" if problem["type"] == "model_type" else problem["msg"]
        if problem["type"] == "extra_forbidden":
            said = "there is no such key"
            if len(problem["loc"]) == 1:
                said += f"; there are {', '.join(kind.model_fields)}"
        message = f"{field}: {said.removeprefix('Value error, ')}"
        if problem["type"] not in ("missing", "value_error"):
            message += f", got {shown(problem['input'])}"
        raise Refusal(422, "invalid_request", message, field=field) from error


def _path(problem: ErrorDetails, value: Any) -> Iterator[str | int]:
    """Where in `value` the problem is: pydantic's location less the names of union branches, which are not in it."""
    for part in problem["loc"]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if problem["type"] != "missing":
                continue
        yield part


def shared_options(config_hash: str | None) -> dict[str, Any]:
    """The options in a share link of the playground."""
    if config_hash is None:
        return {}
    if len(config_hash) > MAX_HASH:
        message = f"a config hash may have {MAX_HASH} characters at most, got {len(config_hash)}"
        raise Refusal(400, "invalid_config_hash", message, field="config_hash")
    try:
        decompressed = LZString.decompressFromEncodedURIComponent(config_hash)  # type: ignore[no-untyped-call]
        config = _parse((decompressed or "").encode())
    except Exception as error:  # the decompressor fails in many ways
        raise Refusal(400, "invalid_config_hash", "the config hash is not valid", field="config_hash") from error
    return own_options(validate("config_hash", Config, config).configurable)


def own_options(configurable: Mapping[str, Any]) -> dict[str, Any]:
    """The options among them; null is as good as not given."""
    return {key: value for key, value in configurable.items() if value is not None and not FOREIGN_KEYS.fullmatch(key)}
