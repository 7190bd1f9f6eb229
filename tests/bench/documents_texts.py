"""Texts for measurements of documents: a real one of thirty pages, others of any length made of its paragraphs, and
small ones that ask for something that can be counted afterwards."""

import re
import sys
from random import Random

from tests.server import ROOT

PAGE_WORDS = 500

_BOOK = ROOT / "tests" / "texts" / "pride-and-prejudice.txt"

GLOSSARY = {
    "sister": "Schwester",
    "mother": "Mutter",
    "friend": "Freund",
    "dance": "Tanz",
    "letter": "Brief",
    "house": "Haus",
    "daughters": "Töchter",
    "horse": "Pferd",
    "evening": "Abend",
    "marriage": "Ehe",
}
"""Words of the book, and what they are to be called."""

MARKS = ("{name}", "%s", "`max_tokens`", "${HOME}", "https://example.org/a?b=1", "<br>")
"""What must stay as it is in a translation."""

_SENTENCES = (
    "The order of {} has been sent to the warehouse this morning.",
    "Please write to {} before the end of the week.",
    "We could not find {} in the list of customers.",
    "If {} does not answer, try it again after a few minutes.",
    "The value of {} was changed by another user yesterday.",
)


def book() -> str:
    """The real text, some thirty pages."""
    return _BOOK.read_text()


def cropped(text: str, pages: float) -> str:
    """The first pages of a text, whole words."""
    words = round(pages * PAGE_WORDS)
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) < words:
        raise ValueError(f"the text has {len(ends)} words, not {words}")
    return text[: ends[words - 1]]


def shuffled(pages: float, *, seed: int) -> str:
    """As many pages of the book's paragraphs in an order of that seed, all of them before any comes again.

    No model's cache knows a paragraph among other neighbours, and each part of the text is like any other: the book
    itself begins with talk, in short lines, and goes on with narration.
    """
    random = Random(f"{seed} {pages}")
    paragraphs = [paragraph for paragraph in book().split("\n\n") if len(paragraph.split()) > 4]
    chosen: list[str] = []
    words = 0
    while words < pages * PAGE_WORDS:
        for paragraph in random.sample(paragraphs, len(paragraphs)):
            chosen.append(paragraph)
            words += len(paragraph.split())
    return cropped("\n\n".join(chosen), pages)


def paragraphs(count: int, *, words: range, seed: int) -> list[str]:
    """Paragraphs of the book with so many words, in an order of that seed."""
    fitting = _with_words(words)
    return Random(seed).sample(fitting, min(count, len(fitting)))


def term_texts(count: int, *, seed: int) -> list[tuple[str, str]]:
    """Paragraphs of the book, each with a word of the glossary that stands in it."""
    found: list[tuple[str, str]] = []
    for text in paragraphs(sys.maxsize, words=range(15, 120), seed=seed):
        terms = [term for term in GLOSSARY if re.search(rf"\b{term}\b", text)]
        if terms:
            found.append((text, min(terms, key=lambda term: sum(other == term for _, other in found))))
    return found[:count]


def _with_words(words: range) -> list[str]:
    return [paragraph for paragraph in book().split("\n\n") if len(paragraph.split()) in words]


def marked_texts(count: int) -> list[tuple[str, str]]:
    """Sentences, each with a mark in it that must stay."""
    pairs = [(sentence, mark) for sentence in _SENTENCES for mark in MARKS]
    return [(sentence.format(mark), mark) for sentence, mark in pairs][:count]
