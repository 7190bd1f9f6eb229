"""What comes out of honest files, and what becomes of those that are not."""

import asyncio
import base64
import json
import os
import pwd
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import psutil  # type: ignore[import-untyped]
import pytest

from chains.documents import files
from chains.documents.files import FileLimits, FileReader, FileText, text_of
from chains.errors import InputError, TooLarge, UnreadableFile
from chains.summarize import SummarizeInput, prepare
from tests.chains.documents.reader_scripts import Becomes, written
from tests.files import making

MIB = 2**20


async def read(content: bytes, **limits: float) -> FileText:
    return await FileReader(FileLimits(**limits)).read(content)  # type: ignore[arg-type]


async def refusal(content: bytes, **limits: float) -> str:
    """The message for a file that cannot be read. It tells nothing of the machine."""
    with pytest.raises(InputError) as caught:
        await read(content, **limits)
    message = str(caught.value)
    assert caught.value.field == "file"
    assert "Traceback" not in message
    assert str(Path(files.__file__).parent.parent) not in message
    return f"{type(caught.value).__name__}: {message}"


class TestPdf:
    async def test_pages_paragraphs_and_the_title_come_out(self) -> None:
        content = making.pdf(["Crème brûlée (easy)\nserves four\n\nWhisk the eggs.", "Bake it."], "Überraschung")
        assert await read(content) == FileText(
            "Überraschung", "Crème brûlée (easy)\nserves four\n\nWhisk the eggs.\n\nBake it.", "pdf", 2
        )

    async def test_a_word_that_is_hyphenated_at_the_end_of_a_line_is_one_word(self) -> None:
        found = await read(making.pdf(["All human beings are born free and eq-\nual in dignity and rights."]))
        assert found.text == "All human beings are born free and equal in dignity and rights."

    async def test_what_comes_before_its_header_does_not_hide_a_pdf(self) -> None:
        assert (await read(b"X-Sent-By: scanner\r\n\r\n" + making.pdf(["Here."]))).text == "Here."

    async def test_a_pdf_that_asks_for_a_password_is_refused(self) -> None:
        assert "locked with a password" in await refusal(making.encrypted_pdf("secret"))

    async def test_an_encrypted_pdf_that_opens_without_a_password_is_read(self) -> None:
        assert (await read(making.encrypted_pdf(""))).text == "Behind a lock."

    async def test_pages_of_images_are_refused_with_what_to_do(self) -> None:
        said = await refusal(making.image_only_pdf(3))
        assert said == "UnreadableFile: the file has no text in it: 3 pages of images; run OCR first"

    async def test_what_was_filled_in_and_noted_on_a_page_is_text(self) -> None:
        found = (await read(making.filled_pdf())).text
        assert all(found.count(text) == 1 for text in ("Name:", "Ada Byron", "Town:", "London", "Urgent"))

    @pytest.mark.parametrize(
        ("pages", "text"),
        [
            ("ti", "Text.\n\n[Page 2: an image without text]"),
            ("iiit" + "i" * 7, "[Pages 1-3: images without text]\n\nText.\n\n[Pages 5-11: images without text]"),
            ("tnt", "Text.\n\nText."),
        ],
        ids=["one", "rows", "blank"],
    )
    async def test_pages_of_images_between_others_are_told(self, pages: str, text: str) -> None:
        found = await read(making.mixed_pdf(pages))
        assert (found.text, found.pages) == (text, len(pages))

    async def test_a_pdf_without_pages_is_refused(self) -> None:
        assert "no pages" in await refusal(making.pdf([]))

    @pytest.mark.parametrize("count", [None, 0], ids=["counted", "uncounted"])
    async def test_too_many_pages_are_refused_with_the_numbers(self, count: int | None) -> None:
        said = await refusal(making.many_pages_pdf(100_000, count=count))
        assert said == "TooLarge: the file has 100,000 pages; at most 2,000 are read (SERVE_MAX_PAGES)"

    @pytest.mark.parametrize("cut", [100, 2_000, 11_000])
    async def test_a_truncated_pdf_is_told_to_be_damaged(self, cut: int) -> None:
        assert "damaged" in await refusal(making.pdf(["A page."] * 50)[:cut])

    async def test_a_page_tree_that_loops_ends(self) -> None:
        assert "damaged" in await refusal(making.looping_pdf())

    async def test_a_page_that_unpacks_to_gigabytes_is_refused(self) -> None:
        content = making.pdf_bomb(4 * 2**30)
        assert len(content) < 20_000
        assert "more memory than 1,024 MiB" in await refusal(content)

    async def test_more_text_than_the_limit_is_refused(self) -> None:
        said = await refusal(making.pdf(["Ten words and some more to fill a line of it."] * 30), max_text=1_000)
        assert said.startswith("TooLarge: the file has more than 1,000 characters")


