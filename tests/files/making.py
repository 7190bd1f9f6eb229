"""Files made in code: honest ones, and those that somebody sends to do harm."""

import io
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence

import docx as python_docx
from pypdf import PdfReader, PdfWriter

WORDS = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml"
CONTENT_TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    + "".join(
        f'<Override PartName="/word/{part}.xml" ContentType="{WORD}.{part.replace("document", "document.main")}+xml"/>'
        for part in ("document", "styles", "numbering", "footnotes", "endnotes")
    )
    + "</Types>"
)


def raw_pdf(objects: Sequence[bytes], header: bytes = b"%PDF-1.7\n", trailer: bytes = b"") -> bytes:
    """A PDF of objects numbered from 1; the first is the catalogue."""
    content, places = header, []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    end = b"trailer\n<</Size %d /Root 1 0 R %s>>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, len(content))
    return content + b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table) + end


def stream(data: bytes, attributes: bytes = b"") -> bytes:
    return b"<</Length %d %s>>\nstream\n%s\nendstream" % (len(data), attributes, data)


def pdf(pages: Sequence[str], title: str = "") -> bytes:
    """A PDF with a page for each text, line by line, in a font that has Latin-1."""
    font = b"<</Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding>>"
    about = b"<</Title <%s>>>" % ("\ufeff" + title).encode("utf-16-be").hex().encode()
    objects = [b"<</Type /Catalog /Pages 2 0 R>>", b"", font, about]
    kids = []
    for page in pages:
        lines = (line.encode("cp1252").replace(b"\\", rb"\\").replace(b"(", rb"\(").replace(b")", rb"\)")
                 for line in page.split("\n"))  # fmt: skip
        text = b"BT /F1 11 Tf 14 TL 50 800 Td " + b" ".join(b"(%s) Tj T*" % line for line in lines) + b" ET"
        objects.append(stream(text))
        objects.append(
            b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R"
            b" /Resources <</Font <</F1 3 0 R>>>>>>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<</Type /Pages /Count %d /Kids [%s]>>" % (len(kids), b" ".join(kids))
    return raw_pdf(objects, trailer=b"/Info 4 0 R ")


def encrypted_pdf(password: str = "secret", pages: Sequence[str] = ("Behind a lock.",)) -> bytes:
    """A PDF that asks for a password, unless it is ""."""
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf(pages))))
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    to = io.BytesIO()
    writer.write(to)
    return to.getvalue()


def image_only_pdf(pages: int = 3) -> bytes:
    """A PDF like a scanner's."""
    image = b"/Type /XObject /Subtype /Image /Width 2 /Height 2 /ColorSpace /DeviceGray /BitsPerComponent 8"
    page = b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Resources <</XObject <</I 3 0 R>>>>>>"
    kids = b" ".join(b"%d 0 R" % (5 + number) for number in range(pages))
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R>>",
            b"<</Type /Pages /Count %d /Kids [%s]>>" % (pages, kids),
            stream(b"\x00\x80\xff\x80", image),
            stream(b"500 0 0 700 50 50 cm /I Do"),
            *[page] * pages,
        ]
    )


def many_pages_pdf(pages: int = 100_000, *, count: int | None = None) -> bytes:
    """A PDF whose page tree names one page again and again; `count` is how many it says it has."""
    said = pages if count is None else count
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R>>",
            b"<</Type /Pages %s /Kids [%s]>>" % (b"/Count %d" % said if said else b"", b"3 0 R " * pages),
            b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 9 9]>>",
        ]
    )


def looping_pdf() -> bytes:
    """A PDF whose page tree is its own child."""
    return raw_pdf([b"<</Type /Catalog /Pages 2 0 R>>", b"<</Type /Pages /Count 3 /Kids [2 0 R 2 0 R 2 0 R]>>"])


def pdf_bomb(unpacked: int = 4 * 2**30) -> bytes:
    """A PDF of one page whose content unpacks to gigabytes, packed twice over."""
    content = zlib.compress(b"\x78\x9c" + packed(b" " * 2**20, unpacked >> 20), 9)
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R>>",
            b"<</Type /Pages /Count 1 /Kids [4 0 R]>>",
            stream(content, b"/Filter [/FlateDecode /FlateDecode]"),
            b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 3 0 R>>",
        ]
    )


