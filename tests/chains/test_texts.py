"""The chains' own words, and the mark on them: what is the same for everybody, and nothing that anybody wrote."""

from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import BaseMessage

from chains import summarize, translate
from chains.chat import ChatInput
from chains.texts import instructions

INPUTS: dict[str, list[dict[str, Any]]] = {
    "translate": [
        {"text": "My secret is {this}.", "target_language": "Klingon"},
        {"text": "{{", "target_language": "German", "source_language": "Old Norse"},
        {"text": "Translate the user's text", "target_language": "中文", "source_language": None},
    ],
    "summarize": [
        {"text": "My secret is {this}."},
        {"text": "}{", "style": "bullets", "max_words": 30, "language": "Klingon", "focus": "My secret?"},
        {"text": "You summarize texts.", "style": "headline", "max_words": None, "language": None},
    ],
}
BUILDERS = {"translate": translate.build, "summarize": summarize.build}


def first_message(name: str, value: dict[str, Any]) -> BaseMessage:
    return BUILDERS[name](FakeListChatModel(responses=[])).messages(value, {})[0]


def marked(message: BaseMessage) -> str:
    """The part of a message that it says is the same for everybody."""
    return message.text[: message.additional_kwargs["shared_chars"]]


@pytest.mark.parametrize("name", INPUTS)
def test_what_a_chain_marks_is_the_same_whoever_asks_for_whatever(name: str) -> None:
    messages = [first_message(name, value) for value in INPUTS[name]]

    (words,) = {marked(message) for message in messages}

    assert len({message.text for message in messages}) == len(messages)
    assert "ecret" not in words
    assert words.startswith("You ")
    assert len(words) > 40


@pytest.mark.parametrize(
    ("template", "values", "words"),
    [
        ("Say {what}.", {"what": "{x}"}, "Say "),
        ("Say {what} to {whom}.", {"what": "Say ", "whom": ""}, "Say "),
        ("{what} is said.", {"what": "My secret"}, ""),
        ("Say it.", {}, "Say it."),
        ("Say {what!r:>9}.", {"what": 1}, "Say "),
        ("Grüße, 🙂: {what}", {"what": "x"}, "Grüße, 🙂: "),
    ],
)
def test_the_mark_ends_before_the_first_variable(template: str, values: dict[str, Any], words: str) -> None:
    assert marked(instructions(template).format(**values)) == words


@pytest.mark.parametrize("what", ["My secret", "{x}", "}}", ""])
def test_braces_that_are_text_count_as_what_they_look_like(what: str) -> None:
    """Written twice in a template and once in the text: counted in the template, the mark would reach too far."""
    message = instructions("Use {{braces}} and {{{{more}}}}: {what}").format(what=what)

    assert message.text == f"Use {{braces}} and {{{{more}}}}: {what}"
    assert "Use {braces} and {{more}}: ".startswith(marked(message))
    assert marked(message)


def test_callers_cannot_mark_their_own_words() -> None:
    """Or they could ask, by the time that it takes, whether somebody else has sent the same."""
    sent = {"type": "system", "content": "A guess.", "additional_kwargs": {"shared_chars": 8}, "shared_chars": 8}

    conversation = ChatInput.model_validate({"messages": [sent, {"role": "user", "content": "Hi!"}]})

    assert conversation.messages[0].additional_kwargs == {}
