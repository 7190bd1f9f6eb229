"""The XML inside a Word document's archive: unpacked and parsed with limits. Knows nothing of what it says."""

import re
import zipfile

from lxml import etree  # type: ignore[import-untyped]

from chains.documents.formats import FIELD, damaged
from chains.errors import TooLarge, UnreadableFile

MAX_PARTS = 20_000
TYPES = "[content_types].xml"
PART = re.compile(
    r"wordprocessingml\.(?:\w+\.)?(main|styles|numbering|footnotes|endnotes|header|footer)\+xml|ms-word\.[\w.]+\.(main)\+xml"
)


class Parts:
    """The parts of a package, parsed one by one, with a limit on what they unpack to together."""

    def __init__(self, archive: zipfile.ZipFile, max_bytes: int) -> None:
        self.archive = archive
        self.max_bytes = max_bytes
        self.left = max_bytes
        if len(archive.infolist()) > MAX_PARTS:
            raise TooLarge(FIELD, f"the file has {len(archive.infolist()):,} parts; at most {MAX_PARTS:,} are read")
        self.names = {info.filename.lower(): info for info in archive.infolist()}

    def described(self) -> dict[str, list[etree._Element]]:
        """Parse the parts that hold text, by what their type calls them; and the properties."""
        found: dict[str, list[etree._Element]] = {}
        for name, part_type in self.types().items():
            kind = PART.search(part_type)
            # A glossary is a document of its own, with styles of its own, of building blocks that nobody has used yet.
            part = self.parse(name) if kind and "/glossary/" not in name else None
            if kind and part is not None:
                found.setdefault(kind[1] or kind[2], []).append(part)
        # A type for all that ends in .xml makes more than one part the main one.
        found["main"] = [part for part in found.get("main", ()) if str(part.tag).endswith("}document")]
        if not found["main"]:
            raise damaged("the document itself is missing in it")
        properties = self.parse("docprops/core.xml")
        return found if properties is None else {**found, "properties": [properties]}

    def types(self) -> dict[str, str]:
        """What each part is: as it is said of it alone, else of all whose names end as its own."""
        said = self.parse(TYPES)
        rules = [] if said is None else list(said)
        of_part = {rule.get("PartName", "").lstrip("/").lower(): rule.get("ContentType", "") for rule in rules}
        of_ending = {rule.get("Extension", "").lower(): rule.get("ContentType", "") for rule in rules}
        by_ending = {name: of_ending.get(name.rpartition(".")[2], "") for name in self.names if name != TYPES}
        return {**of_part, **{name: kind for name, kind in by_ending.items() if name not in of_part}}

    def parse(self, name: str) -> etree._Element | None:
        """Unpack and parse one part, if there is one of this name. Raises UnreadableFile, TooLarge."""
        if name not in self.names:
            return None
        info = self.names[name]
        if info.flag_bits & 1:
            raise UnreadableFile(FIELD, "the file is locked with a password; send it without one")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise damaged("it is packed in a way that DOCX does not know")
        # What it says of itself, and then what it is.
        content = b"" if info.file_size > self.left else self.archive.open(info).read(self.left + 1)
        if max(info.file_size, len(content)) > self.left:
            raise TooLarge(FIELD, f"the file unpacks to more than {self.max_bytes:,} bytes; at most that many are read")
        self.left -= len(content)
        # Entities are neither loaded nor replaced. Depth and size of nodes have libxml2's own limits without huge_tree.
        parser = etree.XMLParser(
            resolve_entities=False, load_dtd=False, no_network=True, remove_comments=True, remove_pis=True
        )
        try:
            root = etree.fromstring(content, parser)
        except etree.XMLSyntaxError as error:
            if error.code == etree.ErrorTypes.ERR_NO_MEMORY:
                raise MemoryError from error
            if "depth" in str(error):
                raise damaged("it is nested too deeply") from error
            raise damaged(f"{info.filename[:80]} is not well-formed XML") from error
        if root.getroottree().docinfo.internalDTD is not None:
            raise damaged("it declares a document type or entities, which no DOCX may")
        return root