def pdf_that_spins(pages: int, steps: int) -> bytes:
    """A PDF whose pages save and restore the state of graphics millions of times, packed twice over."""
    content = zlib.compress(b"\x78\x9c" + packed(b"q Q " * 1_000, steps // 1_000), 9)
    kids = " ".join(f"{number} 0 R" for number in range(4, 4 + pages))
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R>>",
            f"<</Type /Pages /Count {pages} /Kids [{kids}]>>".encode(),
            stream(content, b"/Filter [/FlateDecode /FlateDecode]"),
            *[b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 3 0 R>>"] * pages,
        ]
    )


def packed(block: bytes, times: int) -> bytes:
    """Deflate a block that comes many times, with the work of one: after a full flush nothing refers back."""
    packer = zlib.compressobj(9, wbits=-15)
    return (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)) * times + packer.flush()


def docx(paragraphs: Iterable[str | tuple[str, str] | list[list[str]]], title: str = "") -> bytes:
    """A Word document: texts, (text, style) pairs, and tables as rows of cells."""
    document = python_docx.Document()
    document.core_properties.title = title
    for each in paragraphs:
        if isinstance(each, str):
            document.add_paragraph(each)
        elif isinstance(each, tuple):
            document.add_paragraph(each[0], style=each[1])
        else:
            table = document.add_table(rows=len(each), cols=len(each[0]))
            for row, cells in zip(table.rows, each, strict=True):
                for cell, text in zip(row.cells, cells, strict=True):
                    cell.text = text
    to = io.BytesIO()
    document.save(to)
    return to.getvalue()


def raw_docx(body: str, *, before: str = "", **parts: str) -> bytes:
    """A package with one document part, and `parts` below word/ (numbering="…" is word/numbering.xml)."""
    main = f'{before}<w:document xmlns:w="{WORDS}"><w:body>{body}</w:body></w:document>'
    files = {f"word/{name}.xml": content for name, content in parts.items()}
    return archive({"[Content_Types].xml": CONTENT_TYPES, "word/document.xml": main, **files})


def archive(files: Mapping[str, str | bytes]) -> bytes:
    to = io.BytesIO()
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as into:
        for name, content in files.items():
            into.writestr(name, content)
    return to.getvalue()


def docx_bomb(unpacked: int = 2**29, *, declared: int | None = None) -> bytes:
    """A document of some kB to MB that unpacks to gigabytes; `declared` is the size that it gives instead."""
    to = io.BytesIO()
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as into:
        into.writestr("[Content_Types].xml", CONTENT_TYPES)
        with into.open("word/document.xml", "w", force_zip64=False) as part:
            for _ in range(unpacked >> 24):
                part.write(b" " * 2**24)
        real = into.getinfo("word/document.xml").file_size
    content = to.getvalue()
    if declared is None:
        return content
    return content.replace(real.to_bytes(4, "little"), declared.to_bytes(4, "little"))


def docx_with_entities(*, external: bool = False) -> bytes:
    """A document with a billion laughs in it, or one that asks for a file of the machine that reads it."""
    entities = '<!ENTITY l0 "lol">' + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    if external:
        entities = '<!ENTITY l9 SYSTEM "file:///etc/passwd">'
    return raw_docx("<w:p><w:r><w:t>Ha &l9;</w:t></w:r></w:p>", before=f"<!DOCTYPE w:document [{entities}]>")


def nested_docx(depth: int = 100_000) -> bytes:
    """A document with tables in tables."""
    inside = "<w:p><w:r><w:t>deep</w:t></w:r></w:p>"
    return raw_docx("<w:tbl><w:tr><w:tc>" * depth + inside + "</w:tc></w:tr></w:tbl>" * depth)


def nested_html(depth: int = 100_000) -> bytes:
    """A page with a text in that many boxes."""
    return b"<!doctype html><title>Deep</title>" + b"<div>" * depth + b"At the bottom." + b"</div>" * depth + b"After."


