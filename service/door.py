"""The door: every request to a chain comes through here before anything is computed or sent.

It reads the body once, validates every input and option, holds the prompts against the model's limits, and says on
whose behalf the work is done. So every refusal comes before the first byte, with a status code, on every endpoint.
"""

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import anyio.to_thread
import orjson
from fastapi import Request
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import BaseMessage
from langserve.lzstring import LZString
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from chains import Chain
from llm.caller import Caller, current_caller
from llm.errors import InvalidMessage, InvalidOption, shown
from service.errors import Refusal, location
from service.settings import Settings

MAX_DEPTH = 100
"""Nesting of a body: below what Python's own recursion limit lets later readers take."""

FOREIGN_KEYS = ("thread_id", "checkpoint_", "langgraph_", "__")
"""Keys that LangChain and LangGraph add to `configurable` unasked, or how they begin: dropped."""

MAX_HASH = 4096
"""Characters of a share link's hash: few kilobytes of it can stand for gigabytes."""

ASSET = re.compile(r"([\w/-]{1,100}\.\w{1,10})?", re.ASCII)
"""Files of a playground. LangServe asks the file system for whatever it is given, which raises at a directory, a null
byte, and a name that is too long."""


Model = TypeVar("Model", bound=BaseModel)


class Check(Protocol):
    """The model's own limits: returns the number of prompt tokens, or raises why it would not answer."""

    def __call__(self, messages: Sequence[BaseMessage], **options: Any) -> int: ...


class Config(BaseModel):
    """A RunnableConfig as clients send it. All but `configurable` is for the client's own side; names are those of
    LangChain in Python and JavaScript."""

    model_config = ConfigDict(extra="forbid")

    configurable: dict[str, Any] = Field(default_factory=dict)
    tags: Any = None
    metadata: Any = None
    run_name: Any = None
    run_id: Any = None
    max_concurrency: Any = None
    recursion_limit: Any = None
    runName: Any = None  # noqa: N815
    runId: Any = None  # noqa: N815
    maxConcurrency: Any = None  # noqa: N815
    recursionLimit: Any = None  # noqa: N815
    timeout: Any = None
    store: Any = None


class Arguments(BaseModel):
    """Call arguments: there are none. LangChain.js puts the version of the events here; ours are v2."""

    model_config = ConfigDict(extra="forbid")

    version: Literal["v2"] | None = None


class Body(BaseModel):
    """What all endpoints take."""

    model_config = ConfigDict(extra="forbid")

    # LangChain.js sends one per input on /batch.
    kwargs: Arguments | Annotated[list[Arguments], Field(fail_fast=True)] = Field(default_factory=Arguments)


class InvokeBody(Body):
    """The body of /invoke and /stream."""

    input: Any
    config: Config = Field(default_factory=Config)


class BatchBody(Body):
    """The body of /batch."""

    inputs: Annotated[list[Any], Field(min_length=1)]
    config: Config | Annotated[list[Config], Field(fail_fast=True)] = Field(default_factory=Config)


Names = list[str] | None


class StreamLogBody(InvokeBody):
    """The body of /stream_log and /stream_events."""

    diff: bool = True
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


def open_door(chain: Chain, check: Check, settings: Settings) -> Callable[[Request], AsyncIterator[None]]:
    """Make the dependency for a chain's routes."""
    options_type = _options_type(chain)

    async def door(request: Request) -> AsyncIterator[None]:
        shared = _shared_configurable(request.path_params.get("config_hash"))
        if request.method != "POST":
            # Pages and schemas are the same whatever the options. The form playground asks for its input schema with
            # every state of its options, half-typed ones too, and drops what was typed at a refusal.
            if "config_hash" in request.path_params:
                request.path_params["config_hash"] = ""
            if not ASSET.fullmatch(request.path_params.get("file_path", "")):
                raise Refusal(404, "not_found", "Not Found")
            yield
            return
        _validate("config_hash.configurable", options_type, shared)
        endpoint = request.url.path.rsplit("/", 1)[-1]
        raw = _parse(await _read(request, settings.max_body))
        body = _validate("", BODIES[endpoint], raw)
        calls = _calls(body, settings.max_batch)
        configurables = []
        for call in calls:
            configurable = {**shared, **_own_keys(call.configurable)}
            _validate(call.options_at, options_type, configurable)
            configurables.append(configurable)
        for call, configurable in zip(calls, configurables, strict=True):
            await anyio.to_thread.run_sync(_admit, chain, check, call, configurable)
        # What LangServe will read: with the options of a share link merged in (it would lose them), without the rest.
        configs = [{"configurable": configurable} for configurable in configurables]
        request._json = {**raw, "config": configs if isinstance(body, BatchBody) else configs[0], "kwargs": {}}
        caller = Caller(id=request.state.request_id, deadline=time.monotonic() + settings.timeout_s)
        current_caller.set(caller)  # this request's task and its children see it
        try:
            yield
        finally:
            caller.end()

    return door


