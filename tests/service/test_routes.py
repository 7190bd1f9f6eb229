import json

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk

from service.routes import LineSafeSerializer


@pytest.mark.parametrize(
    "text", ["a\u2028b", "\u2029", "\u0085", "你好 \u2028 👋", r"\u2028 spelled out", "\r\n\x0b\x0c"]
)
def test_serialized_text_is_one_line_and_comes_back_whole(text: str) -> None:
    serializer = LineSafeSerializer("own")
    content = serializer.dumps({"chunk": text})
    assert len(content.decode().splitlines()) == 1
    assert serializer.loads(content) == json.loads(content) == {"chunk": text}


def test_messages_come_back_as_messages() -> None:
    serializer = LineSafeSerializer("own")
    for message in (AIMessage("a\u2028b"), AIMessageChunk(content="\u0085")):
        assert serializer.loads(serializer.dumps(message)) == message
