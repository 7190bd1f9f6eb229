"""What a request body says: parsed, and made into calls of a chain, or refused with where in the body the error is.

Knows LangServe's wire format, and what clients in Python and JavaScript send along. Knows no chain and no model, and
not how a body arrives: that is `body_reader.py`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import orjson
from langserve.lzstring import LZString
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from llm.errors import shown
from service.entry.body_reader import check_structure
from service.entry.json_structure import StructureCounter
from service.errors import Refusal, location

MAX_KEYS = 1_000
"""Members of one object in a body: each that is unknown makes an error of its own."""

MAX_NAMES = 100
MAX_NAME = 200
"""Entries of a list of names or tags, and characters of each: every event of a stream is compared with all of them."""

MAX_METADATA = 16_384
"""Bytes of a configuration's `metadata`, as JSON."""

FOREIGN_KEYS = re.compile(r"thread_id|(checkpoint_|langgraph_|__).*", re.DOTALL)
"""Keys that LangChain and LangGraph add to `configurable` unasked: dropped."""

MAX_HASH = 4096
"""Characters of a share link's hash: few kilobytes of it can stand for gigabytes."""

Model = TypeVar("Model", bound=BaseModel)

Name = Annotated[str, StringConstraints(max_length=MAX_NAME)]
Names = Annotated[list[Name], Field(fail_fast=True, max_length=MAX_NAMES)]


def _check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    if (size := len(orjson.dumps(metadata))) > MAX_METADATA:
        raise ValueError(f"at most {MAX_METADATA} bytes as JSON, got {size}")
    return metadata


Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]


class Config(BaseModel):
    """A RunnableConfig as clients send it. All but `configurable` is for the client's own side; names are those of
    LangChain in Python and JavaScript."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True)

    configurable: dict[str, Any] = Field(default_factory=dict)
    tags: Names | None = None
    metadata: Metadata | None = None
    run_name: Annotated[Name | None, Field(alias="runName")] = None
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
    kwargs: Arguments | Annotated[list[Arguments], Field(fail_fast=True)] = Field(default_factory=Arguments)


class InvokeBody(Body):
    """The body of /invoke and /stream."""

    input: Any
    config: Config = Field(default_factory=Config)


class BatchBody(Body):
    """The body of /batch."""

    inputs: Annotated[list[Any], Field(min_length=1)]
    config: Config | Annotated[list[Config], Field(fail_fast=True)] = Field(default_factory=Config)


class StreamLogBody(InvokeBody):
    """The body of /stream_log and /stream_events."""

    diff: bool = True
    """Whatever it says, /stream_log sends differences: LangChain.js says false on both, and reads differences."""

    include_names: Names | None = None
    include_types: Names | None = None
    include_tags: Names | None = None
    exclude_names: Names | None = None
    exclude_types: Names | None = None
    exclude_tags: Names | None = None


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


def parse_body(endpoint: str, raw: Any, *, max_batch: int) -> InvokeBody | BatchBody:
    """Validate what all bodies have. Lists with an entry for each input are counted before anything in them is."""
    for name in ("inputs", "config", "kwargs"):
        entries = raw.get(name) if isinstance(raw, dict) else None
        if isinstance(entries, list) and len(entries) > max_batch:
            message = f"{name}: at most {max_batch} at once (SERVE_MAX_BATCH), got {len(entries)}"
            raise Refusal(422, "invalid_request", message, field=name)
    return validate("", BODIES[endpoint], raw)


def calls(body: InvokeBody | BatchBody, shared: Mapping[str, Any]) -> list[Call]:
    """The calls that a body asks for; its own options come before those that a share link brought."""
    if isinstance(body, InvokeBody):
        options = {**shared, **own_options(body.config.configurable)}
        return [Call("input", body.input, "config.configurable", options)]
    num_inputs = len(body.inputs)
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


def parse_json(content: bytes | bytearray) -> Any:
    """Parse a JSON text whose structure was counted before. Raises `Refusal`."""
    try:
        value = orjson.loads(content)  # strict: no NaN, no infinity, no lone surrogate, no invalid UTF-8
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "invalid_json", f"the body is not valid JSON: {error}", field="body") from error
    _check_keys(value)
    return value


def _check_keys(value: Any) -> None:
    """Refuse objects with so many members that it would take long to validate them."""
    left = [value] if isinstance(value, dict | list) else []
    while left:
        parent = left.pop()
        if isinstance(parent, dict) and len(parent) > MAX_KEYS:
            message = f"an object in a body may hold {MAX_KEYS} keys at most, got {len(parent)}"
            raise Refusal(400, "invalid_json", message, field="body")
        left.extend(
            child
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        )


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
        content = (decompressed or "").encode()
        structure = StructureCounter()
        structure.feed(content)
        check_structure(structure)
        config = parse_json(content)
    except Exception as error:  # the decompressor fails in many ways
        raise Refusal(400, "invalid_config_hash", "the config hash is not valid", field="config_hash") from error
    return own_options(validate("config_hash", Config, config).configurable)


def own_options(configurable: Mapping[str, Any]) -> dict[str, Any]:
    """The options among them; null is as good as not given."""
    return {key: value for key, value in configurable.items() if value is not None and not FOREIGN_KEYS.fullmatch(key)}