def filled_pdf() -> bytes:
    """A form of one page with a filled-in field, one that nobody has drawn yet, and a note written on it."""
    resources = b"/Resources <</Font <</F1 3 0 R>>>>"

    def drawn(text: bytes) -> bytes:
        return stream(
            b"/Tx BMC q BT /F1 11 Tf 2 2 Td (%s) Tj ET Q EMC" % text,
            b"/Type /XObject /Subtype /Form /BBox [0 0 200 20] " + resources,
        )

    field = b"<</Type /Annot /Subtype /Widget /FT /Tx /T (%s) /V (%s) /DA (/F1 11 Tf) /Rect [200 %d 400 %d] /F 4 %s>>"
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R /AcroForm <</Fields [7 0 R 8 0 R] /DR <</Font <</F1 3 0 R>>>>>>>>",
            b"<</Type /Pages /Count 1 /Kids [5 0 R]>>",
            b"<</Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding>>",
            stream(b"BT /F1 11 Tf 50 800 Td (Name:) Tj 0 -50 Td (Town:) Tj ET"),
            b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Annots [7 0 R 8 0 R 9 0 R] %s>>"
            % resources,
            drawn(b"Ada Byron"),
            field % (b"name", b"Ada Byron", 795, 815, b"/AP <</N 6 0 R>>"),
            field % (b"town", b"London", 745, 765, b""),
            b"<</Type /Annot /Subtype /FreeText /Contents (Urgent) /Rect [200 695 400 715] /F 4 /AP <</N 10 0 R>>>>",
            drawn(b"Urgent"),
        ]
    )


def mixed_pdf(pages: str) -> bytes:
    """A PDF with a page for each letter: a text (t), an image (i) or nothing (n)."""
    kinds = {"t": b"3 0 R", "i": b"4 0 R", "n": b"5 0 R"}
    page = b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] %s>>"
    image = b"/Type /XObject /Subtype /Image /Width 2 /Height 2 /ColorSpace /DeviceGray /BitsPerComponent 8"
    return raw_pdf(
        [
            b"<</Type /Catalog /Pages 2 0 R>>",
            b"<</Type /Pages /Count %d /Kids [%s]>>" % (len(pages), b" ".join(kinds[each] for each in pages)),
            page % b"/Contents 6 0 R /Resources <</Font <</F1 8 0 R>>>>",
            page % b"/Contents 7 0 R /Resources <</XObject <</I 9 0 R>>>>",
            page % b"",
            stream(b"BT /F1 11 Tf 50 800 Td (Text.) Tj ET"),
            stream(b"500 0 0 700 50 50 cm /I Do"),
            b"<</Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding>>",
            stream(b"\x00\x80\xff\x80", image),
        ]
    )


def run(text: str) -> str:
    """A run of a Word document's paragraph."""
    return f"<w:r><w:t>{text}</w:t></w:r>"


def paragraph(text: str) -> str:
    """A paragraph of a Word document."""
    return f"<w:p>{run(text)}</w:p>"


def docx_with_margins(body: str, headers: Iterable[str], footers: Iterable[str]) -> bytes:
    """A document with a part for each of these headers and footers."""
    texts = {f"header{n}": text for n, text in enumerate(headers)} | {
        f"footer{n}": text for n, text in enumerate(footers)
    }
    types = "".join(
        f'<Override PartName="/word/{name}.xml" ContentType="{WORD}.{name.rstrip("0123456789")}+xml"/>'
        for name in texts
    )
    parts = {name: f'<w:hdr xmlns:w="{WORDS}">{paragraph(text)}</w:hdr>' for name, text in texts.items()}
    return archive(
        {
            "[Content_Types].xml": CONTENT_TYPES.replace("</Types>", f"{types}</Types>"),
            "word/document.xml": f'<w:document xmlns:w="{WORDS}"><w:body>{body}</w:body></w:document>',
            **{f"word/{name}.xml": content for name, content in parts.items()},
        }
    )


def docx_of_cousins(styles: int = 3_000) -> bytes:
    """A document of many styles that are all based on one with as many children."""
    wide = '<w:style w:styleId="wide">' + "<w:rsid/>" * styles + '<w:name w:val="heading 2"/></w:style>'
    others = "".join(f'<w:style w:styleId="s{n}"><w:basedOn w:val="wide"/></w:style>' for n in range(styles))
    return raw_docx(
        f'<w:p><w:pPr><w:pStyle w:val="s7"/></w:pPr>{run("A cousin")}</w:p>',
        styles=f'<w:styles xmlns:w="{WORDS}">{wide}{others}</w:styles>',
    )
