"""What of a text, Markdown or plain, is words, and what must come out of a translation as it is.

    parts    a text as leaves (paragraphs, headings, table cells, …: words) and what is between them (fixed)
    finer    the words of a leaf as words alone and what in a line must not change
    faults   what of a leaf its translation did not keep

Works block by block, so that the first part of a book comes at once. Where the leaves are is markdown-it-py's
knowledge; it is asked only about blocks that have marks in them, as it is slow. Whatever it does not call a leaf is
fixed, so nothing can be lost. Does not know a model, nor how long a part may be.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from chains.cancellable import checkpoint
from chains.documents.blocks import blocks, is_mostly_gaps
from chains.documents.inline import Kind, has_words, normal_label, pieces, spelled_out
from chains.documents.kept import faults

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.token import Token

__all__ = ["MARKDOWN", "Part", "faults", "finer", "parts"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a text. Joined, the texts of its parts are the text again."""

    text: str
    is_fixed: bool
    """It must come out as it is, and is never shown to the model."""

    is_line: bool = False
    """What stands for it must be one line: it is a heading, a cell, or in a list or quote."""

    shown: str | None = None
    """The words as they are best shown, where that is not `text`: without the markers that lines in lists and quotes
    have of their own, as one line; and a `[label]` that is defined elsewhere as `[label][label]`."""

    @property
    def words(self) -> str:
        """What the model is shown, and `faults` and `finer` are given; its translation takes the place of `text`."""
        return self.text if self.shown is None else self.shown


@dataclass(frozen=True, slots=True)
class _Span:
    """Where in a block words stand."""

    start: int
    end: int


_LOOK = 100_000
"""How many characters from its start say whether a text is Markdown."""

MARKDOWN = re.compile(
    r"""(?: \A | [\r\n] ) [ ]{0,3} (?:
            (?: `{3} | ~{3} ) [^`\r\n]{0,100} [\r\n]   # a fence
            | \#{1,6} [ ] \S                           # a heading
            | \|? [ ]? :? -{3,200} :? [ ]? \| )        # a table
        | (?: \A | \n [ \t]{0,99} \r?\n | \r [ \t]{0,99} \r )
            \w [^\r\n]{0,200} [\r\n]{1,2} (?: ={3,200} | -{3,200} ) [ \t]{0,99} (?: [\r\n] | \Z )   # another
        | \]\( [^\s()]{1,500} \)                       # a link
        | (?<! [*\w] ) \*\* [^\s*] [^*\r\n]{0,200} \*\* (?! [*\w] )   # bold
        | (?<!`) ` [^`\r\n]{1,200} ` (?! [\w`] )       # code""",
    re.VERBOSE,
)
"""Found in what is most likely Markdown. Lists do not tell: plain books have speech and notes that look so."""

_MARKED_LINE = re.compile(r"(?:\A|[\r\n])[ \t]*(?:[#>|<=*+\-_~`:\[]|\d{1,9}[.)])")
_INDENTS = re.compile(r" {0,3}(?:\[\^[^\[\]\s]{1,100}\]:|(?:!!!|\?\?\?\+?)[ \t])")
"""Begins what is indented although no code: footnotes, and admonitions of MkDocs."""

_INDENTED_LINE = re.compile(r"(?:\A|[\r\n])(?: {4}| {0,3}\t)")
_SPACE = " \t\r\n"
_CELLS = ("th_open", "td_open")
_HEAD = re.compile(
    r"\[[ xX]\][ \t]+|\[![A-Za-z]{3,20}\][ \t]*|\[\^[^\[\]\s]{1,100}\]:[ \t]*|(?:!!!|\?\?\?\+?)[ \t]+[\w-]+[ \t]*"
)
"""What may stand before the words of a leaf: a task's box, the kind of an alert or admonition, a footnote's name."""

_TAG_AMONG_WORDS = re.compile(
    r"</?(?:a|abbr|b|bdi|bdo|big|cite|code|del|dfn|em|font|i|ins|kbd|mark|q|s|samp|small|span|strike|strong|sub|sup|tt|u"
    r"|var)(?=[\s/>])",
    re.IGNORECASE,
)
_RAW_TAG = re.compile(r"<(script|style|pre|textarea)(?=[\s/>])", re.IGNORECASE | re.ASCII)
_RAW_TAG_ENDS = {
    tag: re.compile(rf"</{tag}\s*+>", re.IGNORECASE | re.ASCII) for tag in ("script", "style", "pre", "textarea")
}
_TAG_END = re.compile(">")
_COMMENT_END = re.compile("-->")
_DEFINITION = re.compile(
    r"""(?: \A | [\r\n] ) [ \t>]{0,9} \[ ( [^\[\]^] [^\[\]]{0,200} ) \]:
        [ \t]{0,99}+ (?: \r\n | \r | \n )?+ [ \t]{0,99}+
        (?: < [^<>\r\n]{0,2000} > | [^\s<] \S{0,2000} ) [ \t]{0,99}+ (?= [\r\n"'(] | \Z )""",
    re.VERBOSE,
)
_LONGEST_LABEL = 201
_GAP = re.compile(r"(?>\r\n|\r|\n)(?:[^\S\r\n]*(?>\r\n|\r|\n))+")
_LINE_END = re.compile(r"\r\n?|\n")


