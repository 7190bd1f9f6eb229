"""How a long text is cut into what is translated at once. Knows no model but by its count of tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
    """White space, marks, code: comes out as it is."""
    words: str
    """What is to be translated; no white space around it."""
    written: str
    """How that stands in the text: the same, but for line ends and marks where it is wrapped in a list or quote."""
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
    head = ""
    for part in parts(text):
        if part.is_fixed:
            head += part.text
            continue
        for before, words, written, after in _pieces(part, budget=budget, count=count):
            head += before
            if not has_words(words):
                head += written + after
                continue
            end += len(head) + len(written)
            yield Segment(index=index, head=head, words=words, written=written, is_line=part.is_line, end=end)
            index += 1
            head = after
    if head:
        yield Segment(index=index, head=head, words="", written="", end=end + len(head))


def _pieces(part: Part, *, budget: int, count: Count) -> Iterator[tuple[str, str, str, str]]:
    """Words that fit, how they stand in the text, and the white space before and after them."""
    for index, piece in enumerate(cut(part.words, budget=budget, count=count)):
        words = piece.strip()
        before, _, after = piece.partition(words)
        if part.shown is None:
            yield before, words, words, after
        else:  # not even its line ends are as they stand in the text: the first piece stands for all of it
            yield "", words, "" if index else part.text, ""


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
