"""HTML: what a reader would see of it, as Markdown. Its tags are followed as they come, and no tree is built."""

import re

from lxml import etree  # type: ignore[import-untyped]

from chains.documents.formats import Blocks, FileLimits, FileText, damaged, plain, table

DROPPED = frozenset({"script", "style", "template", "noscript", "svg", "iframe"})
HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
# fmt: off
BOXES = frozenset({
    "article", "aside", "blockquote", "center", "details", "dialog", "div", "dl", "fieldset", "figure", "footer",
    "form", "header", "main", "menu", "nav", "ol", "section", "table", "ul",
})
"""Blocks that nobody leaves open. Paragraphs, fonts and the like are left open by thousands in old pages."""
BLOCKS = BOXES | frozenset(HEADINGS) | {
    "address", "body", "caption", "dd", "dt", "figcaption", "hr", "html", "li", "p", "pre", "summary", "tbody", "td",
    "tfoot", "th", "thead", "tr",
}
INLINE = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins",
    "kbd", "label", "mark", "nobr", "q", "rb", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong",
    "sub", "sup", "time", "tt", "u", "var", "wbr",
})
"""Parts of a word may be in them. The others are apart, even those that nobody has heard of."""
# fmt: on
MAX_BOXES = 1_000
"""Boxes inside each other: about twice as many as Chromium keeps (512 elements)."""

MAX_OPEN = 1_000
"""Elements that are open, from which on it is counted what end tags cost."""

MAX_COMPARED = 2_000_000_000
"""Names that libxml2 compares for end tags: it looks for each of them in all elements that are open. 8 seconds."""

MAX_TABLES = 20
"""Tables inside each other; what is deeper is read as paragraphs."""

BEFORE = re.compile(r"(?s)\ufeff?(?:\s+|<!--.*?-->|<\?xml.*?\?>)*")
PAGE = re.compile(r"(?i)<(?:!doctype\s+html|html|head|title|body|meta|link|script|style|base)\b")
FRAGMENT = re.compile(
    r"(?i)<(?:a|article|b|blockquote|br|center|div|em|font|form|h[1-6]|hr|i|img|main|ol|p|pre|section|span|strong|table|ul)\b[^<>]*>"
)


def is_html(head: str) -> bool:
    """Tell from its first characters whether a text is HTML. Markdown may begin with a tag too."""
    begins = BEFORE.match(head)
    at = begins.end() if begins else 0
    return bool(PAGE.match(head, at) or (FRAGMENT.match(head, at) and not plain.MARKDOWN.search(head)))


def read(content: bytes, limits: FileLimits) -> FileText:
    """Read a page. Raises UnreadableFile, TooLarge."""
    text = plain.decode(content)
    if text is None:
        raise damaged("it begins as HTML and goes on as binary data")
    page = Page(limits.max_text)
    # huge_tree: no tree is built, and the limits are ours.
    parser = etree.HTMLParser(target=page, huge_tree=True)
    num_compared = 0
    for start in range(0, len(text), 2**16):
        piece = text[start : start + 2**16]
        if page.num_open > MAX_OPEN:
            num_ends = piece.count("</")
            num_compared += num_ends * (page.num_open + piece.count("<") - num_ends)
        if num_compared > MAX_COMPARED:
            raise damaged(f"it is nested too deeply: {page.num_open:,} elements are open where many others end")
        parser.feed(piece)
    parser.close()
    if any(entry.type == etree.ErrorTypes.ERR_NO_MEMORY for entry in parser.error_log):
        raise MemoryError
    return FileText("".join(page.title), page.blocks.text(), "html", None)


class Page:
    """Follows tags and text, and gathers blocks. What lxml calls a parser's target."""

    def __init__(self, max_text: int) -> None:
        self.blocks = Blocks(max_text)
        self.title: list[str] = []
        self.num_boxes = 0
        self.num_open = 0
        self.line: list[str] = []
        self.marker = ""
        self.lists: list[int | None] = []
        self.tables: list[list[list[list[str]]]] = []
        self.deeper_tables = 0
        self.dropping = 0
        self.in_title = False
        self.in_pre = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.num_open += 1
        self.num_boxes += tag in BOXES
        if self.num_boxes > MAX_BOXES:
            raise damaged(f"it is nested too deeply: more than {MAX_BOXES:,} boxes are inside each other")
        if self.dropping or tag in DROPPED:
            self.dropping += tag in DROPPED
            return
        if tag == "title":
            self.in_title = True
        elif tag == "br":
            self.line.append("\n")
        elif tag in BLOCKS:
            self.flush()
            self.open(tag)
        else:
            self.set_apart(tag)
            if tag == "img":
                self.data(attributes.get("alt") or "")
                self.set_apart(tag)

    def end(self, tag: str) -> None:
        self.num_open -= 1
        self.num_boxes -= tag in BOXES
        if self.dropping:
            self.dropping -= tag in DROPPED
            return
        if tag == "title":
            self.in_title = False
        elif tag in BLOCKS:
            self.flush()
            self.shut(tag)
        else:
            self.set_apart(tag)

    def set_apart(self, tag: str) -> None:
        """Keep the words in an element from those around it."""
        # Names with a colon are Word's own, around single words.
        if self.line and tag not in INLINE and ":" not in tag and not self.in_pre:
            self.line.append(" ")

    def data(self, data: str) -> None:
        if self.dropping:
            return
        if self.in_title:
            self.title.append(data)
        else:
            self.line.append(data if self.in_pre else re.sub(r"\s", " ", data))

    def comment(self, text: str) -> None:
        """Comments are not for readers."""

    def close(self) -> None:
        self.flush()
        while self.tables:
            self.shut("table")

    def open(self, tag: str) -> None:
        """Begin what a block's tag begins."""
        if tag in HEADINGS:
            self.marker = HEADINGS[tag]
        elif tag == "pre":
            self.in_pre += 1
        elif tag in ("ul", "ol", "menu"):
            self.lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self.marker = self.next_item()
        elif tag == "table":
            if len(self.tables) < MAX_TABLES:
                self.tables.append([])
            else:
                self.deeper_tables += 1
        elif tag == "tr" and self.tables and not self.deeper_tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables and not self.deeper_tables:
            if not self.tables[-1]:
                self.tables[-1].append([])
            self.tables[-1][-1].append([])

    def shut(self, tag: str) -> None:
        """End what a block's tag began."""
        if tag in HEADINGS or tag == "li":
            self.marker = ""
        elif tag == "pre":
            self.in_pre = max(0, self.in_pre - 1)
        elif tag in ("ul", "ol", "menu") and self.lists:
            self.lists.pop()
        elif tag == "table" and self.deeper_tables:
            self.deeper_tables -= 1
        elif tag == "table" and self.tables:
            for block in table(self.tables.pop()):
                self.add(block)

    def next_item(self) -> str:
        indent = "  " * min(len(self.lists) - 1, 10)
        if not self.lists or self.lists[-1] is None:
            return f"{indent}- "
        self.lists[-1] += 1
        return f"{indent}{self.lists[-1]}. "

    def flush(self) -> None:
        """Make a block of the line so far."""
        if not self.line:
            return
        text, self.line = "".join(self.line), []
        if self.in_pre:
            if text.strip():
                self.add(f"```\n{text.strip(chr(10))}\n```")
            return
        text = "\n".join(re.sub(" +", " ", line).strip() for line in text.split("\n")).strip()
        if text:
            self.add(self.marker + text)
            # A second paragraph of an item stands below its first.
            self.marker = " " * len(self.marker) if self.lists else ""

    def add(self, block: str) -> None:
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1].append(block)
        else:
            self.blocks.add(block)