def parts(text: str) -> Iterator[Part]:
    """The parts of a text, one after the other: leaves and what is between them. None is empty.

    Leaves are without white space at their ends. Fixed are: code blocks, front matter, rules, definitions of link
    targets, comments, HTML tags, markers of lists, quotes and tables, and whatever has no letter outside of these.
    Indented blocks are code only in a text that looks like Markdown: plain books indent their paragraphs.
    """
    is_markdown = _has_marks(text[:_LOOK]) and bool(
        MARKDOWN.search(text, 0, _LOOK) or _DEFINITION.search(text, 0, _LOOK)
    )
    labels = frozenset(map(normal_label, _defined_labels(text))) if is_markdown else frozenset[str]()
    for block in blocks(text):
        checkpoint()
        if block.is_fixed:
            yield Part(block.text, is_fixed=True)
        else:
            read = block.head + block.text
            yield from _with_gaps(read, len(block.head), _leaves(read, is_markdown), labels)


def _defined_labels(text: str) -> Iterator[str]:
    """The labels of all link definitions: what `_DEFINITION.finditer` finds.

    It looks only where a label may end. One call of the pattern for a whole text would hold the interpreter's lock for
    as long as it takes, which is a second for a large one.
    """
    at = end = 0
    while (closing := text.find("]:", at)) >= 0:
        checkpoint()
        at = closing + 2
        opening = text.rfind("[", max(end, closing - _LONGEST_LABEL - 1), closing)
        if opening < 0:
            continue
        before = text[max(end, opening - 10) : opening].rstrip(" \t>")
        start = max(end, opening - 10) + len(before) - 1
        is_start = before[-1] in "\r\n" if before else start < 0
        if is_start and (found := _DEFINITION.match(text, max(start, 0))):
            yield found[1]
            at = end = found.end()


def _has_marks(text: str) -> bool:
    """Whether any character without which there is no Markdown is there: quickly, as most texts are plain."""
    return any(mark in text for mark in ("`", "~~~", "#", "---", "===", "**", "]:", "]("))


def finer(text: str) -> list[Part]:
    """The words of a leaf, and as fixed all that must not change in it, marks too; joined they are the text."""
    found: list[Part] = []
    for piece in pieces(text):
        is_fixed = piece.kind is not Kind.WORDS
        if is_fixed and found and found[-1].is_fixed:
            found[-1] = Part(found[-1].text + piece.text, is_fixed=True)
        else:
            found.append(Part(piece.text, is_fixed, is_line=not is_fixed))
    return found


def _with_gaps(
    text: str, end: int, leaves: Iterator[tuple[list[_Span], bool]], labels: Container[str]
) -> Iterator[Part]:
    """The parts of a block from `end` on, given its leaves: the spans of each, and whether it must be one line."""
    for spans, is_line in leaves:
        checkpoint()
        start, stop = _trimmed(text, spans[0].start, spans[-1].end)
        leaf = text[start:stop]
        if start < end or not has_words(leaf):
            continue
        if start > end:
            yield Part(text[end:start], is_fixed=True)
        shown = spelled_out(_unwrapped(text, spans) if len(spans) > 1 else leaf, labels)
        yield Part(leaf, False, is_line, None if shown == leaf else shown)
        end = stop
    if end < len(text):
        yield Part(text[end:], is_fixed=True)


def _unwrapped(text: str, spans: list[_Span]) -> str:
    line: list[str] = []
    last = ""
    for span in spans:
        words = text[span.start : span.end].strip()
        # Scripts that write no spaces between words get none where their lines are joined.
        line.append(" " if last and words and min(last, words[0]) < "\u2e80" else "")
        line.append(words)
        last = words[-1:] or last
    return "".join(line)


def _leaves(text: str, is_markdown: bool) -> Iterator[tuple[list[_Span], bool]]:
    if not _MARKED_LINE.search(text) and not (is_markdown and _INDENTED_LINE.search(text)):
        start = 0
        for gap in _GAP.finditer(text):
            yield [_Span(start, gap.start())], False
            start = gap.end()
        yield [_Span(start, len(text))], False
        return
    text = text.replace("\0", "\ufffd")  # once for all cells, however many there are
    starts = [0, *(end.end() for end in _LINE_END.finditer(text)), len(text)]
    opened, cursor = "", 0
    has_code = is_markdown and not _INDENTS.match(text)
    for token in _parser(has_code=has_code, has_tables=not is_mostly_gaps(text)).parse(text):
        if token.type == "inline" and token.content and token.map:
            for leaf in _of_token(token, opened, text, starts, cursor):
                yield leaf
                cursor = leaf[0][-1].end
        elif token.type == "html_block" and token.map:
            yield from _of_html(_without_markers(token, text, starts), starts[token.map[0]])
        opened = token.type