async def _read(request: Request, max_body: int) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_body:
            raise Refusal(413, "body_too_large", f"a body may have {max_body} bytes at most", field="body")
        pieces.append(piece)
    return b"".join(pieces)


def _parse(content: bytes) -> Any:
    try:
        value = orjson.loads(content)  # strict: no NaN, no infinity, no lone surrogate, no invalid UTF-8
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "invalid_json", f"the body is not valid JSON: {error}", field="body") from error
    if _is_deeper_than(MAX_DEPTH, value):
        raise Refusal(400, "invalid_json", f"the body may be nested {MAX_DEPTH} deep at most", field="body")
    return value


def _is_deeper_than(depth: int, value: Any) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True


def _validate(at: str, kind: type[Model], value: Any) -> Model:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = location([part for part in (at, *_path(problem, value)) if part != ""]) or "body"
        said = "Input should be an object" if problem["type"] == "model_type" else problem["msg"]
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


def _shared_configurable(config_hash: str | None) -> dict[str, Any]:
    """The options in a share link of the playground."""
    if config_hash is None:
        return {}
    if len(config_hash) > MAX_HASH:
        message = f"a config hash may have {MAX_HASH} characters at most, got {len(config_hash)}"
        raise Refusal(400, "invalid_config_hash", message, field="config_hash")
    try:
        decompressed = LZString.decompressFromEncodedURIComponent(config_hash)  # type: ignore[no-untyped-call]
        config = orjson.loads(decompressed or "")
    except Exception as error:  # the decompressor fails in many ways
        raise Refusal(400, "invalid_config_hash", "the config hash is not valid", field="config_hash") from error
    return _own_keys(_validate("config_hash", Config, config).configurable)


def _own_keys(configurable: Mapping[str, Any]) -> dict[str, Any]:
    """The options among them; null is as good as not given."""
    return {key: value for key, value in configurable.items() if value is not None and not key.startswith(FOREIGN_KEYS)}


@dataclass(frozen=True, slots=True)
class _Call:
    """One input and its options, with where they stand in the body."""

    at: str
    input: Any
    options_at: str
    configurable: dict[str, Any]


def _calls(body: InvokeBody | BatchBody, max_batch: int) -> list[_Call]:
    if isinstance(body, InvokeBody):
        return [_Call("input", body.input, "config.configurable", body.config.configurable)]
    num_inputs = len(body.inputs)
    if num_inputs > max_batch:
        raise Refusal(422, "invalid_request", f"inputs: at most {max_batch} at once, got {num_inputs}", field="inputs")
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
        _Call(f"inputs[{index}]", value, at[index], configs[index].configurable)
        for index, value in enumerate(body.inputs)
    ]


def _options_type(chain: Chain) -> type[BaseModel]:
    """A model of the chain's options that takes no others, and no value of another type."""
    fields: dict[str, Any] = {spec.id: (spec.annotation, spec.default) for spec in chain.runnable.config_specs}
    return create_model(f"{chain.name}_options", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _admit(chain: Chain, check: Check, call: _Call, configurable: dict[str, Any]) -> None:
    """Hold an input against its type, and its prompt against the model's limits."""
    value = _validate(call.at, chain.input_type, call.input)
    fields = {name: getattr(value, name) for name in type(value).model_fields}
    try:
        check(chain.messages(fields), **chain.options(configurable))
    except InvalidOption as error:
        field = f"{call.options_at}.{error.field}"
        raise Refusal(422, "invalid_option", f"{field}: {error}", field=field) from error
    except ContextOverflowError as error:
        asks_too_much = getattr(error, "max_tokens", None) is not None
        field = f"{call.options_at}.max_tokens" if asks_too_much else call.at
        raise Refusal(422, "context_overflow", f"{field}: {error}", field=field) from error
    except InvalidMessage as error:
        raise Refusal(422, "invalid_message", f"{call.at}: {error}", field=f"{call.at}.{error.field}") from error
