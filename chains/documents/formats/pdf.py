"""PDF: the text of its pages with what was filled in and noted on them, as pdfium finds it. Knows no OCR."""

import ctypes
import itertools
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

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
    # Draws what was filled in where the form itself has not done so; it has to come before the first page.
    document.init_forms()
    blocks, has_text = Blocks(limits.max_text), False
    for is_image, group in itertools.groupby(pages_of(document, blocks), lambda page: page.is_image):
        if is_image:
            blocks.add(without_text([page.number for page in group]))
            continue
        for page in group:
            blocks.add(page.text)
            has_text = has_text or bool(page.text)
    if not has_text:
        counted = "1 page" if pages == 1 else f"{pages:,} pages"
        raise UnreadableFile(FIELD, f"the file has no text in it: {counted} of images; run OCR first")
    return FileText(document.get_metadata_value("Title"), blocks.text(), "pdf", pages)


@dataclass(frozen=True, slots=True)
class Page:
    """What one page has."""

    number: int
    """From 1."""
    text: str
    is_image: bool
    """Something is drawn on it, and nothing written."""


def can_open(content: bytes) -> bool:
    """Tell whether this is a PDF, and none with a password."""
    try:
        opened(content).close()
    except UnreadableFile:
        return False
    return True


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


def pages_of(document: pypdfium2.PdfDocument, blocks: Blocks) -> Iterator[Page]:
    """Read the pages one by one. Raises UnreadableFile; TooLarge if `blocks` is full."""
    for number in range(1, len(document) + 1):
        try:
            page = flat_page(document, number - 1)
            text_page = page.get_textpage()
        except pypdfium2.PdfiumError as error:
            raise damaged(f"page {number:,} cannot be read") from error
        try:
            blocks.check_room(text_page.count_chars())
            # Paragraphs apart by a blank line.
            text = HYPHEN.sub("", "".join(with_paragraphs(text_page)).replace("\r\n", "\n")).strip()
            is_image = not text and any(each.type != raw.FPDF_PAGEOBJ_TEXT for each in page.get_objects(max_depth=1))
        finally:
            text_page.close()
            page.close()
        yield Page(number, text, is_image)


def flat_page(document: pypdfium2.PdfDocument, index: int) -> pypdfium2.PdfPage:
    """Get a page with its form fields and notes as part of its own text. Raises PdfiumError."""
    page = document[index]
    if raw.FPDFPage_Flatten(page, raw.FLAT_NORMALDISPLAY) != raw.FLATTEN_SUCCESS:
        return page
    page.close()
    return document[index]


def without_text(numbers: list[int]) -> str:
    """What stands for pages that follow each other and are images."""
    if len(numbers) == 1:
        return f"[Page {numbers[0]}: an image without text]"
    return f"[Pages {numbers[0]}-{numbers[-1]}: images without text]"


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