def _of_token(
    token: "Token", opened: str, text: str, starts: list[int], cursor: int
) -> Iterator[tuple[list[_Span], bool]]:
    """Where the words of a paragraph, heading or cell stand: the parser gives its lines, and what it read in them.

    `text` has U+FFFD for NUL, as the parser has.
    """
    assert token.map is not None
    first = token.map[0]
    if opened in _CELLS:
        written = token.content.replace("|", r"\|")
        start = text.find(written, max(starts[first], cursor), starts[first + 1])
        if start >= 0:
            yield [_Span(start, start + len(written))], True
        return
    spans = []
    is_heading = opened == "heading_open"
    for number, content in enumerate(token.content.split("\n"), start=first):
        line, words = text[starts[number] : starts[number + 1]].rstrip(_SPACE), content.strip(_SPACE)
        if is_heading and not line.endswith(words):
            line = line.rstrip("#").rstrip(_SPACE)
        end = starts[number] + len(line)
        spans.append(_Span(end - len(words), end))
    if head := _HEAD.match(text, spans[0].start, spans[0].end):
        spans[0] = _Span(head.end(), spans[0].end)
        spans = spans[1:] if head.end() == spans[0].end else spans
        if not spans:
            return
    if token.level == 1:
        yield [_Span(spans[0].start, spans[-1].end)], is_heading and len(spans) == 1
        return
    # In a list or quote lines have markers of their own: without them, those up to a hard line break are one line.
    run: list[_Span] = []
    for span in spans:
        is_backslash = text[span.end - 1] == "\\" and span is not spans[-1]
        run.append(_Span(span.start, span.end - is_backslash))
        if is_backslash or text.startswith("  ", span.end):
            yield run, True
            run = []
    if run:
        yield run, True


def _without_markers(token: "Token", text: str, starts: list[int]) -> str:
    """The lines of a token with spaces for the markers that they have in lists and quotes."""
    assert token.map is not None
    found = []
    for number, content in zip(range(*token.map), token.content.split("\n"), strict=False):
        line = text[starts[number] : starts[number + 1]]
        words = line.rstrip("\r\n")
        found += [content.lstrip(" \t").rjust(len(words)), line[len(words) :]]
    return "".join(found)


def _of_html(text: str, offset: int) -> Iterator[tuple[list[_Span], bool]]:
    """The words between the tags of an HTML block, each run as one line; tags like `<em>` do not end a run."""
    run = at = 0
    while (tag := text.find("<", at)) >= 0:
        closing = _TAG_END
        if text.startswith("<!--", tag):
            closing = _COMMENT_END
        elif raw := _RAW_TAG.match(text, tag):
            closing = _RAW_TAG_ENDS[raw[1].lower()]
        closed = closing.search(text, tag)
        at = closed.end() if closed else len(text)
        if not closed or not _TAG_AMONG_WORDS.match(text, tag):
            yield _rows(text, run, tag, offset), True
            run = at
    yield _rows(text, run, len(text), offset), True


def _rows(text: str, start: int, end: int, offset: int) -> list[_Span]:
    """The lines of what stands there, without the white space around each, `offset` further on."""
    start, end = _trimmed(text, start, end)
    ends = [found.start() for found in _LINE_END.finditer(text, start, end)]
    starts = [found.end() for found in _LINE_END.finditer(text, start, end)]
    rows = (_trimmed(text, *row) for row in zip([start, *starts], [*ends, end], strict=True))
    return [_Span(first + offset, last + offset) for first, last in rows]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The same place without the white space around it."""
    words = text[start:end]
    return end - len(words.lstrip()), start + len(words.rstrip())


@lru_cache(maxsize=4)
def _parser(*, has_code: bool, has_tables: bool) -> "MarkdownIt":
    """A parser of blocks alone; without code, indented lines are paragraphs to it."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").disable([] if has_code else "code")
    parser.core.ruler.disable("inline")
    parser.block.ruler.before("table", "checkpoint", _is_no_block)  # asked at each line that may begin a block
    return parser.enable("table") if has_tables else parser


def _is_no_block(state: "StateBlock", start_line: int, end_line: int, silent: bool) -> bool:
    """A rule of the parser that matches nothing: parsing a block of hostile lists takes more than a second."""
    checkpoint()
    return False
