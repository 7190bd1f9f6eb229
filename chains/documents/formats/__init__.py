"""What files are read as: one module for each format, bytes in, text out.

Only the process that `chains/documents/files.py` starts runs these modules; the caller imports nothing but the values
below. Every module may be shown a file made to do harm: it stops at the first limit and raises an `InputError`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from chains.errors import TooLarge, UnreadableFile

FIELD = "file"
MAX_COLUMNS = 100
Kind = Literal["pdf", "docx", "html", "markdown", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLimits:
    """What one file may have and may cost, and how long the files of one request may take."""

    max_file: int = 20 * 2**20
    """Bytes of the file."""
    max_pages: int = 2_000
    """Pages of a PDF."""
    max_text: int = 20_000_000
    """Characters that come out; of what is packed in the file, at most eight bytes for each are unpacked."""
    timeout_s: float = 180.0
    """Seconds that the files of a request may take together, each from the start of its process to its result."""
    cpu_s: float = 5.0
    """CPU seconds that reading the files of a request may take together, rounded up; starting a process not counted."""
    cpu_s_per_mib: float = 50.0
    """What each MiB of these files adds."""
    max_memory: int = 2**30
    """Bytes of address space for the reading process."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no text."""

    refused: Literal["UnreadableFile", "TooLarge"]
    message: str


@dataclass(frozen=True, slots=True)
class FileText:
    """What is written in a file."""

    title: str
    """The file's own; "" where it has none."""
    text: str
    """Never blank. Headings, lists and tables as Markdown, paragraphs apart by a blank line; plain text as it is."""
    kind: Kind
    pages: int | None
    """Of a PDF."""


class Blocks:
    """Paragraphs, headings, list items and the like on their way to one text that has a limit."""

    LIST_ITEM = re.compile(r" *(?:-|\d+\.) ")

    def __init__(self, max_text: int) -> None:
        self.max_text = max_text
        self.length = 0
        self.parts: list[str] = []
        self.after_item = False

    def add(self, block: str) -> None:
        """Put one block after the others, unless it is blank. Raises TooLarge."""
        if not block.strip():
            return
        self.check_room(len(block))
        is_item = self.LIST_ITEM.match(block) is not None
        if self.parts:
            self.parts.append("\n" if is_item and self.after_item else "\n\n")
        self.parts.append(block)
        self.after_item = is_item
        self.length += len(block)

    def check_room(self, length: int) -> None:
        """Raise TooLarge unless so many characters may come."""
        if self.length + length > self.max_text:
            raise too_much_text(self.max_text)

    def text(self) -> str:
        return "".join(self.parts)


def too_much_text(max_text: int) -> TooLarge:
    """What to raise for a file that holds more text than a limit allows."""
    return TooLarge(FIELD, f"the file has more than {max_text:,} characters of text in it; at most that many are read")


def damaged(reason: str) -> UnreadableFile:
    """What to raise for a file that breaks the rules of its own format."""
    return UnreadableFile(FIELD, f"the file is damaged: {reason}")


def table(rows: list[list[list[str]]]) -> list[str]:
    """Turn a table of cells of blocks into blocks: one of Markdown, or the cells' own where it is there for layout."""
    if not any(block.strip() for row in rows for cell in row for block in cell):
        return []
    width = max(map(len, rows))
    is_layout = not 1 < width <= MAX_COLUMNS or any(
        sum(map(len, cell)) > 1000 or any(block.startswith(("|", "```", "#")) for block in cell)
        for row in rows
        for cell in row
    )
    if is_layout:
        return [block for row in rows for cell in row for block in cell]
    lines = []
    for row in rows:
        cells = [" ".join(" ".join(cell).split()).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells + [''] * (width - len(cells)))} |")
    lines.insert(1, "|" + " --- |" * width)
    return ["\n".join(lines)]
