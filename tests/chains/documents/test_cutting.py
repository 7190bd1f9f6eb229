"""Cutting: nothing lost, nothing over budget, where a reader would cut, at a cost that grows with the length."""

import re
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chains.documents.cutting import MIN_BUDGET, cut
from llm.loading import prepare
from llm.prompt import encode_text
from llm.scripted_engine import byte_tokenizer

BOOK = (Path(__file__).parents[2] / "texts" / "pride-and-prejudice.txt").read_text()

HARD = [
    "word",
    " ",
    "\n\n",
    "\n",
    "\r\n",
    "\r",
    "\u2028",
    "\0",
    "\t",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "\U0010ffff",
    "A sentence. ",
    "Another one? ",
    "我们去吃饭。你好吗？",
    "ภาษาไทยไม่มีช่องว่าง",
    "e\u0301\u0323\u0308",
    "👨‍👩‍👧‍👦",
    "🇩🇪🇫🇷",
    "\u0600\u0600",
    "<|im_start|>",
    "<|eot_id|>",
    "Donaudampfschifffahrtsgesellschaftskapitän",
]
"""What cutters stumble on: runs without a space, clusters of many code points, line ends, special tokens."""

runs = st.builds(lambda piece, times: piece * times, st.sampled_from(HARD), st.integers(1, 40))
texts = st.lists(st.one_of(st.text(max_size=60), st.sampled_from(HARD), runs), max_size=12).map("".join)
budgets = st.one_of(st.integers(MIN_BUDGET, 40), st.integers(MIN_BUDGET, 400))


@lru_cache(maxsize=1)
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        prepare("embedded").directory, local_files_only=True
    )
    return tokenizer


def embedded_tokens(text: str) -> int:
    return len(encode_text(embedded_tokenizer(), text))


@lru_cache(maxsize=1)
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def byte_tokens(text: str) -> int:
    return len(encode_text(bytes_tokenizer(), text))


def quarter_of_characters(text: str) -> int:
    return len(text) // 4 + 1


def moody(text: str) -> int:
    """More than its parts together at times, and at times less than a part of it."""
    return len(text) + 3 * (len(text) % 3 == 0) - len(text) // 5 * (text[-1:] == " ")


COUNTERS = [embedded_tokens, byte_tokens, quarter_of_characters, moody]


@pytest.mark.parametrize("count", COUNTERS)
@settings(max_examples=550, deadline=None)
@given(text=texts, budget=budgets)
@example(text="\n00000\n", budget=8)
def test_pieces_are_the_text_none_is_empty_and_none_is_over_budget(
    count: Callable[[str], int], text: str, budget: int
) -> None:
    pieces = cut(text, budget=budget, count=count)
    assert "".join(pieces) == text
    assert all(pieces)
    assert all(count(piece) <= budget for piece in pieces)
    assert len(pieces) <= 1 or count(text) > budget, "cut although it fits"


@settings(max_examples=200, deadline=None)
@given(text=texts.map(lambda text: text * 20), budget=budgets)
def test_pieces_are_as_large_as_fits(text: str, budget: int) -> None:
    """No two neighbours would fit into one, but for the last two, which may have been made alike."""
    pieces = cut(text, budget=budget, count=len)
    assert all(len(piece) + len(following) > budget for piece, following in pairwise(pieces[:-2]))


def test_paragraphs_stay_whole_where_they_fit() -> None:
    paragraphs = [f"This is paragraph {i}. It has two sentences.\n\n" for i in range(50)]
    pieces = cut("".join(paragraphs), budget=120, count=len)
    assert all(piece.count("This is") * 2 == piece.count(".") for piece in pieces)
    assert all(len(piece) > 60 for piece in pieces[:-1])


def test_a_long_paragraph_is_cut_at_its_sentences() -> None:
    sentences = [f"Sentence number {i} says something about cats and dogs. " for i in range(40)]
    pieces = cut("".join(sentences), budget=200, count=len)
    assert len(pieces) > 5
    assert all(piece.startswith("Sentence") and piece.rstrip().endswith("dogs.") for piece in pieces)


def test_a_sentence_that_does_not_fit_is_cut_between_words() -> None:
    pieces = cut("lorem ipsum " * 100, budget=50, count=len)
    assert all(piece.split() == re.findall("lorem|ipsum", piece) for piece in pieces)


@pytest.mark.parametrize("cluster", ["e\u0301\u0323", "👨‍👩‍👧", "🇩🇪", "각"])
def test_what_readers_see_as_one_character_is_not_torn(cluster: str) -> None:
    pieces = cut(cluster * 300, budget=40, count=len)
    assert all(piece == cluster * (len(piece) // len(cluster)) for piece in pieces)


def test_chinese_is_cut_after_its_full_stops() -> None:
    pieces = cut("我们今天去公园吃饭。你们明天也来吗？" * 50, budget=60, count=len)
    assert all(piece[-1] in "。？" for piece in pieces)


@pytest.mark.parametrize("size", [1.02, 1.1, 1.3])
def test_no_crumb_is_left_at_the_end(size: float) -> None:
    budget = 400
    paragraph = ("It was a bright cold day, and so on. " * 100)[: int(budget * size)]
    *_, before, last = cut(paragraph, budget=budget, count=len)
    assert min(len(before), len(last)) >= budget // 4


def test_a_book_is_cut_into_full_pieces() -> None:
    pieces = cut(BOOK, budget=400, count=embedded_tokens)
    sizes = [embedded_tokens(piece) for piece in pieces]
    assert "".join(pieces) == BOOK
    assert max(sizes) <= 400
    assert sum(sizes) / len(sizes) > 300


@pytest.mark.parametrize("unit", ["A sentence of some words. ", "x", "中", "👨‍👩‍👧‍👦", "\n", "\r\n\r\n", "e\u0301"])
def test_the_cost_grows_with_the_length_and_no_faster(unit: str) -> None:
    """The library alone is quadratic where there are no spaces: 150 seconds for a megabyte of Chinese."""

    def counted(length: int) -> int:
        total = 0

        def count(text: str) -> int:
            nonlocal total
            total += len(text)
            return len(text) // 4 + 1

        cut(unit * (length // len(unit)), budget=200, count=count)
        return total

    assert counted(1_000_000) <= 12 * counted(100_000)


def test_what_counts_little_makes_what_follows_no_dearer() -> None:
    """A window that had grown for one huge piece stayed so: here half a minute instead of 3 s, all in the library."""

    def count(text: str) -> int:
        return len(text.strip()) + text.count(" ") // 800

    start = time.monotonic()
    cut(" " * 150_000 + "中" * 300_000, budget=200, count=count)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("budget", [-1, 0, 1, MIN_BUDGET - 1])
def test_a_budget_that_is_too_small_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        cut("text", budget=budget, count=len)


def test_a_character_that_fits_no_budget_is_named() -> None:
    with pytest.raises(ValueError, match="'x', which counts 100"):
        cut("xx", budget=10, count=lambda text: 100 * len(text))


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        cut("a\ud800b " * 20, budget=10, count=len)


def test_nothing_is_cut_into_nothing() -> None:
    assert cut("", budget=10, count=len) == []
