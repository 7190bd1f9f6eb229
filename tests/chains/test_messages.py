from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
)

from chains.messages import parse_message


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"type": "human", "content": "Hi!"}, HumanMessage("Hi!")),
        ({"type": "ai", "content": "Hi!"}, AIMessage("Hi!")),
        ({"type": "system", "content": "Hi!"}, SystemMessage("Hi!")),
        ({"type": "tool", "content": "Hi!", "tool_call_id": "1"}, ToolMessage("Hi!", tool_call_id="1")),
        ({"role": "user", "content": "Hi!"}, HumanMessage("Hi!")),
        ({"role": "assistant", "content": "Hi!"}, AIMessage("Hi!")),
        ({"role": "system", "content": "Hi!"}, SystemMessage("Hi!")),
        ({"role": "tool", "content": "Hi!", "tool_call_id": "1"}, ToolMessage("Hi!", tool_call_id="1")),
        (["user", "Hi!"], HumanMessage("Hi!")),
        (("ai", "Hi!"), AIMessage("Hi!")),
        (["system", "Hi!"], SystemMessage("Hi!")),
        ({"type": "AIMessageChunk", "content": "Hi!"}, AIMessage("Hi!")),
        ({"type": "chat", "role": "user", "content": "Hi!"}, HumanMessage("Hi!")),
        ({"type": "human", "role": "user", "content": "Hi!"}, HumanMessage("Hi!")),
        ({"type": "ai", "content": "Hi!", "runId": "1", "id": "2", "tool_calls": []}, AIMessage("Hi!")),
        ({"type": "ai", "content": ""}, AIMessage("")),
        ({"type": "human", "content": ["Hi", {"type": "text", "text": "!"}]}, HumanMessage("Hi!")),
        ({"type": "human", "content": " Hi!\n"}, HumanMessage(" Hi!\n")),
        (HumanMessage("Hi!", id="1"), HumanMessage("Hi!")),
        (HumanMessageChunk(content="Hi!"), HumanMessage("Hi!")),
        (AIMessageChunk(content="Hi!"), AIMessage("Hi!")),
        (ChatMessage(content="Hi!", role="assistant"), AIMessage("Hi!")),
        (ToolMessage("Hi!", tool_call_id="1"), ToolMessage("Hi!", tool_call_id="1")),
    ],
)
def test_a_message_may_be_written_in_many_ways(written: Any, message: Any) -> None:
    assert parse_message(written) == message


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Hi!", "a message is"),
        (None, "a message is"),
        (5, "a message is"),
        (["user"], "a message is"),
        (["user", "Hi!", "you"], "a message is"),
        (["user", 5], "a message is"),
        ({}, "got none"),
        ({"content": "Hi!"}, "got none"),
        ({"role": "bob", "content": "Hi!"}, "got 'bob'"),
        (["bob", "Hi!"], "got 'bob'"),
        ({"type": ["human"], "content": "Hi!"}, r"got \['human'\]"),
        ({"type": "human", "role": "assistant", "content": "Hi!"}, "got 'human', 'assistant'"),
        ({"type": "function", "name": "f", "content": "Hi!"}, "got 'function'"),
        ({"type": "remove", "id": "1"}, "got 'remove'"),
        ({"type": "chat", "content": "Hi!"}, "got none"),
        ({"type": "human"}, "text or a list of text blocks"),
        ({"type": "human", "content": 5}, "text or a list of text blocks"),
        ({"type": "human", "content": {"text": "Hi!"}}, "text or a list of text blocks"),
        ({"type": "human", "content": ""}, "must not be empty"),
        ({"type": "human", "content": []}, "must not be empty"),
        ({"type": "human", "content": " \n"}, "must not be empty"),
        ({"type": "human", "content": [5]}, "only text blocks .* got 'int'"),
        ({"type": "human", "content": [{"type": "image_url"}]}, "only text blocks .* got 'image_url'"),
        ({"type": "human", "content": [{"type": "text", "text": 5}]}, "only text blocks"),
        ({"type": "tool", "content": "Hi!"}, "tool_call_id"),
        ({"type": "tool", "content": "Hi!", "tool_call_id": ""}, "tool_call_id"),
        ({"type": "tool", "content": "Hi!", "tool_call_id": 5}, "tool_call_id"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(written: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_message(written)


@pytest.mark.parametrize(
    "message",
    [{"role": "x" * 10_000, "content": "Hi!"}, {"role": "user", "content": [{"type": "x" * 10_000}]}],
)
def test_an_error_quotes_little_of_a_long_value(message: Any) -> None:
    with pytest.raises(ValueError, match="got 'xxx") as caught:
        parse_message(message)
    assert len(str(caught.value)) < 300
