"""A file of any type: found from its bytes, never from a name, and read as that type."""

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace

from chains.documents.formats import FIELD, FileLimits, FileText, damaged, docx, html, pdf, plain, too_much_text
from chains.errors import InputError, UnreadableFile

KNOWN = "PDF, DOCX, HTML, Markdown or plain text"
PDF = re.compile(rb"(?m)^[ \t\r\v\f]*+%PDF-\d")
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
MAGIC = {
    b"{\\rtf": "a Rich Text (RTF) file",
    b"%!PS": "a PostScript file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x7fELF": "a program",
    b"MZ\x90": "a program",
}
IN_ZIP = {
    b"spreadsheetml": "an Excel workbook (XLSX)",
    b"presentationml": "a PowerPoint presentation (PPTX)",
    b"opendocument": "an OpenDocument file",
    b"epub+zip": "an e-book (EPUB)",
}


def read(content: bytes, limits: FileLimits) -> FileText:
    """Read a file. Raises UnreadableFile, TooLarge, MemoryError, RecursionError."""
    try:
        found = reader_of(content)(content, limits)
    except (InputError, MemoryError, RecursionError):
        raise
    except Exception as error:
        # An archive alone has half a dozen ways to be broken, each with an error of its own.
        raise damaged("it cannot be read as the type of file that it begins as") from error
    text = clean(found.text)
    if not text.strip():
        raise UnreadableFile(FIELD, "the file has no text in it")
    if len(text) > limits.max_text:
        raise too_much_text(limits.max_text)
    return replace(found, text=text, title=" ".join(clean(found.title).split())[:500])


def reader_of(content: bytes) -> Callable[[bytes, FileLimits], FileText]:
    """Find which format reads the content. Raises UnreadableFile."""
    head = content[:1024]
    if head.lstrip().startswith(b"%PDF-"):
        return pdf.read
    if PDF.search(head) or (b"%PDF-" in head and b"\0" in content):
        # After what a mailer or a server put before it; or the text is about PDF.
        return pdf.read if pdf.can_open(content) else text_reader(content) or pdf.read
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return in_zip(content)
    if head.startswith(OLE):
        if "EncryptedPackage".encode("utf-16-le") in content:
            raise UnreadableFile(FIELD, "the file is locked with a password (an encrypted Office document)")
        raise unknown("an old Office file (DOC, XLS or PPT); save it as DOCX or PDF")
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            raise unknown(name)
    return text_reader(content) or plain.read


def text_reader(content: bytes) -> Callable[[bytes, FileLimits], FileText] | None:
    """Find which format reads the content, if it is text."""
    begin = plain.decode(content[: 2**16], is_cut=True)
    if begin is None:
        return None
    return html.read if html.is_html(begin) else plain.read


def in_zip(content: bytes) -> Callable[[bytes, FileLimits], FileText]:
    """Find what kind of document an archive is. Raises UnreadableFile, and what zipfile raises."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = set(archive.namelist()) & {"[Content_Types].xml", "mimetype"}
        described = b"".join(archive.open(name).read(2**20) for name in names)
    if b"wordprocessingml" in described and b"main+xml" in described:
        return docx.read
    raise unknown(next((name for mark, name in IN_ZIP.items() if mark in described), "a ZIP archive"))


def unknown(looks_like: str) -> UnreadableFile:
    """What to raise for a file of a type that is known and not read."""
    return UnreadableFile(FIELD, f"the file looks like {looks_like}; what can be read is {KNOWN}")


def clean(text: str) -> str:
    """Drop what no text has: NULs and halves of surrogate pairs. Lines end with a newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
