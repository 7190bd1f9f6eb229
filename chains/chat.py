"""The chat chain: a conversation in, the assistant's next message out."""

from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, RootModel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from chains.chain import Chain
from chains.messages import Message

prompt = ChatPromptTemplate([MessagesPlaceholder("messages")])
"""From an input to what the model is shown."""

EXAMPLE: dict[str, Any] = {"messages": [{"type": "human", "content": "What is the capital of France?"}]}


MAX_MESSAGES = 10_000
"""More than any context holds; to lay out hundreds of thousands just to count them would take minutes."""


class ChatInput(BaseModel):
    """A conversation, oldest message first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatOutput(RootModel[AIMessage | AIMessageChunk]):
    """The assistant's message."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # LangServe's chat playground opens only if some option of a top-level `anyOf` has a `type` whose *enum* holds
        # "ai"; pydantic writes `const`.
        written = handler.resolve_ref_schema(handler(schema))
        for option in written["anyOf"]:
            kind = handler.resolve_ref_schema(option)["properties"]["type"]
            kind["enum"] = [kind.pop("const", kind.get("default"))]
        return written


def build(model: BaseChatModel) -> Chain:
    """Build the chat chain over a model."""
    return Chain.of(
        prompt,
        model,
        name="chat",
        description="Continue a conversation.",
        input_type=ChatInput,
        output_type=ChatOutput,
        example=EXAMPLE,
        playground="chat",
    )
