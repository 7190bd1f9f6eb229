"""How a long text is cut into what is translated at once. Knows no model but by its count of tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from chains.cancellable import checkpoint
from chains.documents.cutting import cut
from chains.documents.inline import has_words
from chains.documents.markup import Part, parts

Count = Callable[[str], int]

CONTEXT_TOKENS = 64
"""Of what stands before, and of what stands after the words of a segment, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a text: something that stays, then words. One of a text's segments may have no words."""

    index: int
    head: str
    """White space, marks, code: what stays."""
    lead: str
    """What comes out for it. The same, but between the pieces of words that are shown otherwise than they stand in the
    text (`Part.shown`): there, what stands between them as they are shown."""
    words: str
    """What is to be translated; no white space around it."""
    written: str
    """How that stands in the text: the same, but for words that are shown otherwise. Where such had to be cut, this is
    all of them for the first piece, and nothing for the others."""
    is_line: bool = False
    """What stands for the words must be one line."""
    end: int
    """Characters of the text up to its end."""
    before: str = ""
    after: str = ""
    """The words around, for context."""

    @property
    def source(self) -> str:
        """All of it."""
        return self.head + self.written


def segments(text: str, *, budget: int, count: Count) -> Iterator[Segment]:
    """Cut a text into segments, lazily: the sources put together are the text.

    Args:
        text: Markdown or plain.
        budget: Tokens of a segment's words at most.
        count: Tokens of a text.
    """
    previous: Segment | None = None
    for each in _alone(text, budget=budget, count=count):
        segment = each
        if previous is not None:
            yield replace(previous, after=_cropped(each.words, count))
            segment = replace(each, before=_cropped(previous.words, count, is_end=True))
        previous = segment
    if previous is not None:
        yield previous


def _alone(text: str, *, budget: int, count: Count) -> Iterator[Segment]:
    """The segments, without what is around them."""
    index = end = 0
    # Lists, joined once: a text may have a protected part every two characters, and each concatenation copies all.
    heads: list[str] = []
    leads: list[str] = []
    for part in parts(text):
        checkpoint()
        pieces = [] if part.is_fixed else [*_Piece.of(part, budget=budget, count=count)]
        if not pieces:
            heads.append(part.text)
            leads.append(part.text)
        for piece in pieces:
            heads.append(piece.head)
            leads.append(piece.lead)
            if piece.words:
                head = "".join(heads)
                end += len(head) + len(piece.written)
                yield Segment(
                    index=index,
                    head=head,
                    lead="".join(leads),
                    words=piece.words,
                    written=piece.written,
                    is_line=part.is_line,
                    end=end,
                )
                index += 1
                heads, leads = [], []
    head, lead = "".join(heads), "".join(leads)
    if head or lead:
        yield Segment(index=index, head=head, lead=lead, words="", written="", end=end + len(head))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Words that fit, and what stands before them; the last of a part may have no words."""

    head: str
    lead: str
    words: str = ""
    written: str = ""

    @classmethod
    def of(cls, part: Part, *, budget: int, count: Count) -> Iterator[Self]:
        """Cut a part; there are none of a part without words."""
        is_shown_otherwise = part.shown is not None
        before, has_any = "", False
        for piece in cut(part.words, budget=budget, count=count):
            if not has_words(piece):
                before += piece
                continue
            words = piece.strip()
            start, _, end = piece.partition(words)
            before += start
            if is_shown_otherwise:  # not even its line ends are as they stand in the text
                yield cls("", before, words, "" if has_any else part.text)
            else:
                yield cls(before, before, words, words)
            before, has_any = end, True
        if has_any and before:
            yield cls("" if is_shown_otherwise else before, before)


def _cropped(text: str, count: Count, *, is_end: bool = False) -> str:
    """The beginning or the end of a text, whole words if it has any."""
    size = CONTEXT_TOKENS * 4
    while size:
        if size >= len(text):
            cropped = text
        elif is_end:
            cropped = text[-size:].partition(" ")[2] or text[-size:]
        else:
            cropped = text[:size].rpartition(" ")[0] or text[:size]
        if count(cropped) <= CONTEXT_TOKENS:
            return cropped
        size //= 2
    return ""
