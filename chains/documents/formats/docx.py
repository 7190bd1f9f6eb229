"""DOCX: the text of a Word document in its own order, as Markdown.

The parts that hold text are read by themselves. A library that loads the whole package would also load every picture,
and the usual one leaves out what stands in content controls, text boxes and accepted insertions.
"""

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from lxml import etree  # type: ignore[import-untyped]

from chains.documents.formats import Blocks, FileLimits, FileText, table
from chains.documents.formats.package import Parts
from chains.documents.formats.symbols import symbol

BYTES_PER_CHARACTER = 8
"""Of XML for one character of text: Word writes many tags."""
SEPARATORS = frozenset({"separator", "continuationSeparator", "continuationNotice"})
"""Notes that are lines between text and notes."""
NOT_READ = frozenset({"del", "moveFrom", "rPr", "pPr", "instrText", "rt", "sectPr", "tblPr", "trPr", "tcPr", "sdtPr"})
MAX_STYLES = 20
"""Based on each other."""
MAX_LEVELS = 9
"""Of a list; Word has no more."""
HEADING = re.compile(r"heading ([1-9])")


def read(content: bytes, limits: FileLimits) -> FileText:
    """Read a document. Raises UnreadableFile, TooLarge."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        document = Document(Parts(archive, limits.max_text * BYTES_PER_CHARACTER).described())
    blocks = Blocks(limits.max_text)
    for block in document.everything():
        blocks.add(block)
    return FileText(document.title(), blocks.text(), "docx", None)


@dataclass(frozen=True, slots=True)
class Style:
    """What a paragraph's style says of its text."""

    level: int = 0
    """Of a heading; 0: it is none."""
    list_id: str = ""
    is_title: bool = False
    based_on: str = ""


@dataclass(slots=True)
class Paragraph:
    """A paragraph's text on its way, and the text boxes that hang on it."""

    text: list[str] = field(default_factory=list)
    boxes: list[etree._Element] = field(default_factory=list)


class Document:
    """Follows a document's elements by their local names, which are the same in both of the format's namespaces."""

    def __init__(self, parts: dict[str, list[etree._Element]]) -> None:
        self.parts = parts
        self.styles = self.read_styles()
        self.formats = self.read_formats()
        self.counts: Counter[tuple[str, int]] = Counter()
        self.titled = ""

    def title(self) -> str:
        """The title among its properties, else what is styled as one."""
        found = "".join(each.text or "" for each in self.elements("properties") if name_of(each) == "title")
        return found.strip() or self.titled

    def elements(self, kind: str) -> Iterator[etree._Element]:
        """Yield what stands at the top of the first part of a kind."""
        yield from self.parts.get(kind, [()])[0]

    def everything(self) -> Iterator[str]:
        """Yield the document's blocks between its headers and its footers, then its notes."""
        yield from self.around("header")
        yield from self.blocks(self.parts["main"][0])
        yield from self.around("footer")
        yield from self.notes()

    def around(self, kind: str) -> Iterator[str]:
        """Yield headers or footers. Each section has its own, mostly the same: what says the same is read once."""
        texts = ("\n\n".join(filter(str.strip, self.blocks(part))) for part in self.parts.get(kind, ()))
        # The number of some page alone tells nothing.
        yield from dict.fromkeys(text for text in texts if any(map(str.isalpha, text)))

    def blocks(self, parent: etree._Element) -> Iterator[str]:
        """Yield paragraphs and tables below an element."""
        for element in parent:
            name = name_of(element)
            if name == "p":
                yield from self.paragraph(element)
            elif name == "tbl":
                rows = [[list(self.blocks(cell)) for cell in below(row, "tc")] for row in below(element, "tr")]
                yield from table(rows) if rows else ()
            elif name == "AlternateContent":
                yield from self.blocks(chosen(element))
            elif name == "altChunk":
                yield "[A file inside this document that cannot be read here]"
            elif name not in NOT_READ:
                yield from self.blocks(element)

    def paragraph(self, element: etree._Element) -> Iterator[str]:
        paragraph = Paragraph()
        gather(element, paragraph)
        text = "".join(paragraph.text).strip()
        if text:
            style, properties = Style(), child(element, "pPr")
            if properties is not None:
                style = self.styles.get(value(child(properties, "pStyle")), style)
            if style.is_title and not self.titled:
                self.titled = text
            yield self.marker(style, properties) + text
        for box in paragraph.boxes:
            yield from self.blocks(box)

    def marker(self, style: Style, properties: etree._Element | None) -> str:
        """What Markdown puts before such a paragraph."""
        level = style.level
        numbers = None
        if properties is not None:
            level = level or outline_level(properties)
            numbers = child(properties, "numPr")
        if level:
            return "#" * min(level, 6) + " "
        list_id = value(child(numbers, "numId")) if numbers is not None else style.list_id
        if list_id in ("", "0"):
            return ""
        depth = value(child(numbers, "ilvl")) if numbers is not None else ""
        return self.item(list_id, min(int(depth), MAX_LEVELS - 1) if depth.isdecimal() else 0)

    def item(self, list_id: str, depth: int) -> str:
        indent = "  " * depth
        if self.formats.get((list_id, depth), "bullet") in ("bullet", "none"):
            return f"{indent}- "
        self.counts[list_id, depth] += 1
        for deeper in range(depth + 1, MAX_LEVELS):
            self.counts.pop((list_id, deeper), None)
        return f"{indent}{self.counts[list_id, depth]}. "

    def notes(self) -> Iterator[str]:
        """Yield footnotes and endnotes, as Markdown writes them."""
        for kind in ("footnotes", "endnotes"):
            for note in self.elements(kind):
                if attributes(note).get("type") not in SEPARATORS:
                    text = " ".join(self.blocks(note))
                    yield f"[^{mark(note, kind)}]: {text}" if text else ""

    def read_styles(self) -> dict[str, Style]:
        own = {attributes(each).get("styleId", ""): style_of(each) for each in self.elements("styles")}
        return {name: resolved(style, own) for name, style in own.items() if name}

    def read_formats(self) -> dict[tuple[str, int], str]:
        """How the levels of each list are numbered."""
        abstract, formats = {}, {}
        for element in self.elements("numbering"):
            if name_of(element) == "abstractNum":
                abstract[attributes(element).get("abstractNumId", "")] = [
                    value(child(level, "numFmt")) for level in element if name_of(level) == "lvl"
                ][:MAX_LEVELS]
            elif name_of(element) == "num":
                levels = abstract.get(value(child(element, "abstractNumId")), [])
                formats.update({(attributes(element).get("numId", ""), depth): f for depth, f in enumerate(levels)})
        return formats


