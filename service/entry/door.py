"""The door: every request to a chain comes through here before anything is computed or sent.

It reads the body, asks for admission, validates every input and option, holds the prompts against the limits, and says
on whose behalf the work is done. So every refusal comes before the first byte, with a status code, on every endpoint.
The body comes first: one that arrives slowly takes no capacity from requests that are complete.
"""

import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import anyio
from fastapi import Request
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import BaseMessage
from pydantic import BaseModel, ConfigDict, create_model

from chains import Chain
from chains.cancellable import checkpoint, current_tenant
from chains.chain import fields_of
from chains.documents.files import FileLimits, FileReader
from chains.errors import InputError
from llm.caller import Caller, Report, current_caller
from llm.errors import InvalidMessage, InvalidOption
from service.address import network_of
from service.entry.admission import Admission
from service.entry.body import Call, calls, parse_body, parse_json, shared_options, validate
from service.entry.body_reader import VALUE_BYTES, BodyLease, BodyReader
from service.entry.limits import Limits
from service.entry.preparation import Preparation
from service.errors import Refusal, describe
from service.hosted import failures_of
from service.records.metrics import Metrics
from service.records.record import Record, record_of

GRACE_S = 2.0
"""How long after its deadline a request may take to say so."""


class Check(Protocol):
    """The model's own limits: returns the number of prompt tokens, or raises why it would not answer."""

    def __call__(self, messages: Sequence[BaseMessage], **options: Any) -> int: ...


class Door:
    """The dependency for a chain's routes."""

    def __init__(
        self,
        chain: Chain,
        check: Check,
        limits: Limits,
        admission: Admission,
        metrics: Metrics,
        bodies: BodyReader,
        preparation: Preparation,
    ) -> None:
        self._chain = chain
        self._check = check
        self._limits = limits
        self._admission = admission
        self._metrics = metrics
        self._bodies = bodies
        self._preparation = preparation
        self._options_type = _options_type(chain)
        # LangServe validates inputs once more, on the event loop; for what is of the type already, that takes no time.
        self._passes_models = chain.runnable.get_input_schema() is chain.input_type
        self._file_limits = FileLimits(max_file=limits.max_file, max_pages=limits.max_pages)

    async def __call__(self, request: Request) -> AsyncIterator[None]:
        """Let a request through, or raise why not."""
        record = record_of(request.scope)
        record.chain, record.key = self._chain.name, request.state.key
        config_hash = request.path_params.get("config_hash")
        tenant = record.key or network_of(record.client)
        current_tenant.set(tenant)  # this request's task and its children see it
        if request.method != "POST":
            await self._prepare_options(config_hash, tenant)
            # Pages and schemas are the same whatever the options. The form playground asks for its input schema with
            # every state of its options, half-typed ones too, and drops what was typed at a refusal.
            if "config_hash" in request.path_params:
                request.path_params["config_hash"] = ""
            record.endpoint = "page"
            yield
            return
        record.endpoint = request.url.path.rsplit("/", 1)[-1]
        await self._admission.count_call(tenant)
        async with self._bodies.read(request, self._limits.max_body, tenant=tenant) as body:
            timeout_s = self._limits.timeout_s
            caller = Caller(
                trace_id=record.id,
                owner=record.key,
                deadline=time.monotonic() + timeout_s,
                max_output_tokens=self._limits.max_output_tokens,
                on_ended=partial(self._report, record),
            )
            # Generations end at the caller's deadline, and say so; this ends whatever else a chain may do.
            request.state.work.deadline = anyio.current_time() + timeout_s + GRACE_S
            async with self._admission.place(caller, timeout_s=timeout_s + 2 * GRACE_S):
                request._json = await self._prepare_body(body, record.endpoint, config_hash, tenant)
                self._admission.start(caller)
                current_caller.set(caller)  # this request's task and its children see it
                yield

    async def _prepare_options(self, config_hash: str | None, tenant: str) -> dict[str, Any]:
        """The options in a share link, which may be packed to many times their size."""
        size = 0 if config_hash is None else len(config_hash)
        return await self._preparation.run(shared_options, config_hash, tenant=tenant, size=size)

    async def _prepare_body(
        self, body: BodyLease, endpoint: str, config_hash: str | None, tenant: str
    ) -> dict[str, Any]:
        """What LangServe is to read in place of a body, once everything in it was validated and found within limits.

        Files are read, the options of a share link merged in (LangServe would lose them), and the rest is left out.
        """
        shared = await self._prepare_options(config_hash, tenant)
        validate("config_hash.configurable", self._options_type, shared)
        raw, wanted, size = await self._preparation.run(
            self._parse, body.content, endpoint, shared, tenant=tenant, size=body.length
        )
        body.content = bytearray()  # all of it is in `raw` now
        body.resize(max(body.size, size))
        ready = await self._ready(wanted, tenant, body)
        inputs = [call.input for call in ready]
        configs = [{"configurable": call.options} for call in ready]
        asked = {"inputs": inputs, "config": configs} if "inputs" in raw else {"input": inputs[0], "config": configs[0]}
        return {**raw, **asked, "kwargs": {}}

    def _parse(
        self, content: bytearray, endpoint: str, shared: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Call], int]:
        """What a body says, its calls, and the bytes of memory that it takes."""
        raw = parse_json(content)
        wanted = calls(parse_body(endpoint, raw, max_batch=self._limits.max_batch), shared)
        for call in wanted:
            checkpoint()
            validate(call.options_at, self._options_type, call.options)
            _check_output(call, self._limits.max_output_tokens)
        return raw, wanted, _memory(raw)

    async def _ready(self, wanted: Sequence[Call], tenant: str, body: BodyLease) -> list[Call]:
        """Read the files of calls, and hold all prompts together against the limit."""
        chain, limit = self._chain, self._limits.max_input_tokens
        reader = FileReader(
            self._file_limits,
            turn=partial(self._preparation.files.hold, tenant),
            # Charged before the next file is read, so that texts which wait to be counted are within the budget.
            on_text=lambda num_bytes: body.resize(body.size + num_bytes),
        )
        ready, num_tokens, size = [], 0, body.length
        shown: list[tuple[dict[str, Any], int]] = []  # inputs of which only the first prompt, of so many, is counted
        run = partial(self._preparation.run, tenant=tenant)
        for call in wanted:
            value = await run(validate, call.at, chain.input_type, call.input, size=size)
            prepared = await self._prepare(call, value, reader)
            if prepared is not value:
                size += await run(_num_bytes_added, prepared, size=size)
            ready.append(replace(call, input=self._passed(call, value, prepared)))
            first = await run(_count, chain, self._check, call, prepared, size=size)
            num_tokens += first
            shown.append((fields_of(prepared), first))
            # A token is a byte at least: texts that fit by their bytes need not be counted.
            while chain.num_tokens and shown and num_tokens <= limit < size:
                fields, first = shown.pop()
                texts = await run(chain.num_tokens, fields, limit - num_tokens + first, size=size)
                num_tokens += max(0, texts - first)
            if num_tokens > limit:
                most = f"at most {limit} prompt tokens in a request (SERVE_MAX_INPUT_TOKENS)"
                got = f"got {'more' if chain.num_tokens else num_tokens}"
                raise Refusal(422, "input_too_long", f"{call.at}: {most}, {got}", field=call.at)
        return ready

    def _passed(self, call: Call, value: BaseModel, prepared: BaseModel) -> Any:
        """The input as LangServe gets it."""
        if self._passes_models:
            return prepared
        if prepared is value:
            return call.input
        return prepared.model_dump(mode="json", exclude_unset=True, exclude_none=True)

    async def _prepare(self, call: Call, value: BaseModel, reader: FileReader) -> BaseModel:
        if self._chain.prepare is None:
            return value
        try:
            with failures_of(self._chain.name):
                return await self._chain.prepare(value, reader)
        except InputError as error:
            raise _refusal(call, error) from error

    def _report(self, record: Record, report: Report) -> None:
        record.add(report)
        self._metrics.count_generation(report, record)


