"""Serves chains whose every text, and whose every answer, would be a script if it were taken for markup."""

import sys
from typing import Annotated

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from pydantic import BaseModel, ConfigDict, Field

import serve
from chains import Chain, chat
from llm import ScriptedEngine
from service.settings import read_settings

HOSTILE = '</script><script>window.stranger = 1</script><img src="x" onerror="window.stranger = 2">'


class Text(BaseModel):
    """A text."""

    model_config = ConfigDict(extra="forbid", title=HOSTILE)

    text: Annotated[str, Field(title=HOSTILE, description=HOSTILE, examples=[HOSTILE])] = HOSTILE


class Messages(chat.ChatInput):
    """A conversation."""

    model_config = ConfigDict(title=HOSTILE)


def build_chains(model: BaseChatModel) -> list[Chain]:
    """One chain for each playground."""
    form = Chain.of(
        ChatPromptTemplate([("human", "{text}")]),
        model,
        StrOutputParser(),
        input_type=Text,
        output_type=str,
        name="form",
        description=HOSTILE,
        example={"text": HOSTILE},
    )
    conversation = Chain.of(
        ChatPromptTemplate([MessagesPlaceholder("messages")]),
        model,
        input_type=Messages,
        output_type=chat.ChatOutput,
        name="chat",
        description=HOSTILE,
        example=chat.EXAMPLE,
        playground="chat",
    )
    return [form, conversation]


if __name__ == "__main__":
    serve.build_chains = build_chains  # type: ignore[attr-defined]  # it is imported there
    settings = read_settings(sys.argv[1:])
    sys.exit(serve.run(settings, ScriptedEngine(lambda _: HOSTILE)))
