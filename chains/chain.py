"""What a hosted chain is: a Runnable, and what the service must know of it. Knows no particular chain."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from chains.documents.files import FileReader
from chains.options import with_options

NAME = re.compile(r"[a-z][a-z0-9_-]*(/[a-z][a-z0-9_-]*)*")

Prepare = Callable[[BaseModel, FileReader], Awaitable[BaseModel]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One hosted chain."""

    name: str
    """Its path on the server, without the slash."""
    description: str
    """One sentence for people."""
    runnable: Runnable[Any, Any]
    """Typed (`with_types`); options are its `config_specs`."""
    input_type: type[BaseModel]
    """Validates one input."""
    messages: Callable[[dict[str, Any], Mapping[str, Any]], list[BaseMessage]]
    """The first conversation that the model is shown for a validated input and `configurable`: what the model's limits
    are held against. Raises InputError."""
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The call arguments that the model gets for a validated `configurable`."""
    example: dict[str, Any]
    """A valid input, to try it with."""
    playground: Literal["default", "chat"] = "default"
    num_tokens: Callable[[dict[str, Any], int], int] | None = None
    """Tokens of the texts of a validated input, of which the first conversation shows the beginning only; counted until
    they are more than a limit. None: the first conversation shows everything."""
    prepare: Prepare | None = None
    """Gives an input that is to be worked on in place of a validated one: with the text of a file for the file, say.
    Raises InputError."""

    def __post_init__(self) -> None:
        """Hold the chain against what would otherwise show only when somebody uses it. Raises ValueError."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"chain {self.name!r}: its name is its path: small letters, digits, -, _ and /")
        if self.input_type.model_config.get("extra") != "forbid":
            raise ValueError(f"chain {self.name}: its input type must forbid extras, or a typo is ignored in silence")
        if '"null"' in json.dumps(self.input_type.model_json_schema()):
            raise ValueError(
                f"chain {self.name}: the playground stays blank where an input may be null: write an optional field as "
                "T | SkipJsonSchema[None] with json_schema_extra=without_null (see translate.py)"
            )
        try:
            self.input_type.model_validate(self.example)
        except ValueError as error:
            raise ValueError(f"chain {self.name}: its own example is no input for it: {error}") from error

    @classmethod
    def of(
        cls,
        prompt: Runnable[dict[str, Any], PromptValue],
        model: BaseChatModel,
        parser: Runnable[Any, Any] | None = None,
        *,
        input_type: type[BaseModel],
        output_type: Any,
        presets: Mapping[str, Any] | None = None,
        **described: Any,
    ) -> Self:
        """Make `prompt | model | parser` a hosted chain; `described` are the other fields.

        Args:
            prompt: From a validated input to what the model is shown.
            model: Takes sampling options as call arguments.
            parser: From the model's message to the output; None: the message is the output.
            input_type: Of one input.
            output_type: Of the output.
            presets: Sampling options where callers give none.
        """
        answer = with_options(model, **(presets or {}))
        runnable: Runnable[Any, Any] = prompt | answer
        if parser is not None:
            runnable = runnable | parser
        chain = cls(
            runnable=runnable.with_types(input_type=input_type, output_type=output_type),
            input_type=input_type,
            messages=lambda value, _: prompt.invoke(value).to_messages(),
            options=answer.options,
            **described,
        )
        try:
            chain.messages(fields_of(input_type.model_validate(chain.example)), {})
        except KeyError as error:
            raise ValueError(f"chain {chain.name}: its own example is no input for its prompt: {error}") from error
        return chain


def fields_of(value: BaseModel) -> dict[str, Any]:
    """A validated input as a chain gets it."""
    return {name: getattr(value, name) for name in type(value).model_fields}
