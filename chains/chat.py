"""The chat chain: a conversation in, the assistant's next message out, however long the conversation has become."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, SystemMessage
from langchain_core.messages.base import merge_content
from langchain_core.messages.utils import convert_to_messages
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.runnables import (
    ConfigurableFieldSpec,
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableSerializable,
)
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, RootModel, SkipValidation
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from chains.cancellable import run_cancellable
from chains.chain import Chain
from chains.conversation import trim_to_fit
from chains.documents.measure import Measure
from chains.errors import InputError
from chains.messages import Message
from chains.options import WithOptions, optional, with_options

EXAMPLE: dict[str, Any] = {"messages": [{"type": "human", "content": "What is the capital of France?"}]}

MAX_MESSAGES = 10_000
"""Of a conversation. To lay out hundreds of thousands just to count them would take minutes."""

MAX_SYSTEM_PROMPT = 10_000
"""Characters of the option."""

CHAT_OPTIONS = (
    ConfigurableFieldSpec(
        id="on_overflow",
        annotation=Literal["trim", "error"],
        name="On overflow",
        description="When the context cannot hold the conversation: leave out its oldest turns, or refuse it.",
        default="trim",
    ),
    optional(
        str,
        "system_prompt",
        "Instructions for the model, before those in the conversation.",
        "Answer in one sentence.",
        max_length=MAX_SYSTEM_PROMPT,
    ),
)
"""What a caller may set besides the sampling options."""


class ChatInput(BaseModel):
    """A conversation, oldest message first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatOutput(RootModel[AIMessage | AIMessageChunk]):
    """The assistant's message. Its `response_metadata` says in `messages_left_out` how many the model was not shown."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # LangServe's chat playground opens only if some option of a top-level `anyOf` has a `type` whose *enum* holds
        # "ai"; pydantic writes `const`.
        written = handler.resolve_ref_schema(handler(schema))
        for option in written["anyOf"]:
            kind = handler.resolve_ref_schema(option)["properties"]["type"]
            kind["enum"] = [kind.pop("const", kind.get("default"))]
        return written


class Fitted(ChatPromptValue):
    """The conversation that the model is shown."""

    messages_left_out: int

    def tell(self, answer: BaseMessage) -> BaseMessage:
        """A copy of the answer that says how many messages were left out; 0 is said, too."""
        told = {**answer.response_metadata, "messages_left_out": self.messages_left_out}
        return answer.model_copy(update={"response_metadata": told})


def fit(model: BaseChatModel, chat_input: Mapping[str, Any], configurable: Mapping[str, Any]) -> Fitted:
    """Lay out the conversation that the model is shown.

    A `system_prompt` is put in front of the first message's, where that is a system message: there are templates that
    take no second one. A last turn that alone does not fit is left to the model to refuse.

    Raises InputError, and what the model raises when it counts.
    """
    on_overflow = configurable.get("on_overflow") or "trim"
    if on_overflow not in ("trim", "error"):
        raise InputError("on_overflow", f"on_overflow must be trim or error, got {on_overflow!r}")
    messages = _instructed(convert_to_messages(chat_input["messages"]), configurable.get("system_prompt") or "")
    kept = messages
    if on_overflow == "trim":
        kept = trim_to_fit(Measure(model), messages, max_tokens=configurable.get("max_tokens"))
    return Fitted(messages=kept, messages_left_out=len(messages) - len(kept))


def _instructed(messages: list[BaseMessage], system_prompt: str) -> list[BaseMessage]:
    if not system_prompt.strip():
        return messages
    if not messages or not isinstance(messages[0], SystemMessage):
        return [SystemMessage(system_prompt), *messages]
    own, *others = messages
    both = merge_content(f"{system_prompt}\n\n", own.content) if own.content else system_prompt
    return [SystemMessage(both), *others]


class Fitting(RunnableLambda[dict[str, Any], Fitted]):
    """Turns an input into what the model is shown. For async callers a thread does it: counting long texts takes time,
    and ends when they are cancelled."""

    def __init__(self, model: BaseChatModel) -> None:
        def fit_input(chat_input: dict[str, Any], config: RunnableConfig) -> Fitted:
            return fit(model, chat_input, config.get("configurable", {}))

        async def afit_input(chat_input: dict[str, Any], config: RunnableConfig) -> Fitted:
            return await run_cancellable(fit_input, chat_input, config)

        super().__init__(fit_input, afit_input, name="fit")

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return list(CHAT_OPTIONS)


class Answering(RunnableSerializable[Fitted, BaseMessage]):
    """From what the model is shown to its answer, which says what was left out. The only run to be seen is the model's:
    a layer with a run of its own would send every token once more to whoever follows the runs."""

    answer: Annotated[WithOptions, SkipValidation]

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return self.answer.config_specs

    def invoke(self, input: Fitted, config: RunnableConfig | None = None, **kwargs: Any) -> BaseMessage:  # noqa: A002
        return input.tell(self.answer.invoke(input, config, **kwargs))

    async def ainvoke(self, input: Fitted, config: RunnableConfig | None = None, **kwargs: Any) -> BaseMessage:  # noqa: A002
        return input.tell(await self.answer.ainvoke(input, config, **kwargs))

    def stream(self, input: Fitted, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[BaseMessage]:  # noqa: A002
        tell: Callable[[BaseMessage], BaseMessage] = input.tell  # once: where chunks are added up, so are numbers
        for chunk in self.answer.stream(input, config, **kwargs):
            yield tell(chunk)
            tell = _as_it_is

    async def astream(
        self,
        input: Fitted,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[BaseMessage]:
        tell: Callable[[BaseMessage], BaseMessage] = input.tell
        async for chunk in self.answer.astream(input, config, **kwargs):
            yield tell(chunk)
            tell = _as_it_is


def _as_it_is(chunk: BaseMessage) -> BaseMessage:
    return chunk


def build(model: BaseChatModel) -> Chain:
    """Build the chat chain over a model."""
    answer = with_options(model)
    runnable: Runnable[Any, Any] = Fitting(model) | Answering(answer=answer)
    return Chain(
        name="chat",
        description="Continue a conversation.",
        runnable=runnable.with_types(input_type=ChatInput, output_type=ChatOutput),
        input_type=ChatInput,
        messages=lambda chat_input, configurable: fit(model, chat_input, configurable).to_messages(),
        options=answer.options,
        example=EXAMPLE,
        playground="chat",
    )
