"""Messages as callers may write them, made into LangChain's: its own `type`, OpenAI's `role`, and pairs."""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import PlainValidator, WithJsonSchema

ROLES = {
    "human": "human",
    "HumanMessageChunk": "human",
    "user": "human",
    "ai": "ai",
    "AIMessageChunk": "ai",
    "assistant": "ai",
    "system": "system",
    "SystemMessageChunk": "system",
    "tool": "tool",
    "ToolMessageChunk": "tool",
}
"""How callers name the four roles."""


def parse_message(value: object) -> BaseMessage:
    """Make a message. Unknown keys are tolerated: clients send their own along. Raises ValueError."""
    if isinstance(value, BaseMessage):
        value = value.model_dump()
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(item, str) for item in value):
        value = {"role": value[0], "content": value[1]}
    if not isinstance(value, Mapping):
        raise ValueError('a message is {"type": …, "content": …}, {"role": …, "content": …} or a pair [role, content]')
    role, content = _role(value), _text(value.get("content"))
    if role == "tool":
        tool_call_id = value.get("tool_call_id")
        if not isinstance(tool_call_id, str) or not tool_call_id:
            raise ValueError("a tool message needs the tool_call_id that it answers")
        return ToolMessage(content, tool_call_id=tool_call_id)
    if role == "human":
        if not content.strip():
            raise ValueError("the content of a human message must not be empty")
        return HumanMessage(content)
    if role == "ai":
        if value.get("tool_calls") or value.get("invalid_tool_calls"):
            raise ValueError("the tool calls of a message cannot be shown to this model")
        return AIMessage(content)
    return SystemMessage(content)


def _role(message: Mapping[Any, Any]) -> str:
    # LangChain's ChatMessage has the type "chat" and says its role apart.
    names = [message[key] for key in ("type", "role") if message.get(key) is not None and message[key] != "chat"]
    roles = {ROLES.get(name) if isinstance(name, str) else None for name in names}
    if None in roles or len(roles) != 1:
        got = ", ".join(map(_short, names)) or "none"
        raise ValueError(f"the role of a message is user (human), assistant (ai), system or tool; got {got}")
    return str(roles.pop())


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("the content of a message is text or a list of text blocks")
    return "".join(map(_block_text, content))


def _block_text(block: object) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    raise ValueError(f"only text blocks are supported in the content of a message; got {_short(kind)}")


def _short(value: object) -> str:
    """A caller's value as an error message quotes it: callers may send megabytes."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    return brief.repr(value)


Message = Annotated[
    BaseMessage,
    PlainValidator(parse_message),
    WithJsonSchema(
        {
            "title": "Message",
            "type": "object",
            "properties": {
                "type": {"type": "string", "enum": ["human", "ai", "system", "tool"]},
                "content": {"type": "string"},
            },
            "required": ["type", "content"],
            "additionalProperties": True,
        }
    ),
]
"""One message of a conversation, as a pydantic type."""
