"""What a hosted chain is: a Runnable, and what the service must know of it. Knows no particular chain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel


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
