"""The door: every request to a chain comes through here before anything is computed or sent.

It reads the body once, validates every input and option, holds the prompts against the model's limits, and says on
whose behalf the work is done. So every refusal comes before the first byte, with a status code, on every endpoint.
"""

import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import anyio
import anyio.to_thread
from fastapi import Request
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import BaseMessage
from pydantic import BaseModel, ConfigDict, create_model

from chains import Chain
from llm.caller import Caller, current_caller
from llm.errors import InvalidMessage, InvalidOption
from service.body import BODIES, BatchBody, Call, calls, read_json, shared_options, validate
from service.errors import Refusal
from service.settings import Settings

ASSET = re.compile(r"([\w/-]{1,100}\.\w{1,10})?", re.ASCII)
"""Files of a playground. LangServe asks the file system for whatever it is given, which raises at a directory, a null
byte, and a name that is too long."""


class Check(Protocol):
    """The model's own limits: returns the number of prompt tokens, or raises why it would not answer."""

    def __call__(self, messages: Sequence[BaseMessage], **options: Any) -> int: ...


def open_door(chain: Chain, check: Check, settings: Settings) -> Callable[[Request], AsyncIterator[None]]:
    """Make the dependency for a chain's routes."""
    options_type = _options_type(chain)
    tokenizing = anyio.CapacityLimiter(os.cpu_count() or 1)  # leaves the other threads to others

    async def door(request: Request) -> AsyncIterator[None]:
        shared = shared_options(request.path_params.get("config_hash"))
        if request.method != "POST":
            # Pages and schemas are the same whatever the options. The form playground asks for its input schema with
            # every state of its options, half-typed ones too, and drops what was typed at a refusal.
            if "config_hash" in request.path_params:
                request.path_params["config_hash"] = ""
            if not ASSET.fullmatch(request.path_params.get("file_path", "")):
                raise Refusal(404, "not_found", "Not Found")
            yield
            return
        validate("config_hash.configurable", options_type, shared)
        endpoint = request.url.path.rsplit("/", 1)[-1]
        deadline = time.monotonic() + settings.timeout_s
        try:
            with anyio.fail_after(settings.timeout_s):
                raw = await read_json(request, settings.max_body)
        except TimeoutError as error:
            raise Refusal(408, "timeout", f"the body did not come within {settings.timeout_s:g} s") from error
        body = validate("", BODIES[endpoint], raw)
        wanted = calls(body, shared, max_batch=settings.max_batch)
        for call in wanted:
            validate(call.options_at, options_type, call.options)
        for call in wanted:
            await anyio.to_thread.run_sync(_admit, chain, check, call, limiter=tokenizing)
        # What LangServe will read: with the options of a share link merged in (it would lose them), without the rest.
        configs = [{"configurable": call.options} for call in wanted]
        request._json = {**raw, "config": configs if isinstance(body, BatchBody) else configs[0], "kwargs": {}}
        caller = Caller(id=request.state.request_id, deadline=deadline)
        current_caller.set(caller)  # this request's task and its children see it
        try:
            yield
        finally:
            caller.end()

    return door


def _options_type(chain: Chain) -> type[BaseModel]:
    """A model of the chain's options that takes no others, and no value of another type."""
    fields: dict[str, Any] = {spec.id: (spec.annotation, spec.default) for spec in chain.runnable.config_specs}
    return create_model(f"{chain.name}_options", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _admit(chain: Chain, check: Check, call: Call) -> None:
    """Hold an input against its type, and its prompt against the model's limits."""
    value = validate(call.at, chain.input_type, call.input)
    fields = {name: getattr(value, name) for name in type(value).model_fields}
    try:
        check(chain.messages(fields), **chain.options(call.options))
    except InvalidOption as error:
        field = f"{call.options_at}.{error.field}"
        raise Refusal(422, "invalid_option", f"{field}: {error}", field=field) from error
    except ContextOverflowError as error:
        asks_too_much = getattr(error, "max_tokens", None) is not None
        field = f"{call.options_at}.max_tokens" if asks_too_much else call.at
        raise Refusal(422, "context_overflow", f"{field}: {error}", field=field) from error
    except InvalidMessage as error:
        raise Refusal(422, "invalid_message", f"{call.at}: {error}", field=f"{call.at}.{error.field}") from error
