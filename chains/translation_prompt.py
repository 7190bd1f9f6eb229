"""What a model is shown to translate some words, and how many tokens that and its answer may take."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from langchain_core.messages import BaseMessage
from langchain_core.prompts import ChatPromptTemplate

from chains.documents.languages import Language
from chains.documents.measure import Measure
from chains.segments import CONTEXT_TOKENS
from chains.texts import instructions

SEGMENT_TOKENS = 300
"""Of the words that are translated at once, at most."""

GROWTH = 4
GROWTH_BEYOND_LATIN = 9
"""Tokens of a translation for each of its source, at most; twice as many at the second try. What takes more than that
is no translation, but a model that does not find its end. Scripts of which a tokenizer knows few words take many:
from English into Thai 5 to 8 times as many, by the tokenizer of SmolLM2."""

EXTRA_TOKENS = 32
"""More, for the shortest."""

MIN_BUDGET = 16
"""Of the words of a segment: with room for less, nothing can be translated."""

PROMPT = ChatPromptTemplate(
    [
        instructions(
            "You are a professional translator. Answer with the translation of the user's text alone, without notes "
            "or quotation marks. Keep meaning, tone and formatting; code, URLs, tags and placeholders stay as they "
            "are.{context} Translate{source} into {target}.{formality}{glossary}"
        ),
        ("human", "{words}"),
    ]
)
"""The order comes last: small models take what comes last for it."""

CONTEXT = "\n\nThe text stands between these two, which you do not translate:\n{before}\n…\n{after}\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked of a translation."""

    source: Language | None
    target: Language
    formality: Literal["formal", "informal"] | None
    glossary: Mapping[str, str]

    def messages(self, words: str, before: str = "", after: str = "") -> list[BaseMessage]:
        """What the model is shown."""
        terms = self.terms_in(words)
        return PROMPT.format_messages(
            source=f" from {self.source.name}" if self.source else "",
            target=self.target.name,
            formality=f" Use {self.formality} language." if self.formality else "",
            glossary="".join(f"\nTranslate “{term}” as “{terms[term]}”." for term in terms),
            context=CONTEXT.format(before=before, after=after) if before or after else "",
            words=words,
        )

    def terms_in(self, words: str) -> dict[str, str]:
        """The terms of the glossary that stand in a text."""
        text = folded(words)
        return {term: self.glossary[term] for term in self.glossary if _stands_in(folded(term), text)}

    @property
    def growth(self) -> int:
        """Tokens of a translation for each of its source, at most."""
        return GROWTH if self.target.is_latin else GROWTH_BEYOND_LATIN

    def answer_tokens(self, num_tokens: int, *, times: int = 1) -> int:
        """Tokens of an answer to words of so many, at most; so many `times` as much at a later try."""
        return times * self.growth * num_tokens + EXTRA_TOKENS

    def overhead(self, measure: Measure) -> int:
        """Tokens of a prompt besides the words, at most."""
        every = " ".join(self.glossary)
        return measure.count_messages(self.messages(every, before="…", after="…")) + 2 * CONTEXT_TOKENS


def segment_tokens(wish: Wish, measure: Measure, *, max_tokens: int | None) -> int:
    """Tokens of words that fit into the model's context together with all else; less than `MIN_BUDGET` if few do.

    Args:
        wish: What is asked for.
        measure: The model's.
        max_tokens: Of an answer; None: as many as a translation may take.
    """
    room = measure.context - wish.overhead(measure)
    if max_tokens is not None:
        return min(SEGMENT_TOKENS, room - max_tokens)
    return min(SEGMENT_TOKENS, (room - EXTRA_TOKENS) // (1 + 2 * wish.growth))


def _stands_in(term: str, words: str) -> bool:
    """Whether a term is there, as a word of its own where its script has capitals: those have spaces, too.

    Both are folded. To look for the bare term first costs next to nothing, while a pattern compares it anew at each
    place; most terms are not there.
    """
    if term not in words:
        return False
    before, after = r"(?<!\w)" if _is_cased(term[0]) else "", r"(?!\w)" if _is_cased(term[-1]) else ""
    return re.search(before + re.escape(term) + after, words) is not None


def folded(text: str) -> str:
    """A text as terms are compared: in any case, with any white space."""
    return " ".join(text.casefold().split())


def _is_cased(letter: str) -> bool:
    return letter.isdigit() or letter.lower() != letter.upper()
