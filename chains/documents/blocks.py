"""A long text block by block, as far as Markdown lets it be cut without a look at the rest.

A block ends at a blank line before a line that is not indented: no list, quote or table goes on there. Code in fences,
comments and the like may hold blank lines. A table that is too long goes on in the next block, which has its head.
Knows lines, not what is in them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

SOFT_LIMIT = 30_000
"""Characters after which a block ends at the next line that seems to begin something. Bounds the wait for the first."""

HARD_LIMIT = 60_000
"""Characters after which it ends anyway. Bounds how long one call of a pattern or of the parser takes."""

_LONGEST_LINE = 20_000
_FRONT_MATTER_LIMIT = 20_000

_LINE = re.compile(rf"[^\r\n]{{0,{_LONGEST_LINE}}}(?:\r\n|\r|\n)?")
_SENTENCE_END = re.compile(r".*(?:[.!?][\"'”’)]?\s|[。！？])", re.DOTALL)
_UNDERLINE = re.compile(r"[>\s]*[|:=-][\s|:=-]*\Z")
"""Of a table's head, or a heading: it belongs to the line before."""

_BEGINS = re.compile(r"[^\s>]")
# Possessive: with backtracking, each shorter run of backticks would be tried against the whole rest of the line.
_FENCE = re.compile(
    r"(?P<before>[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)*+)(?:(?P<ticks>`{3,}+)(?![^`\r\n]*+`)|(?P<tildes>~{3,}+))"
)
_RAW = re.compile(r" {0,3}<(?:(?P<tag>script|pre|style|textarea)\b|(?P<other>!--|\?|!\[CDATA\[))", re.IGNORECASE)
_RAW_END_TAG = re.compile(r"</(?:script|pre|style|textarea)>", re.IGNORECASE)
_RAW_ENDS = {"!--": "-->", "?": "?>", "![cdata[": "]]>"}
_FRONT_MATTER = re.compile(
    r"""\ufeff? (?: (?P<yaml>---) | \+{3} ) [ \t]{0,99}+ (?: \r\n | \r | \n )
        (?: \# [^\r\n]{0,500} [\r\n]{1,2} ){0,20}+   # comments, then a key: else it is a slide between rules
        (?: [\w."'\-]{1,100} [ \t]{0,99} (?(yaml) : (?!\S) | = ) | (?(yaml) (?!) | \[ ) )""",
    re.VERBOSE,
)
_YAML_END = re.compile(r"(?<=[\r\n])(?:---|\.\.\.)[ \t]*(?:\r\n|\r|\n|\Z)")
_TOML_END = re.compile(r"(?<=[\r\n])\+\+\+[ \t]*(?:\r\n|\r|\n|\Z)")


@dataclass(frozen=True, slots=True)
class Block:
    """Some lines of a text. A fixed one has no words, or none that may change."""

    text: str
    is_fixed: bool = False
    head: str = ""
    """That of the table whose rows it begins with: no part of its text, but they are no rows without it."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A fence, comment or the like that a line has opened."""

    is_closed_by: Callable[[str], bool]
    """Returns for each line after it whether that closes it."""

    is_fence: bool
    is_outermost: bool
    """Not in a list, whose end is its end too. In a quote there are no blank lines, so nothing need be known."""


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a text, one after the other; none is empty, joined they are the text. Fences come as fixed."""
    start = _end_of_front_matter(text)
    if start:
        yield Block(text[:start], is_fixed=True)
    held: list[str] = []
    size = 0
    head = table = ""
    opened: _Open | None = None
    is_fixed = was_blank = is_inside_line = False
    for line in lines(text, start):
        if opened and not opened.is_outermost and not line[0].isspace():
            opened = None  # the list ends, and what is open in it
        if opened or is_inside_line or "|" not in line:
            table = ""
        is_next = opened is None and was_blank and not line[0].isspace()
        is_underline = not table and not is_inside_line and bool(held and _UNDERLINE.match(line))
        is_start = is_inside_line or bool(_BEGINS.match(line) and not is_underline)
        if held and (is_next or (size > SOFT_LIMIT and (is_start or size > HARD_LIMIT))):
            yield Block("".join(held), is_fixed, head)
            held, size, head = [], 0, table
            opened = opened if opened and opened.is_outermost else None
            is_fixed = opened is not None
        is_closed = opened is not None and opened.is_closed_by(line)
        if opened is None and not is_inside_line:
            opened = _opened_by(line)
            is_fixed = opened is not None and opened.is_fence and opened.is_outermost and not held
        if is_underline and not opened and held and "|" in line and "|" in held[-1]:
            table = held[-1] + line
        held.append(line)
        size += len(line)
        if is_closed:
            opened = None
            if is_fixed:
                yield Block("".join(held), is_fixed)
                held, size, head, is_fixed = [], 0, "", False
        was_blank = not is_inside_line and not line.strip()
        is_inside_line = line[-1] not in "\r\n"
    if held:
        yield Block("".join(held), is_fixed, head)


def lines(text: str, start: int = 0) -> Iterator[str]:
    """The lines of a text with their ends, as Markdown has them: `\\n`, `\\r\\n` or `\\r`. Very long ones in pieces."""
    while start < len(text):
        found = _LINE.match(text, start)
        assert found is not None
        line = found.group()
        if line[-1] not in "\r\n" and found.end() < len(text):
            sentences = _SENTENCE_END.match(line)
            line = sentences.group() if sentences else line[: line.rfind(" ") + 1] or line
        yield line
        start += len(line)


def is_mostly_gaps(text: str) -> bool:
    """Whether a table in the text would be mostly cells that nobody has written, as each row gets as many as its head.

    A few kilobytes can make millions of cells so.
    """
    num_pipes = [line.count("|") for line in lines(text)] if "|" in text else [0]
    return max(num_pipes) * len(num_pipes) > 2 * len(text)


def _opened_by(line: str) -> _Open | None:
    if fence := _FENCE.match(line):
        mark, indent = fence["ticks"] or fence["tildes"], len(fence["before"].expandtabs(4))
        is_outermost = indent < 4 and not fence["before"].strip()
        is_closed_by = partial(_closes_fence, mark=mark, max_indent=3 if is_outermost else indent + 3)
        return _Open(is_closed_by, is_fence=True, is_outermost=is_outermost)
    if raw := _RAW.match(line):
        is_closed_by = partial(_closes_raw, end=None if raw["tag"] else _RAW_ENDS[raw["other"].lower()])
        if not is_closed_by(line[raw.end() :]):
            return _Open(is_closed_by, is_fence=False, is_outermost=True)
    return None


def _closes_fence(line: str, *, mark: str, max_indent: int) -> bool:
    unindented = line.lstrip(" ")
    return (
        len(line) - len(unindented) <= max_indent
        and unindented.startswith(mark)
        and not unindented.rstrip("\r\n").rstrip(" \t").strip(mark[0])
    )


def _closes_raw(line: str, *, end: str | None) -> bool:
    """Whether a line has the end of a comment or the like; without `end`, an end tag."""
    return _RAW_END_TAG.search(line) is not None if end is None else end in line


def _end_of_front_matter(text: str) -> int:
    found = _FRONT_MATTER.match(text)
    if not found:
        return 0
    end = (_YAML_END if found["yaml"] else _TOML_END).search(text, found.end(), _FRONT_MATTER_LIMIT)
    return end.end() if end else 0
