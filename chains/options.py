"""The sampling options that callers set per request, as `config={"configurable": {...}}`.

They reach the model as call arguments: any chat model that takes them will do, and `.bind()` and the like still work.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import ConfigurableFieldSpec, Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.configurable import DynamicRunnable
from pydantic import Field, SkipValidation, StringConstraints
from pydantic.config import JsonDict
from pydantic.json_schema import SkipJsonSchema


def without_null(schema: JsonDict) -> None:
    """The form playground goes blank at anything that shows null, a default included."""
    if schema.get("default") is None:
        schema.pop("default", None)


def optional(kind: Any, name: str, description: str, example: Any, **bounds: Any) -> ConfigurableFieldSpec:
    """An option that need not be given. `bounds` are those of a pydantic Field."""
    # Bounds outside the union would be written as `ge` and `le`, which no reader of JSON Schema knows; and of what
    # stands outside, LangServe keeps only the description in its API documentation.
    kind = Annotated[kind, Field(examples=[example], **bounds)]
    annotation = Annotated[kind | SkipJsonSchema[None], Field(json_schema_extra=without_null)]
    title = name.replace("_", " ").capitalize()
    return ConfigurableFieldSpec(id=name, annotation=annotation, name=title, description=description, default=None)


SAMPLING_OPTIONS = (
    optional(float, "temperature", "Randomness, 0 to 2; 0 always takes the likeliest token.", 0.7, ge=0, le=2),
    optional(float, "top_p", "Draw from the likeliest tokens whose probabilities add up to this.", 0.9, gt=0, le=1),
    optional(int, "top_k", "Draw from this many of the likeliest tokens; 0 for all.", 50, ge=0),
    optional(float, "min_p", "Drop tokens less likely than this fraction of the likeliest.", 0.05, ge=0, le=1),
    optional(int, "max_tokens", "New tokens at most; what room the context has left if not given.", 100, ge=1),
    optional(float, "repetition_penalty", "Above 1: repeat less. 1 is off.", 1.1, ge=0.01, le=2),
    optional(int, "seed", "Same seed and input, same answer.", 1, ge=0, le=2**63 - 1),
    optional(
        list[Annotated[str, StringConstraints(min_length=1, max_length=1_000)]],
        "stop",
        "The answer ends before the first of these; at most 8, of at most 1,000 characters each.",
        ["###"],
        max_length=8,
    ),
)
"""All options that a caller may set. Bounds are those of the model; it checks them again."""


class WithOptions(DynamicRunnable[Any, BaseMessage]):
    """A chat model that takes its sampling options from the call's `configurable`, and else from `presets`."""

    default: Annotated[RunnableSerializable[Any, BaseMessage], SkipValidation]
    presets: dict[str, Any]

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """The options, with this chain's defaults."""
        return [spec._replace(default=self.presets.get(spec.id, spec.default)) for spec in SAMPLING_OPTIONS]

    def options(self, configurable: Mapping[str, Any]) -> dict[str, Any]:
        """The call arguments for a `configurable`."""
        given = {spec.id: configurable.get(spec.id) for spec in SAMPLING_OPTIONS}
        return {**self.presets, **{name: value for name, value in given.items() if value is not None}}

    def _prepare(self, config: RunnableConfig | None = None) -> tuple[Runnable[Any, BaseMessage], RunnableConfig]:
        config = config or {}
        return self.default.bind(**self.options(config.get("configurable", {}))), config


def with_options(model: BaseChatModel, **presets: Any) -> WithOptions:
    """Let callers set the model's sampling options, from these defaults."""
    return WithOptions(default=model, presets=presets)
