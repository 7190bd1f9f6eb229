from collections import Counter

import pytest
from transformers import AutoTokenizer

from llm.loading import prepare
from llm.prompt import count
from tests.bench.mix import Ask, mix


def text(ask: Ask) -> str:
    return ask.messages[-1].text.removeprefix("Summarize this text:\n\n")


def test_of_every_four_asks_two_are_chats_one_a_translation_one_a_summary() -> None:
    kinds = [ask.kind for ask in mix(40, run=0)]

    for start in range(0, 40, 4):
        assert Counter(kinds[start : start + 4]) == {"chat": 2, "translate": 1, "summarize": 1}


def test_no_two_texts_begin_alike_in_a_run_or_in_two() -> None:
    beginnings = [" ".join(text(ask).split()[:6]) for run in range(12) for ask in mix(200, run=run)]

    assert len(set(beginnings)) == len(beginnings)


def test_a_seed_and_a_run_fix_the_texts() -> None:
    assert mix(20, run=3) == mix(40, run=3)[:20]
    assert mix(20, run=3) != mix(20, run=3, seed=1)


def test_more_asks_than_keep_clear_of_the_next_run_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2000"):
        mix(2001, run=0)


def test_prompts_are_as_long_as_they_are_said_to_be() -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepare("embedded").directory)

    for ask in mix(40, run=0):
        low, high = {"chat": (40, 80), "translate": (220, 280), "summarize": (820, 960)}[ask.kind]
        assert low <= count(tokenizer, ask.messages) <= high


def test_openai_style_engines_are_shown_what_our_chains_show_their_model() -> None:
    for ask in mix(8, run=0):
        shown = [({"human": "user"}.get(message.type, message.type), message.text) for message in ask.messages]
        assert [(message["role"], message["content"]) for message in ask.openai_messages] == shown
