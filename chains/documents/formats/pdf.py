"""PDF: the text of its pages, as pdfium finds it. Knows no OCR."""

import ctypes
import itertools
import re
import statistics
from collections.abc import Iterator

import pypdfium2  # type: ignore[import-untyped]
from pypdfium2 import raw

from chains.documents.formats import FIELD, Blocks, FileLimits, FileText, damaged
from chains.errors import TooLarge, UnreadableFile

HYPHEN = re.compile("[\ufffe\x02](?:\r?\n)?")
"""Where pdfium found a word that goes on in the next line."""
PARAGRAPH = 1.3
"""Lines this many times further apart than usual on their page have a paragraph's end between them."""


def read(content: bytes, limits: FileLimits) -> FileText:
    """Read a PDF. Raises UnreadableFile, TooLarge."""
    document = opened(content)
    pages = len(document)
    if pages > limits.max_pages:
        raise TooLarge(FIELD, f"the file has {pages:,} pages; at most {limits.max_pages:,} are read (SERVE_MAX_PAGES)")
    blocks = Blocks(limits.max_text)
    for number in range(pages):
        blocks.add(page_text(document, number, blocks))
    if not blocks.parts:
        counted = "1 page" if pages == 1 else f"{pages:,} pages"
        raise UnreadableFile(FIELD, f"the file has no text in it: {counted} of images; run OCR first")
    return FileText(document.get_metadata_value("Title"), blocks.text(), "pdf", pages)


def opened(content: bytes) -> pypdfium2.PdfDocument:
    """Open a PDF, one with an empty password too. Raises UnreadableFile."""
    try:
        return pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        if error.err_code == raw.FPDF_ERR_PASSWORD:
            raise UnreadableFile(FIELD, "the file is locked with a password; send it without one") from error
        if error.err_code == raw.FPDF_ERR_SUCCESS:
            raise UnreadableFile(FIELD, "the file has no pages in it") from error
        if error.err_code == raw.FPDF_ERR_SECURITY:
            raise UnreadableFile(FIELD, "the file is locked in a way that is not known here") from error
        raise damaged("it cannot be opened as a PDF") from error


def page_text(document: pypdfium2.PdfDocument, number: int, blocks: Blocks) -> str:
    """The text of one page, paragraphs apart by a blank line. Raises UnreadableFile; TooLarge if `blocks` is full."""
    try:
        page = document[number]
        text_page = page.get_textpage()
    except pypdfium2.PdfiumError as error:
        raise damaged(f"page {number + 1:,} cannot be read") from error
    try:
        blocks.check_room(text_page.count_chars())
        text = "".join(with_paragraphs(text_page)).replace("\r\n", "\n")
    finally:
        text_page.close()
        page.close()
    return HYPHEN.sub("", text).strip()


def with_paragraphs(page: pypdfium2.PdfTextPage) -> Iterator[str]:
    """Yield the lines of a page, and one more line end where the paper shows a gap."""
    text = page.get_text_range()
    lines = text.splitlines(keepends=True)
    if len(text.encode("utf-16-le", "surrogatepass")) != 2 * page.count_chars():
        # Places in the text are not places on the page then.
        yield from lines
        return
    heights, start = [], 0
    for line in lines:
        heights.append(height_of(page, start + len(line) - len(line.lstrip())))
        start += len(line.encode("utf-16-le", "surrogatepass")) // 2
    steps = [above - below for above, below in itertools.pairwise(heights)]
    usual = statistics.median(down) if (down := [step for step in steps if step > 1]) else 0.0
    for line, step in zip(lines, [*steps, 0.0], strict=False):
        yield line
        if usual and step > PARAGRAPH * usual:
            yield "\n"


def height_of(page: pypdfium2.PdfTextPage, index: int) -> float:
    """Where the line of a character stands on its page, in points from below."""
    x, y = ctypes.c_double(), ctypes.c_double()
    return y.value if raw.FPDFText_GetCharOrigin(page, index, x, y) else 0.0