def _check_output(call: Call, max_output_tokens: int) -> None:
    max_tokens = call.options.get("max_tokens") or 0
    if max_tokens > max_output_tokens:
        field = f"{call.options_at}.max_tokens"
        message = f"{field}: at most {max_output_tokens} (SERVE_MAX_OUTPUT_TOKENS), got {max_tokens}"
        raise Refusal(422, "invalid_option", message, field=field)


def _options_type(chain: Chain) -> type[BaseModel]:
    """A model of the chain's options that takes no others, and no value of another type."""
    fields: dict[str, Any] = {spec.id: (spec.annotation, spec.default) for spec in chain.runnable.config_specs}
    return create_model(f"{chain.name}_options", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _count(chain: Chain, check: Check, call: Call, value: BaseModel) -> int:
    """Hold the first prompt that an input makes against the model's limits; return its tokens."""
    try:
        with failures_of(chain.name):
            messages, options = chain.messages(fields_of(value), call.options), chain.options(call.options)
        return check(messages, **options)
    except InputError as error:
        raise _refusal(call, error) from error
    except InvalidOption as error:
        field = f"{call.options_at}.{error.field}"
        raise Refusal(422, "invalid_option", f"{field}: {error}", field=field) from error
    except ContextOverflowError as error:
        asks_too_much = getattr(error, "max_tokens", None) is not None
        field = f"{call.options_at}.max_tokens" if asks_too_much else call.at
        raise Refusal(422, "context_overflow", f"{field}: {error}", field=field) from error
    except InvalidMessage as error:
        raise Refusal(422, "invalid_message", f"{call.at}: {error}", field=f"{call.at}.{error.field}") from error


def _memory(value: Any) -> int:
    """Bytes that a JSON value takes in memory: texts up to four times as many as in UTF-8."""
    if isinstance(value, dict | list):
        return VALUE_BYTES + sum(map(_memory, value.values() if isinstance(value, dict) else value))
    return VALUE_BYTES + (sys.getsizeof(value) if isinstance(value, str) else 0)


def _num_bytes_added(prepared: BaseModel) -> int:
    """Bytes of all texts of an input, with what was read from its files."""
    return _num_bytes(prepared.model_dump(mode="json", exclude_unset=True, exclude_none=True))


def _num_bytes(value: Any) -> int:
    """Bytes of all texts in a JSON value."""
    checkpoint()
    if isinstance(value, dict | list):
        return sum(map(_num_bytes, value.values() if isinstance(value, dict) else value))
    return len(value.encode()) if isinstance(value, str) else 0


def _refusal(call: Call, error: InputError) -> Refusal:
    problem = describe(error)
    field = f"{call.at}.{error.field}"
    return Refusal(problem.status, problem.kind, f"{field}: {error}", field=field)
