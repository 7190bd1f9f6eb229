"""What within a line of Markdown is words, and what must not change: code, addresses, tags, placeholders, marks.

A pattern of bounded parts reads it, not a parser: it must know where each thing stands, and do for any text in linear
time. A bounded part may cost its bound at each place where it can begin, so no part runs past what begins it again.
Knows no blocks, and does not judge whether the marks fit together.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a stretch of a line is."""

    WORDS = "words"
    KEPT = "kept"
    """A translation must have it as often: code, addresses and targets, tags, placeholders."""

    MARK = "mark"
    """It belongs to the markup, as emphasis, brackets, escapes and entities do, or is white space between."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a line."""

    kind: Kind
    text: str


_URL = r"""
    (?<![A-Za-z0-9]) (?: [A-Za-z][A-Za-z0-9+.\-]{1,20}:// | www\.(?=[A-Za-z0-9]) | mailto: | tel:(?=[+\d]) )
    (?: [!-'*-;=?-Z_a-z~\u00a1-\u1fff] | \([!-'*-;=?-Z_a-z~\u00a1-\u1fff]{0,300}\) | \{[\w.]{0,60}\} ){1,2000}
    (?<![.,;:!?'"*_~])
"""
_EMAIL = r"(?<![\w.+-]) [A-Za-z0-9_.+\-]{1,64} @ [A-Za-z0-9\-]{1,63} (?: \.[A-Za-z0-9\-]{1,63} ){1,8}"
_TAG = r"""
    <!-- (?: [^-<] | -(?!->) | <(?!!--) ){0,1000}+ -->   # not past another opener: each would be tried up to its end
    | < [A-Za-z][A-Za-z0-9+.\-]{1,31} : [^\s<>]{0,2000} >
    | < [A-Za-z0-9_.+\-]{1,64} @ [A-Za-z0-9.\-]{1,255} >
    | </? \d{1,3} [ ]? /? >
    | </? [A-Za-z][A-Za-z0-9:\-]{0,60} (?: \s [^<>]{0,2000} )? /? >
"""
_CODE = r"""
    (?<!`) (?P<ticks>`++) .{1,2000}? (?<!`) (?P=ticks) (?!`)
    | < (?P<tag>code|kbd|samp|var) > [^<>]{0,500} </ (?P=tag) >
"""
_TARGET = r"""
    \]\( [ \t]{0,99}+ (?:\r\n|\r|\n)?+ [ \t]{0,99}+
        (?: <[^<>\r\n]{0,2000}>
          | (?: [^\s()<>\\] | \\. | \( (?: [^\s()\\] | \\. | \([^\s()]{0,300}\) ){0,300} \) ){0,2000}+ )
        (?: \s{1,20} (?: "[^"]{0,1000}" | '[^']{0,1000}' | \([^()]{0,1000}\) ) )? \s{0,20} \)
    | \]\[ [^\[\]]{1,200} \]
    | \[ [^\[\]]{1,200} \]\[\]
    | \[\^ [^\[\]\s]{1,100} \] :?
    | \A \[[ xX]\] (?=\s)
    | \A \[![A-Za-z]{3,20}\]
"""
_PLACEHOLDER = r"""
    \{ \s? [\w.]{1,60} \s? , \s? (?:plural|select|selectordinal|number|date|time) (?= \s?[,}] )
        (?: [^{}] | \{ (?: [^{}] | \{[^{}]{0,300}\} ){0,600}+ \} ){0,2000}+ \}
    | \{\{ [^{}\r\n]{0,200} \}\} | \{% [^{}\r\n]{0,200}? %\}
    | [$#%]? \{ [ ]? [A-Za-z0-9_] [\w.\[\]:!<>^+,=%#|-]{0,80} [ ]? \} | \{\} | \{ [#.][\w.# -]{1,80} \}
    | \$\( [\w.-]{1,60} \) | (?<![\w$]) \$ [A-Za-z_] \w{0,60}
    | % \( [^()\s]{1,80} \) [#0+-]{0,3} \d{0,3} (?:\.\d{1,3})? [A-Za-z]
    | (?<![\d%]) % (?:\d{1,2}\$)? [#0+-]{0,3} \d{0,3} (?:\.\d{1,3})? (?:hh|h|ll|l|z)? [sdifuxXeEgGcoprqa@] (?![A-Za-z])
    | (?<=\d) % [sd] (?![\w'’])
    | (?<![\w%]) % [A-Za-z_]\w{1,40} % (?!\w)
    | (?<![\w%)]) (?<!\d\s) % [sdf] (?=[A-Za-z])
    | (?<![\w:]) : [a-z][\w-]{1,60} : (?![\w:])
"""
_MARK = r"""
    (?: (?<![ ]) [ ]{2,}+ | \\ ) (?: \r\n | \r | \n ) [ \t]*+
    | \\ [!-/:-@\[-`{-~]
    | & (?: \#\d{1,7} | \#[xX][0-9a-fA-F]{1,6} | [A-Za-z][A-Za-z0-9]{1,31} ) ;
    | !?\[ | \] | \*++ | ~~ | (?<!\w) _++ | (?<!_) _++ (?!\w) | `++
"""
_NOT_WORDS = re.compile(
    rf"(?P<kept> {_CODE} | {_TAG} | {_TARGET} | {_URL} | {_EMAIL} | {_PLACEHOLDER} ) | (?P<mark> {_MARK} )",
    re.VERBOSE | re.DOTALL,
)
_SHORT_REFERENCE = re.compile(
    rf"(?P<kept> {_CODE} | {_TAG} | \\. ) | (?<!\]) \[ (?P<label> [^\[\]]{{1,200}} ) \] (?:\[\])? (?! [\[(:] )",
    re.VERBOSE | re.DOTALL,
)


def pieces(text: str) -> Iterator[Piece]:
    """The pieces of a leaf in order; none is empty, joined they are the text. Words have no white space around them."""
    end = 0
    for found in _NOT_WORDS.finditer(text):
        yield from _words(text[end : found.start()])
        yield Piece(Kind.KEPT if found.lastgroup == "kept" else Kind.MARK, found.group())
        end = found.end()
    yield from _words(text[end:])


def has_words(text: str) -> bool:
    """Whether there is a letter outside of what must not change."""
    return any(piece.kind is Kind.WORDS for piece in pieces(text))


def normal_label(label: str) -> str:
    """A label as it is compared: in any case, with any white space."""
    return " ".join(label.split()).casefold()


def spelled_out(text: str, labels: Container[str]) -> str:
    """The text with `[label]` as `[label][label]`, so that its words may change and still lead to the same place.

    `labels` are those that are defined, normal ones.
    """

    def spelled(found: re.Match[str]) -> str:
        label = found["label"]
        return f"[{label}][{label}]" if label and normal_label(label) in labels else found.group()

    return _SHORT_REFERENCE.sub(spelled, text)


def _words(text: str) -> Iterator[Piece]:
    words = text.strip()
    if not any(map(str.isalpha, words)):
        if text:
            yield Piece(Kind.MARK, text)
        return
    start = text.index(words)
    if start:
        yield Piece(Kind.MARK, text[:start])
    yield Piece(Kind.WORDS, words)
    if start + len(words) < len(text):
        yield Piece(Kind.MARK, text[start + len(words) :])