class TestDocx:
    async def test_headings_lists_and_tables_come_out_as_markdown_in_their_order(self) -> None:
        content = making.docx(
            [
                ("Annual report", "Title"),
                ("Sales", "Heading 2"),
                "They grew.",
                ("in the north", "List Bullet"),
                ("in the south", "List Bullet"),
                [["Year", "Sum"], ["2025", "12|3"]],
                "The end.",
            ]
        )
        assert (await read(content)) == FileText(
            "Annual report",
            "# Annual report\n\n## Sales\n\nThey grew.\n\n- in the north\n- in the south\n\n"
            "| Year | Sum |\n| --- | --- |\n| 2025 | 12\\|3 |\n\nThe end.",
            "docx",
            None,
        )

    async def test_the_title_among_the_properties_counts_first(self) -> None:
        assert (await read(making.docx([("Shown", "Title")], title="Filed"))).title == "Filed"

    async def test_numbered_lists_count_at_each_depth(self) -> None:
        levels = "".join(
            f'<w:lvl w:ilvl="{n}"><w:numFmt w:val="{form}"/></w:lvl>'
            for n, form in enumerate(("decimal", "lowerLetter"))
        )
        numbering = (
            f'<w:numbering xmlns:w="{making.WORDS}"><w:abstractNum w:abstractNumId="7">{levels}</w:abstractNum>'
            '<w:num w:numId="1"><w:abstractNumId w:val="7"/></w:num></w:numbering>'
        )
        body = "".join(
            f'<w:p><w:pPr><w:numPr><w:ilvl w:val="{depth}"/><w:numId w:val="1"/></w:numPr></w:pPr>'
            f"<w:r><w:t>{text}</w:t></w:r></w:p>"
            for depth, text in ((0, "a"), (1, "b"), (1, "c"), (0, "d"), (1, "e"))
        )
        found = await read(making.raw_docx(body, numbering=numbering))
        assert found.text == "1. a\n  1. b\n  2. c\n2. d\n  1. e"

    async def test_insertions_links_controls_and_text_boxes_are_text_and_deletions_are_not(self) -> None:
        run = "<w:r><w:t>{}</w:t></w:r>"
        body = (
            "<w:sdt><w:sdtPr/><w:sdtContent><w:p>" + run.format("in a control") + "</w:p></w:sdtContent></w:sdt>"
            "<w:p>" + run.format("kept, ") + "<w:ins>" + run.format("added") + "</w:ins><w:del><w:r><w:delText>gone"
            "</w:delText></w:r></w:del><w:hyperlink>" + run.format(", linked") + "</w:hyperlink>"
            "<w:r><mc:AlternateContent xmlns:mc='m'><mc:Choice><w:txbxContent><w:p>" + run.format("boxed")
            + "</w:p></w:txbxContent></mc:Choice><mc:Fallback><w:txbxContent><w:p>" + run.format("boxed")
            + "</w:p></w:txbxContent></mc:Fallback></mc:AlternateContent></w:r></w:p>"
        )  # fmt: skip
        assert (await read(making.raw_docx(body))).text == "in a control\n\nkept, added, linked\n\nboxed"

    async def test_footnotes_are_told_where_they_belong(self) -> None:
        notes = (
            f'<w:footnotes xmlns:w="{making.WORDS}"><w:footnote w:type="separator" w:id="-1"><w:p/></w:footnote>'
            '<w:footnote w:id="2"><w:p><w:r><w:t>In 1948.</w:t></w:r></w:p></w:footnote></w:footnotes>'
        )
        body = '<w:p><w:r><w:t>Proclaimed</w:t></w:r><w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
        assert (await read(making.raw_docx(body, footnotes=notes))).text == "Proclaimed[^2]\n\n[^2]: In 1948."

    async def test_a_footnote_that_calls_itself_normal_is_told_too(self) -> None:
        notes = (
            f'<w:footnotes xmlns:w="{making.WORDS}"><w:footnote w:type="continuationNotice" w:id="1">'
            f'{making.paragraph("goes on")}</w:footnote><w:footnote w:type="normal" w:id="2">'
            f"{making.paragraph('In 1948.')}</w:footnote></w:footnotes>"
        )
        assert (await read(making.raw_docx(making.paragraph("A"), footnotes=notes))).text == "A\n\n[^2]: In 1948."

    @pytest.mark.parametrize("around", ["{}", "<w:p><w:r>{}</w:r></w:p>"], ids=["blocks", "runs"])
    async def test_of_alternates_the_first_with_text_is_read(self, around: str) -> None:
        box = f"<w:txbxContent>{making.paragraph('{}')}</w:txbxContent>"
        body = (
            '<mc:AlternateContent xmlns:mc="m"><mc:Choice><w:drawing/></mc:Choice>'
            f"<mc:Choice>{box.format('boxed')}</mc:Choice>"
            f"<mc:Fallback>{box.format('again')}</mc:Fallback></mc:AlternateContent>"
        )
        content = making.raw_docx(making.paragraph("before") + around.format(body))
        assert (await read(content)).text == "before\n\nboxed"

    async def test_rows_that_were_moved_are_rows(self) -> None:
        row = f"<w:tr><w:tc>{making.paragraph('{}')}</w:tc><w:tc>{making.paragraph('x')}</w:tc></w:tr>"
        body = (
            f"<w:tbl>{row.format('a')}<w:moveFrom>{row.format('gone')}</w:moveFrom>"
            f"<w:moveTo>{row.format('b')}</w:moveTo></w:tbl>"
        )
        assert (await read(making.raw_docx(body))).text == "| a | x |\n| --- | --- |\n| b | x |"

    async def test_each_header_and_footer_is_told_once(self) -> None:
        content = making.docx_with_margins(
            making.paragraph("Body"), ["Secret", "Secret", "Part two"], ["Acme Ltd", "17", "Acme Ltd"]
        )
        assert (await read(content)).text == "Secret\n\nPart two\n\nBody\n\nAcme Ltd"

    @pytest.mark.parametrize(
        ("font", "char", "text"),
        [("Wingdings", "F0E0", "→"), ("Symbol", "F061", "α"), ("Arial", "2192", "→"), ("Webdings", "F041", "\ufffd")],
    )
    async def test_symbols_are_text(self, font: str, char: str, text: str) -> None:
        body = f'<w:p><w:r><w:t>a</w:t><w:sym w:font="{font}" w:char="{char}"/><w:t>b</w:t></w:r></w:p>'
        assert (await read(making.raw_docx(body))).text == f"a{text}b"

    async def test_a_file_inside_the_document_is_told(self) -> None:
        body = f"{making.paragraph('a')}<w:altChunk/>{making.paragraph('b')}"
        assert (
            "\n\n[A file inside this document that cannot be read here]\n\n" in (await read(making.raw_docx(body))).text
        )

    async def test_a_part_may_be_what_all_parts_of_its_ending_are(self) -> None:
        document = f'<w:document xmlns:w="{making.WORDS}"><w:body>{making.paragraph("Here.")}</w:body></w:document>'
        types = f'<Types><Default Extension="xml" ContentType="{making.WORD}.document.main+xml"/></Types>'
        content = making.archive(
            {"[Content_Types].xml": types, "docProps/app.xml": "<Properties/>", "word/document.xml": document}
        )
        assert (await read(content)).text == "Here."

    async def test_styles_by_the_thousand_are_looked_at_once(self) -> None:
        assert (await read(making.docx_of_cousins(20_000), timeout_s=30)).text == "## A cousin"

    async def test_a_document_with_macros_and_a_glossary_is_read_without_them(self) -> None:
        document = (
            f'<w:document xmlns:w="{making.WORDS}"><w:body><w:p><w:r><w:t>{{}}</w:t></w:r></w:p></w:body></w:document>'
        )
        types = (
            '<Types><Override PartName="/word/document.xml" ContentType='
            '"application/vnd.ms-word.document.macroEnabled.main+xml"/><Override PartName="/word/glossary/document.xml"'
            f' ContentType="{making.WORD}.document.glossary+xml"/><Override PartName="/word/glossary/styles.xml"'
            f' ContentType="{making.WORD}.styles+xml"/></Types>'
        )
        content = making.archive(
            {
                "[Content_Types].xml": types,
                "word/document.xml": document.format("The letter."),
                "word/glossary/document.xml": document.format("A block."),
                "word/glossary/styles.xml": "not even XML",
            }
        )
        assert (await read(content)).text == "The letter."

    async def test_a_bomb_is_refused_by_the_size_that_it_gives(self) -> None:
        content = making.docx_bomb()
        assert len(content) < 4 * MIB
        assert (await refusal(content)).startswith("TooLarge: the file unpacks to more than 160,000,000 bytes")

    async def test_a_bomb_that_lies_about_its_size_is_refused(self) -> None:
        assert "damaged" in await refusal(making.docx_bomb(2**28, declared=1_000))

    async def test_a_crowd_of_parts_is_refused(self) -> None:
        content = making.archive({"[Content_Types].xml": making.CONTENT_TYPES} | {str(n): "" for n in range(20_001)})
        assert "20,002 parts" in await refusal(content)

    @pytest.mark.parametrize("external", [False, True], ids=["laughs", "of-this-machine"])
    async def test_entities_are_neither_replaced_nor_loaded(self, external: bool) -> None:
        assert "damaged" in await refusal(making.docx_with_entities(external=external))

    async def test_tables_in_tables_are_read_or_refused(self) -> None:
        assert (await read(making.nested_docx(20))).text == "deep"
        assert "nested too deeply" in await refusal(making.nested_docx(100_000))

    async def test_a_truncated_document_is_told_to_be_damaged(self) -> None:
        content = making.docx(["Whole."])
        assert "damaged" in await refusal(content[: len(content) // 2])
        assert "damaged" in await refusal(content[:2000] + content[2050:])


class TestHtml:
    async def test_structure_comes_out_as_markdown_and_scripts_do_not(self) -> None:
        page = """<!-- made by hand --><!doctype html>
            <html><head><title>Tea &amp; cake</title><style>p {}</style></head><body>
            <nav><a href=/>Home</a></nav><h1>Tea</h1><p>Boil
            <b>water</b>.<br>Wait.<p>Drink.<ul><li>black<li>green<ol><li>first</ol></ul><pre>a  =
  1</pre><table><tr><th>Kind<th>Minutes<tr><td>black<td>3</table><script>if (a<b) {"</p>"}</script>the end"""
        assert await read(page.encode()) == FileText(
            "Tea & cake",
            "Home\n\n# Tea\n\nBoil water.\nWait.\n\nDrink.\n\n- black\n- green\n  1. first\n\n```\na  =\n  1\n```\n\n"
            "| Kind | Minutes |\n| --- | --- |\n| black | 3 |\n\nthe end",
            "html",
            None,
        )

    @pytest.mark.parametrize(
        "declared", ["unicode_escape", "raw_unicode_escape", "punycode", "idna", "utf-7", "rot13", "hex"]
    )
    async def test_what_is_an_encoding_only_to_python_is_none(self, declared: str) -> None:
        page = f"<!doctype html><meta charset={declared}><p>Ein \\x41 und viele schöne Tage, über die man sich freut."
        text = (await read(page.encode("cp1252"))).text
        assert text.startswith("Ein \\x41 und viele sch")

    @pytest.mark.parametrize(
        ("encoding", "text"),
        [
            ("gb2312", "人人生而自由"),
            ("windows-1251", "Все люди рождаются"),
            ("iso-2022-jp", "すべての人間は"),
            ("utf-16", "Tous"),
        ],
    )
    async def test_its_encoding_is_the_one_that_it_declares(self, encoding: str, text: str) -> None:
        found = await read(f'<html><meta charset="{encoding}"><p>{text}</p>'.encode(encoding))
        assert (found.kind, found.text) == ("html", text)

    async def test_a_table_that_only_lays_out_is_no_table(self) -> None:
        page = f"<table><tr><td><h1>News</h1><p>{'word ' * 300}</p></td><td><p>Aside</p></td></tr></table>"
        assert (await read(page.encode())).text == f"# News\n\n{('word ' * 300).strip()}\n\nAside"

    async def test_boxes_in_each_other_are_read_up_to_a_thousand(self) -> None:
        text = FileText("Deep", "At the bottom.\n\nAfter.", "html", None)
        assert await read(making.nested_html(1_000)) == text
        assert (await read(b"<!doctype html>" + b"<div>a</div>" * 3_000)).text.count("a") == 3_000
        for depth in (1_001, 100_000):
            assert "nested too deeply: more than 1,000 boxes" in await refusal(making.nested_html(depth))

    @pytest.mark.parametrize("tags", ["<ul><li>", "<table><tr><td>", "<center><blockquote>", "<form><fieldset>"])
    async def test_whatever_the_boxes_are(self, tags: str) -> None:
        num_boxes = len(tags.replace("<li>", "").replace("<tr><td>", "").split("<")) - 1
        page = b"<!doctype html>" + tags.encode() * (1_000 // num_boxes) + b"deep"
        assert "deep" in (await read(page)).text
        assert "nested too deeply" in await refusal(page + tags.encode())

    @pytest.mark.parametrize("tags", ["<b>", "<pre>", "<h1>", "<p><font>", "<a name=x><p>", "<tr><td><i>"])
    async def test_what_old_pages_leave_open_is_read_however_deep(self, tags: str) -> None:
        assert "deep" in (await read(b"<!doctype html>" + tags.encode() * 50_000 + b"deep")).text

    async def test_an_unclosed_menu_does_not_swallow_the_page(self) -> None:
        assert (await read(b"<!doctype html><p>a</p><nav>menu<p>b")).text == "a\n\nmenu\n\nb"

    @pytest.mark.parametrize(
        ("page", "text"),
        [
            ("<select><option>One<option>Two</select>", "One Two"),
            ("<my-card>one</my-card><my-card>two</my-card>", "one two"),
            ("<p>to<b>get</b><span>her</span>", "together"),
            ("<pre><my-token>a</my-token>=1</pre>", "```\na=1\n```"),
            ("Press<img src=gear.png alt='the wheel'>now<img src=line.png alt=''><img>", "Press the wheel now"),
            ("<p>a<object data=x><p>instead</p></object>", "a\n\ninstead"),
        ],
        ids=["options", "unknown", "inline", "code", "image", "object"],
    )
    async def test_words_of_other_elements_stand_apart(self, page: str, text: str) -> None:
        assert (await read(f"<!doctype html>{page}".encode())).text == text

    async def test_an_endless_attribute_is_no_text(self) -> None:
        page = b"<!doctype html><p title='" + b"a" * (15 * MIB) + b"'>Short.</p>"
        assert (await read(page)).text == "Short."

    async def test_entities_do_not_read_files(self) -> None:
        page = b"<!DOCTYPE html [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><p>Name: &x;</p>"
        assert "root" not in (await read(page)).text


class TestText:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    async def test_plain_text_stays_as_it_is(self, encoding: str) -> None:
        text = "Zażółć gęślą jaźń,\n\n  \tпривет 👋\n人人生而自由\n"
        assert await read(text.encode(encoding)) == FileText("", text, "text", None)

    @pytest.mark.parametrize(
        ("encoding", "text"),
        [
            ("cp1252", "déjà vu à la crème brûlée"),
            ("cp1251", "Все люди рождаются свободными и равными в своем достоинстве и правах."),
            ("gb18030", "人人生而自由,在尊严和权利上一律平等。"),
            ("shift_jis", "すべての人間は、生まれながらにして自由である。"),
        ],
    )
    async def test_older_encodings_are_guessed(self, encoding: str, text: str) -> None:
        assert (await read(text.encode(encoding))).text == text

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["unmarked", "marked"])
    @pytest.mark.parametrize("text", ["Die Größe der Bücher. ", "这是一个很长的中文文本。"])
    async def test_a_bad_byte_does_not_spoil_a_text(self, text: str, mark: bytes) -> None:
        once = (text * 100).encode()
        assert (await read(mark + once + b"\xff" + once)).text == f"{text * 100}\ufffd{text * 100}"
        assert (await read(mark + once + "é".encode()[:1])).text == f"{text * 100}\ufffd"

    async def test_an_older_encoding_is_not_taken_for_flawed_utf_8(self) -> None:
        text = "A long text with one accent only. " * 100 + "Voilà"
        assert (await read(text.encode("cp1252"))).text == text

    async def test_markdown_keeps_every_mark_and_gives_its_title(self) -> None:
        text = '<p align="center"><img src="a.png"></p>\n\n# The *tool* #\n\n- [a](b)\n\n```sh\n<html>\n```\n'
        assert await read(text.encode()) == FileText("The *tool*", text, "markdown", None)

    async def test_a_text_about_pdf_is_no_pdf(self) -> None:
        assert (await read(b"A file that begins with '%PDF-1.7' is a PDF.")).kind == "text"
        text = "About files:\n%PDF-1.4 is how some begin.\n"
        assert await read(text.encode()) == FileText("", text, "text", None)
        assert (await read(f"<!doctype html><p>{text}".encode())).kind == "html"

    async def test_nul_characters_and_halves_of_surrogate_pairs_do_not_get_through(self) -> None:
        assert (await read("a\0b".encode("utf-16"))).text == "ab"
        assert (
            await read(
                making.pdf(
                    ["ok"], "bad \ud83d title".encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                )
            )
        ).text == "ok"

    async def test_twenty_million_characters_are_read_and_more_are_refused(self) -> None:
        assert len((await read(b"a" * 20_000_000)).text) == 20_000_000
        assert (await refusal(b"a" * 20_000_001)).startswith("TooLarge: the file has more than 20,000,000 characters")


class TestUnknown:
    async def test_an_empty_file_is_refused(self) -> None:
        assert await refusal(b"") == "UnreadableFile: the file is empty: it has 0 bytes"

    async def test_blank_text_is_refused(self) -> None:
        assert "no text in it" in await refusal(b" \n\t\n")

    async def test_binary_rubbish_is_refused_with_what_can_be_read(self) -> None:
        said = await refusal(bytes(range(256)) * 40)
        assert "of no known type" in said
        assert "PDF, DOCX, HTML, Markdown or plain text" in said

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (making.archive({"[Content_Types].xml": "spreadsheetml.sheet.main+xml"}), "XLSX"),
            (making.archive({"[Content_Types].xml": "presentationml.presentation.main+xml"}), "PPTX"),
            (making.archive({"mimetype": "application/epub+zip"}), "EPUB"),
            (making.archive({"a.txt": "hello"}), "a ZIP archive"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "DOC, XLS or PPT"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"), "locked with a password"),
            (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
            (rb"{\rtf1\ansi Hello}", "RTF"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_other_files_are_called_by_their_name(self, content: bytes, name: str) -> None:
        assert name in await refusal(content)

    async def test_a_hundred_megabytes_are_refused_before_a_process_is_started(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "SERVER", None)
        said = await refusal(b"%PDF-1.7\n" + bytes(100 * MIB))
        assert said == "TooLarge: the file has 104,857,609 bytes; at most 20,971,520 are read (SERVE_MAX_FILE)"


class TestProcess:
    """What the reading process may do, and what happens when it does something else."""

    @pytest.fixture
    def becomes(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Becomes]:
        becomes = Becomes(monkeypatch, tmp_path)
        yield becomes
        becomes.close()

    async def test_a_file_that_takes_too_long_is_refused(self, becomes: Becomes) -> None:
        becomes("import time; time.sleep(60)")
        assert "took too long to read: at most 0.5 s" in await refusal(b"x", timeout_s=0.5)

    async def test_a_process_that_reads_nothing_and_says_nothing_ends(self, becomes: Becomes) -> None:
        becomes("import os, time; os.close(1); time.sleep(60)")
        assert "took too long to read: at most 0.5 s" in await refusal(b"x" * MIB, timeout_s=0.5)

    async def test_a_real_file_that_takes_too_long_is_refused(self) -> None:
        assert "took too long to read: at most 0.5 s" in await refusal(
            b"<!doctype html>" + b"<p>x" * 2_000_000, timeout_s=0.5
        )

    async def test_a_real_file_that_needs_too_much_memory_is_refused(self) -> None:
        content = making.raw_docx("<w:p><w:r><w:t>x</w:t></w:r></w:p>" * 500_000)
        assert (
            await refusal(content, max_memory=150 * MIB)
            == "UnreadableFile: the file needs more memory than 150 MiB to be read"
        )

    @pytest.mark.parametrize(
        "script",
        [
            "import ctypes; ctypes.string_at(0)",
            "import os; os.abort()",
            "raise SystemExit(3)",
            "import signal; signal.raise_signal(9)",
        ],
    )
    async def test_a_crash_is_a_refusal(self, becomes: Becomes, script: str) -> None:
        becomes(script)
        assert "made its reader crash" in await refusal(b"x" * MIB)

    @pytest.mark.parametrize("said", ["hello", "", "[1]", "{}", '{"title": 1}', '{"refused": ["a"]}', "null"])
    async def test_nonsense_is_a_refusal(self, becomes: Becomes, said: str) -> None:
        becomes(f"print({said!r})")
        assert "talk nonsense" in await refusal(b"x")

    async def test_endless_talk_is_a_refusal(self, becomes: Becomes) -> None:
        becomes("while True: print('x' * 100_000)")
        assert "talk without end" in await refusal(b"x", max_text=1_000)

    async def test_it_gets_no_variables(self, becomes: Becomes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SERVE_API_KEYS", "secret")
        becomes("""
            import os
            from contextlib import suppress
            held = []
            for number in range(4096):
                with suppress(OSError):
                    os.fstat(number)
                    held.append(number)
            tell(dict(os.environ), held)
        """)
        variables, descriptors = json.loads((await read(b"x")).text)
        assert "secret" not in str(variables)
        assert descriptors == [0, 1, 2]

    async def test_it_runs_below_the_servers_priority_in_the_servers_session(self, becomes: Becomes) -> None:
        """In a session of its own it would have as large a share of the processor as the server (autogroups)."""
        becomes(f"""
            import os, runpy
            runpy.run_path({str(files.READER)!r})["find_modules"]()
            from chains.documents import sandbox
            sandbox.lower_priority()
            tell(os.getsid(0), os.getpgid(0) == os.getpid(), os.getpriority(os.PRIO_PROCESS, 0))
        """)
        session, own_group, nice = json.loads((await read(b"x")).text)
        assert (session, own_group) == (os.getsid(0), True)
        assert nice >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 1)

    async def test_a_small_file_that_spins_gets_little_cpu_time(self) -> None:
        content = making.pdf_that_spins(3, 50_000_000)
        assert len(content) < 5_000
        said = await refusal(content, cpu_s=0.5)
        assert "took too long to read: at most 180 s, and of the CPU 0.5 s and 50 s for each MiB" in said

    async def test_the_files_of_a_request_share_its_time(self, becomes: Becomes) -> None:
        becomes("tell('read', cpu_s=2.0)")
        reader = FileReader(FileLimits(cpu_s=5.0))
        for _ in range(3):
            await reader.read(b"x")
        with pytest.raises(UnreadableFile, match="took too long"):
            await reader.read(b"x")
        assert (await FileReader().read(b"x")).text, "another request has its own"

    async def test_a_large_file_gets_more_time(self, becomes: Becomes) -> None:
        becomes("tell(json.loads(sys.argv[1])['granted_cpu_s'])")
        assert json.loads((await read(b"x" * MIB)).text) == [55.0]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be less than it was")
    async def test_two_of_roots_readers_are_two_users_without_an_account(self, becomes: Becomes) -> None:
        becomes(f"""
            import os, runpy
            runpy.run_path({str(files.READER)!r})["find_modules"]()
            from chains.documents import sandbox
            sandbox.restrict_by_seccomp = lambda: False
            sandbox.enter(max_memory=2**30, cpu_s=60.0)
            tell(os.getresuid(), os.getresgid(), os.getgroups())
        """)
        users = set()
        for found in await asyncio.gather(read(b"x"), read(b"x")):
            (user, *others), groups, more = json.loads(found.text)
            assert ([user] * 2, [user] * 3, []) == (others, groups, more)
            with pytest.raises(KeyError):
                pwd.getpwuid(user)
            users.add(user)
        assert len(users) == 2

    async def test_a_root_that_cannot_be_anybody_else_reads_all_the_same(self, becomes: Becomes) -> None:
        becomes(f"""
            import os, runpy
            def refuse(*_):
                raise PermissionError(1, "Operation not permitted")
            os.geteuid, os.setgroups = lambda: 0, refuse
            runpy.run_path({str(files.READER)!r})["find_modules"]()
            from chains.documents import sandbox
            sandbox.enter(max_memory=2**30, cpu_s=60.0)
            tell("read")
        """)
        assert json.loads((await read(b"x")).text) == ["read"]

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only Linux takes single rights from root")
    async def test_a_root_that_cannot_end_others_does_not_give_it_a_user_of_its_own(self, becomes: Becomes) -> None:
        """Else nobody could end what takes too long. Containers may take this right, and leave that of users."""
        becomes(f"""
            import ctypes, os, runpy, struct
            runpy.run_path({str(files.READER)!r})["find_modules"]()
            from chains.documents import sandbox
            version, all_but_kill = struct.pack("Ii", 0x20080522, 0), 0xFFFFFFFF ^ 1 << sandbox.CAP_KILL
            held = ctypes.create_string_buffer(24)
            ctypes.CDLL(None).capget(version, held)
            effective, *others = struct.unpack("6I", held)
            ctypes.CDLL(None).capset(version, struct.pack("6I", effective & all_but_kill, *others))
            sandbox.restrict_by_seccomp = lambda: False
            sandbox.enter(max_memory=2**30, cpu_s=60.0)
            tell(os.getresuid())
        """)
        assert json.loads((await read(b"x")).text) == [[0, 0, 0]]

    async def test_nothing_is_left_to_be_loaded_when_it_is_restricted(self, becomes: Becomes) -> None:
        """What root installed for itself cannot be read by the nobody that the process then is."""
        samples = [making.pdf(["a"], "b"), making.docx(["a"], "b"), b"<p>a", "人人生而自由".encode("gb18030"), b"# a"]
        becomes(f"""
            import dataclasses, runpy
            reader = runpy.run_path({str(files.READER)!r})
            reader["find_modules"]()
            reader["load"]()
            from chains.documents.formats import FileLimits
            before = set(sys.modules)
            kinds = [reader["answer"](each, dataclasses.asdict(FileLimits())).kind for each in {samples!r}]
            tell(kinds, sorted(set(sys.modules) - before))
        """)
        assert json.loads((await read(b"x")).text) == [["pdf", "docx", "html", "text", "markdown"], []]

    async def test_the_event_loop_goes_on_while_a_hostile_or_a_large_file_is_read(self) -> None:
        """Held against what it takes to decode the large one, in seconds of the loop's own thread."""
        large = "人人生而自由".encode() * 1_100_000
        encoded = base64.b64encode(large).decode()
        began = time.thread_time()
        base64.b64decode(encoded, validate=True)
        whole = time.thread_time() - began
        stretches, done = [], False

        async def tick() -> None:
            while not done:
                before = time.thread_time()
                await asyncio.sleep(0.001)
                stretches.append(time.thread_time() - before)

        await read(b"warm up")
        ticking = asyncio.create_task(tick())
        for content in (making.pdf_bomb(), making.nested_html(), making.many_pages_pdf(), large):
            asked = SummarizeInput(file=base64.b64encode(content).decode())
            await asyncio.sleep(0.01)
            stretches.clear()  # making it took some time, too
            with suppress(InputError):
                await prepare(asked, FileReader())
            await asyncio.sleep(0.01)
            assert len(stretches) > 20
            assert max(stretches) < whole / 3
        done = True
        await ticking

    async def test_as_many_as_allowed_are_read_at_once(self, becomes: Becomes, tmp_path: Path) -> None:
        becomes(f"""
            import os, time
            from pathlib import Path
            mine = Path({str(tmp_path)!r}, f"{{os.getpid()}}.running")
            mine.touch()
            time.sleep(0.2)
            running = len(list(mine.parent.glob("*.running")))
            time.sleep(0.1)
            mine.unlink()
            tell(running)
        """)
        reader = FileReader()
        found = await asyncio.gather(*(reader.read(b"x") for _ in range(6)))
        assert max(json.loads(each.text)[0] for each in found) == 2

    @pytest.mark.parametrize("cancelled_by", ["task", "scope"])
    async def test_cancelling_kills_the_process_and_leaks_nothing(
        self, becomes: Becomes, tmp_path: Path, cancelled_by: str
    ) -> None:
        started = tmp_path / "started"
        becomes(f"import os, time; open({str(started)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)")
        place = anyio.CapacityLimiter(1)
        reader = FileReader(turn=lambda: place)
        descriptors = []
        for _ in range(3):
            started.unlink(missing_ok=True)
            if cancelled_by == "task":
                task = asyncio.create_task(reader.read(b"x" * MIB))
                (pid,) = await written(started)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(reader.read, b"x" * MIB)
                    (pid,) = await written(started)
                    group.cancel_scope.cancel()
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            descriptors.append(len(os.listdir("/proc/self/fd")))
        assert place.borrowed_tokens == 0
        assert descriptors[-1] <= descriptors[0]

    async def test_reading_leaks_no_descriptor_and_no_process(self) -> None:
        await read(b"warm up")
        before, children = len(os.listdir("/proc/self/fd")), psutil.Process().children(recursive=True)
        for content in (b"text", b"\0", making.pdf_bomb()):
            try:
                await read(content)
            except (UnreadableFile, TooLarge):
                continue
        assert len(os.listdir("/proc/self/fd")) <= before
        assert psutil.Process().children(recursive=True) == children


def test_a_reader_that_answers_a_blank_text_is_an_unreadable_file() -> None:
    """No reader of ours does, but one that a file has taken over may."""
    with pytest.raises(UnreadableFile, match="without a text"):
        text_of(FileText(title="", text=" \n", kind="text", pages=None))


@pytest.mark.parametrize("size", [1, 2, 3, 50, 1000])
def test_the_text_of_an_answer_is_decoded_piece_by_piece(size: int) -> None:
    said = '{"result":{"title":"","text":"","kind":"text","pages":null},"cpu_s":0.5}\nZeile 1\n中文 😀'.encode()
    answer = files.parse([said[start : start + size] for start in range(0, len(said), size)])
    assert files.text_of(answer.result).text == "Zeile 1\n中文 😀"
    for wrong in (said[:-1], said + b"\xff", said.replace(b"\n", b""), b"", b"\n", b"x" * 100_000):
        with pytest.raises(UnreadableFile, match="talk nonsense"):
            files.parse([wrong[start : start + size] for start in range(0, len(wrong), size)])
