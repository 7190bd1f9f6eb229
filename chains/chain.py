"""What a hosted chain is: a Runnable, and what the service must know of it. Knows no particular chain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from chains.options import with_options


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
    messages: Callable[[dict[str, Any]], list[BaseMessage]]
    """The conversation that the model is shown for a validated input: what its limits are held against."""
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The call arguments that the model gets for a validated `configurable`."""
    example: dict[str, Any]
    """A valid input, to try it with."""
    playground: Literal["default", "chat"] = "default"

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
        return cls(
            runnable=runnable.with_types(input_type=input_type, output_type=output_type),
            input_type=input_type,
            messages=lambda value: prompt.invoke(value).to_messages(),
            options=answer.options,
            **described,
        )
