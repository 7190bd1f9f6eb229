"""Plain text and Markdown: which bytes are text at all, and in which encoding."""

import codecs
import re

from chains.documents import markup
from chains.documents.formats import FIELD, FileLimits, FileText, too_much_text
from chains.errors import UnreadableFile

BOMS = {
    # The longer first: UTF-32's begins with UTF-16's.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DECLARED = re.compile(rb"""(?i)<(?:meta|\?xml)\b[^>]{0,500}?(?:charset|encoding)\s*=\s*["']?\s*([a-z0-9_:.-]{1,40})""")
WIDER = {
    # As browsers read them, and as they are meant: https://encoding.spec.whatwg.org/#names-and-labels
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "iso8859-9": "cp1254",
}
NO_CHARSETS = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7"}
"""What Python calls encodings of text, and no page is written in."""
NO_TEXT = re.compile("[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
"""Control characters that the MIME sniffing standard takes for a sign of binary data: https://mimesniff.spec.whatwg.org"""
MARKDOWN = markup.MARKDOWN
HEADING = re.compile(r"(?m)^# +(.+)$")
MAX_BROKEN = 1_000
"""One character in so many may be broken, and one in any case, in a text that is else in an encoding."""
MIN_SOUND = 10
"""Characters that are not ASCII for each that is broken. With less, an encoding is not known from them."""
HEAD = 100_000
"""Characters that are looked at to tell what a text is."""


def read(content: bytes, limits: FileLimits) -> FileText:
    """Read a file that is text as it stands. Raises UnreadableFile, TooLarge."""
    text = decode(content)
    if text is None:
        raise UnreadableFile(
            FIELD, "the file is of no known type; what can be read is PDF, DOCX, HTML, Markdown or plain text"
        )
    if len(text) > limits.max_text:
        raise too_much_text(limits.max_text)
    text = text.replace("\r\n", "\n")
    if not MARKDOWN.search(text, 0, HEAD):
        return FileText("", text, "text", None)
    heading = HEADING.search(text, 0, HEAD)
    return FileText(heading[1].rstrip(" #") if heading else "", text, "markdown", None)


def decode(content: bytes, *, is_cut: bool = False) -> str | None:
    """Decode bytes by their mark, as UTF-8, as they declare, as flawed UTF-8, or by a guess; None: they are not text.

    Args:
        content: What to decode.
        is_cut: There is more after it, so its last character may be cut.
    """
    for bom, encoding in BOMS.items():
        if content.startswith(bom):
            return strictly(content, encoding, is_cut) or mended(content, encoding, is_cut, min_sound=0)
    if b"\0" in content:
        return None
    declared = declared_encoding(content[:4096])
    # UTF-8 hardly ever comes by chance, and a wrong declaration does; but ISO-2022 is made of ASCII.
    first, second = (declared, "utf-8") if declared and "2022" in declared else ("utf-8", declared)
    text = strictly(content, first, is_cut)
    if text is None and second:
        text = strictly(content, second, is_cut)
    if text is None:
        text = mended(content, "utf-8", is_cut) or guess(content)
    return None if text is None or NO_TEXT.search(text, 0, HEAD) else text


def strictly(content: bytes, encoding: str, is_cut: bool) -> str | None:
    """Decode bytes; None: they are not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(content, final=not is_cut)
    except (UnicodeError, LookupError):
        return None


def mended(content: bytes, encoding: str, is_cut: bool, *, min_sound: int = MIN_SOUND) -> str | None:
    """Decode bytes of which a few are broken, with U+FFFD in their place; None: more than a few are."""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(content, final=not is_cut)
    broken = text.count("\ufffd")
    sound = len(text) - broken - len(text.encode("ascii", "ignore"))
    return text if broken <= 1 + len(text) // MAX_BROKEN and sound >= min_sound * broken else None


def declared_encoding(head: bytes) -> str | None:
    """The encoding that HTML or XML says it has, if it is one that we know."""
    match = DECLARED.search(head)
    if match is None:
        return None
    try:
        name = codecs.lookup(match[1].decode()).name
        bytes(4).decode(name, "ignore")  # LookupError: it is no encoding of text
    except (LookupError, UnicodeError):
        return None
    return None if name in NO_CHARSETS else WIDER.get(name, name)


def guess(content: bytes) -> str | None:
    """Decode bytes in the encoding that they look most like; None: they do not look like text."""
    from charset_normalizer import from_bytes

    matches = from_bytes(content)
    best = matches.best()
    if best is None:
        return None
    # A few words say too little: of equals, the encoding that most such files have.
    common = (each for each in matches if each.encoding == "cp1252" and each.chaos <= best.chaos)
    return str(next((each for each in common if each.coherence >= best.coherence), best))