def gather(parent: etree._Element, into: Paragraph) -> None:
    """Put together the text of a paragraph's runs."""
    for element in parent:
        name = name_of(element)
        if name == "t":
            into.text.append(element.text or "")
        elif name in ("tab", "ptab"):
            into.text.append("\t")
        elif name in ("br", "cr"):
            into.text.append("\n")
        elif name == "noBreakHyphen":
            into.text.append("-")
        elif name == "sym":
            into.text.append(symbol(attributes(element).get("font", ""), attributes(element).get("char", "")))
        elif name in ("footnoteReference", "endnoteReference"):
            into.text.append(f"[^{mark(element, name)}]")
        elif name == "txbxContent":
            into.boxes.append(element)
        elif name == "AlternateContent":
            gather(chosen(element), into)
        elif name not in NOT_READ:
            gather(element, into)


def mark(note: etree._Element, kind: str) -> str:
    """What stands for a note or for a reference to one."""
    return ("e" if kind.startswith("end") else "") + attributes(note).get("id", "")


def below(element: etree._Element, name: str) -> Iterator[etree._Element]:
    """Yield a table's rows or a row's cells, also those in content controls."""
    for each in element:
        if name_of(each) == name:
            yield each
        elif name_of(each) not in NOT_READ:
            yield from below(each, name)


def chosen(alternates: etree._Element) -> Iterable[etree._Element]:
    """The first of some ways to write the same that has text in it."""
    return next((each for each in alternates if any((t.text or "").strip() for t in each.iter("{*}t"))), ())


def style_of(element: etree._Element) -> Style:
    """What a style says itself."""
    name = value(child(element, "name")).lower()
    heading, properties = HEADING.fullmatch(name), child(element, "pPr")
    level, list_id = int(heading[1]) if heading else 0, ""
    if properties is not None:
        numbers = child(properties, "numPr")
        level = level or outline_level(properties)
        list_id = value(child(numbers, "numId")) if numbers is not None else ""
    return Style(level, list_id, name == "title", value(child(element, "basedOn")))


def resolved(style: Style, own: dict[str, Style]) -> Style:
    """A style with what it has from those that it is based on."""
    for _ in range(MAX_STYLES):
        base = own.get(style.based_on)
        if base is None:
            break
        style = Style(
            style.level or base.level, style.list_id or base.list_id, style.is_title or base.is_title, base.based_on
        )
    return replace(style, level=style.level or int(style.is_title))


def outline_level(properties: etree._Element) -> int:
    """The level of heading that a paragraph's properties ask for; 0: none."""
    outline = value(child(properties, "outlineLvl"))
    return int(outline) + 1 if outline.isdecimal() and int(outline) < 9 else 0


def child(element: etree._Element, name: str) -> etree._Element | None:
    """The first child of that name."""
    return next((each for each in element if name_of(each) == name), None)


def value(element: etree._Element | None) -> str:
    """What Word keeps in the attribute `val`."""
    return "" if element is None else attributes(element).get("val", "")


def attributes(element: etree._Element) -> dict[str, str]:
    """An element's attributes by their local names."""
    return {str(name).rpartition("}")[2]: str(text) for name, text in element.items()}


def name_of(element: etree._Element) -> str:
    """An element's name without its namespace; "" for an entity."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
