"""What of a leaf of Markdown its translation did not keep. Knows no model, and what the words mean even less."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from chains.documents.blocks import is_mostly_gaps
from chains.documents.inline import Kind, pieces

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_NAMES = {
    "strong_open": "bold",
    "em_open": "italics",
    "s_open": "strikethrough",
    "link_open": "a link",
    "image": "an image",
    "code_inline": "code",
    "html_inline": "a tag",
    "hardbreak": "a line break",
    "paragraph_open": "a paragraph",
    "heading_open": "a heading",
    "bullet_list_open": "a list",
    "ordered_list_open": "a list",
    "list_item_open": "a list item",
    "blockquote_open": "a quote",
    "table_open": "a table",
    "fence": "a code block",
    "code_block": "a code block",
    "html_block": "an HTML block",
    "hr": "a rule",
}
_SHOWN = 60
"""Characters of a thing that a fault names."""

_CHECKED = 8_000
"""Characters up to which structures are compared: pieces that a model is given are far shorter."""

_BRACKETS = 100
"""Opening brackets up to which structures are compared: the parser tries each as the beginning of a link, and those in
it anew."""


def faults(source: str, target: str, *, is_line: bool) -> list[str]:
    """Say what a translation did not keep of a leaf's words: one short entry for each thing; none if all is well.

    Compared are the things that must stay (code, addresses, tags, placeholders), how often each, and the structure
    that Markdown sees: one paragraph must stay one, bold stay bold; the order within it may change.
    """
    found = list(_differences(_kept(source), _kept(target)))
    if is_line:
        if "\n" in target.strip() or "\r" in target.strip():
            found.append("a line break was added")
        if _num_pipes(target) != _num_pipes(source):
            found.append("a `|` was added" if _num_pipes(target) > _num_pipes(source) else "a `|` is missing")
    if not found and _is_comparable(source) and _is_comparable(target):
        found = list(_differences(_structure(source), _structure(target)))
    return found


def _differences(source: Counter[str], target: Counter[str]) -> Iterator[str]:
    yield from (f"{thing} is missing" for thing in source - target)
    yield from (f"{thing} was added" for thing in target - source)


def _kept(text: str) -> Counter[str]:
    return Counter(_shown(piece.text) for piece in pieces(text) if piece.kind is Kind.KEPT)


def _shown(text: str) -> str:
    text = " ".join(text.removeprefix("]").split())
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 2 :]}"
    return text if text.startswith("`") else f"`{text}`"


def _num_pipes(text: str) -> int:
    return text.count("|") - text.count(r"\|")


def _is_comparable(text: str) -> bool:
    return len(text) <= _CHECKED and text.count("[") <= _BRACKETS


def _structure(text: str) -> Counter[str]:
    """What is in a text, each with what it is in: "bold in a link", …"""
    return Counter(_names(_parser(has_tables=not is_mostly_gaps(text)).parse(text.strip()), []))


def _names(tokens: "list[Token]", around: list[str]) -> Iterator[str]:
    for token in tokens:
        name = _NAMES.get(token.type)
        if name:
            yield " in ".join([name, *reversed(around[-2:])])
        if token.nesting == 1:
            around.append(name or "a part")
        elif token.nesting == -1 and around:
            around.pop()
        if token.children and token.type != "image":
            yield from _names(token.children, [])


@lru_cache(maxsize=2)
def _parser(*, has_tables: bool) -> "MarkdownIt":
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable(["table", "strikethrough"] if has_tables else ["strikethrough"])
