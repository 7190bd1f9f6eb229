"""Markup: every character of a text comes back, words are what a translator translates, and what is lost is seen."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from chains.documents.blocks import blocks
from chains.documents.markup import MARKDOWN, Part, faults, finer, parts

TEXTS = Path(__file__).parents[2] / "texts"
MANUAL = (TEXTS / "manual.md").read_text()
BOOK = (TEXTS / "pride-and-prejudice.txt").read_text()

FRAGMENTS = [
    *(
        "\n# ",
        "## ",
        "Title",
        "\n",
        "\n\n",
        "- ",
        "* ",
        "+ ",
        "1. ",
        "23) ",
        "> ",
        ">> ",
        "    ",
        "  ",
        "\t",
        "```",
        "~~~",
    ),
    *("````", "`", "``", "*", "**", "***", "_", "__", "~~", "[", "]", "(", ")", "](", "![", "<", ">", "</p>", "<div>"),
    *(
        "<!--",
        "-->",
        "<?",
        "<pre>",
        "\n</pre>",
        "<script>",
        "</script>",
        "<br/>",
        "&amp;",
        "&#8211;",
        "\\",
        "\\\n",
        "  \n",
    ),
    *(
        "{name}",
        "{{ x }}",
        "${x}",
        "%s",
        "%(n)d",
        "%1$s",
        "$5",
        "100 %",
        "https://example.com/a_(b)?c=d#e",
        "me@example.com",
    ),
    *(
        "<https://x.org>",
        "\n[a]: b\n",
        "[a]",
        "[^1]: note",
        "[^1]",
        "[x] ",
        "[!NOTE]\n",
        "---",
        "===",
        "***",
        ":-",
        "-:",
    ),
    *(
        "a",
        "Ünï",
        "中文。",
        "words here ",
        "A sentence. ",
        "\r\n",
        "\r",
        "\u2028",
        "\0",
        "\x0c",
        "👨‍👩‍👧",
        "e\u0301",
        '"title"',
    ),
    *("=", ":", ";", "!", "|", " | ", "| a | b |\n", "|---|---|\n", "\n| a | b |\n|---|---|\n| c \\| d | `e` |\n"),
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=15)), max_size=40).map("".join)


def changed(text: str, change: Callable[[str], str]) -> str:
    """The text with only its words changed, as by a translator that takes each leaf apart."""
    return "".join(part.text if part.is_fixed else changed_leaf(part.words, change) for part in parts(text))


def changed_leaf(text: str, change: Callable[[str], str]) -> str:
    return "".join(part.text if part.is_fixed else change(part.text) for part in finer(text))


def structure(text: str, *, has_code: bool = True) -> list[Any]:
    """What a parser sees but for the words: blocks, and the code, addresses and tags within lines."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable([] if has_code else "code")
    text = re.sub(r"\[\^\d+\]:?", "note", text)  # this parser knows no footnotes

    def seen(token: Token) -> Any:
        is_code = token.type in ("fence", "code_block", "code_inline", "html_inline")
        attributes = {name: value for name, value in token.attrs.items() if name != "title"}
        children = [seen(child) for child in token.children or [] if child.type not in ("text", "softbreak")]
        return token.type, token.info, token.content if is_code else "", attributes, children

    return [seen(token) for token in parser.parse(text)]


def reversed_words(text: str) -> str:
    return re.sub(r"\w+", lambda word: word.group()[::-1], text)


def in_chinese(text: str) -> str:
    return re.sub(r"\w+", "词", text).replace(" ", "")


def words_of(text: str) -> list[str]:
    return [part.words for part in parts(text) if not part.is_fixed]


@settings(max_examples=1200, deadline=None)
@given(texts)
def test_the_parts_are_the_text(text: str) -> None:
    found = list(parts(text))
    assert "".join(part.text for part in found) == text
    assert all(part.text for part in found)
    for part in found:
        if not part.is_fixed:
            assert part.text == part.text.strip()
            assert any(char.isalpha() for char in part.words)
            assert not (part.is_line and re.search(r"[\r\n]", part.words))


@settings(max_examples=600, deadline=None)
@given(texts)
def test_the_finer_parts_are_the_leaf(text: str) -> None:
    found = finer(text)
    assert "".join(part.text for part in found) == text
    assert all(part.text for part in found)


@settings(max_examples=600, deadline=None)
@given(texts)
def test_a_text_keeps_all_of_itself(text: str) -> None:
    assert faults(text, text, is_line=False) == []


@settings(max_examples=300, deadline=None)
@given(texts, texts)
def test_faults_are_told_of_anything(source: str, target: str) -> None:
    assert all(len(fault) < 150 for fault in faults(source, target, is_line=True))


@settings(max_examples=300, deadline=None)
@given(texts)
def test_what_is_not_words_changes_no_structure(text: str) -> None:
    def kinds(text: str, has_code: bool = True) -> list[str]:
        return [entry[0] for entry in structure(text, has_code=has_code)]

    # Nothing indented is code where no mark tells that it is Markdown.
    outcome = changed(text, str)
    assert any(kinds(outcome, has_code) == kinds(text, has_code) for has_code in (True, False))
    markdown = "# Title\n\n" + text
    assert kinds(changed(markdown, str)) == kinds(markdown)


PREFIXES = [
    "",
    "",
    "  ",
    "    ",
    "\t",
    "> ",
    "> > ",
    ">",
    "- ",
    "* ",
    "1. ",
    "12) ",
    "  - ",
    "    - ",
    "- > ",
    "> - ",
    "- [ ] ",
]
LINES = [
    *(
        "W",
        "W `C` W",
        "**W** W",
        "*W* W.",
        "[W](u.html) W",
        "# W",
        "## W #",
        "| W | W |",
        "W | W",
        "|--|--|",
        "--|--",
        "---",
    ),
    *(
        "===",
        "***",
        "```",
        "```py",
        "~~~",
        "<div>",
        "</div>",
        "<!-- C -->",
        "<span>W</span> W",
        "![W](p.png)",
        "[W]",
        "W  ",
    ),
    *(
        "[a]: u.html",
        "W\\",
        "| W \\| W | `C` |",
        "<pre>",
        "</pre>",
        "",
        "",
        "",
        "`C",
        "W `` C ` C `` W",
        "&amp; W",
        "<!--",
        "-->",
    ),
]


@settings(max_examples=800, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PREFIXES), st.sampled_from(LINES)), max_size=14), st.sampled_from(["\n", "\r\n"])
)
def test_no_word_that_a_reader_sees_is_left_out(rows: list[tuple[str, str]], line_end: str) -> None:
    """Whatever a parser that is given the whole document calls text stands in the parts that are words."""
    names = (f"q{number}q" for number in range(1000))
    lines = ["# T", "", *(prefix + line for prefix, line in rows)]
    text = re.sub("[WC]", lambda _: next(names), line_end.join(lines))

    def texts_of(tokens: list[Token]) -> str:
        return " ".join(token.content if token.type == "text" else texts_of(token.children or []) for token in tokens)

    seen = re.findall(r"q\d+q", texts_of(MarkdownIt("commonmark").enable("table").parse(text)))
    found = re.findall(
        r"q\d+q", " ".join(part.text for leaf in words_of(text) for part in finer(leaf) if not part.is_fixed)
    )
    assert set(seen) <= set(found)


@pytest.mark.parametrize("change", [str, str.upper, reversed_words, in_chinese])
def test_a_manual_keeps_its_structure_whatever_becomes_of_its_words(change: Callable[[str], str]) -> None:
    assert structure(changed(MANUAL, change)) == structure(MANUAL)


@pytest.mark.parametrize("change", [str.upper, in_chinese])
def test_a_manual_keeps_its_code_and_placeholders_byte_by_byte(change: Callable[[str], str]) -> None:
    outcome = changed(MANUAL, change)
    kept = [
        *re.findall(r"(?s)(?:```|~~~).*?(?:```|~~~)\n", MANUAL),
        *re.findall(r"(?<!`)`[^`\n]+`(?!`)", MANUAL),
        *(
            "``a ` b``",
            "{{ user }}",
            "%(count)d",
            "{sensor}",
            "${HOME}",
            "%s",
            "</kbd>",
            "&nbsp;",
            "(#alarms)",
            "[^1]:",
        ),
        *(
            "<support@larkspur.example>",
            "https://larkspur.example/papers/forecast_v2.pdf",
            "][map]",
            "<br>",
            "&mdash;",
        ),
        *(
            "    2024-03-01T06:00:00Z  garden   4.2 °C   81 %\n",
            '[map]: https://map.larkspur.example/?zoom=8#stations "',
        ),
    ]
    assert [thing for thing in kept if outcome.count(thing) != MANUAL.count(thing)] == []


def test_a_manual_is_translated_wholly() -> None:
    """Outside of what is kept no English is left."""
    assert set(re.findall(r"[A-Za-z]+", "".join(words_of(changed(MANUAL, in_chinese))))) <= set(
        re.findall(
            r"[A-Za-z]+", "".join(part.text for leaf in words_of(MANUAL) for part in finer(leaf) if part.is_fixed)
        )
    )
    for word in (
        "Batteries",
        "seal",
        "Frost",
        "substitute",
        "ladder",
        "Kendal",
        "garden",
        "Default",
        "ring",
        "forecast",
    ):
        assert any(word.lower() in leaf.lower() for leaf in words_of(MANUAL)), word


def test_a_plain_book_is_its_paragraphs() -> None:
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", BOOK)]
    assert words_of(BOOK) == [paragraph for paragraph in paragraphs if re.search(r"[^\W\d_]", paragraph)]


def test_indented_paragraphs_of_a_plain_book_are_words() -> None:
    book = "I\n\n    It was a dark night.\nThe rain fell.\n\n\tThe wind, too.\n\n* * *\n\n    `So it seems,' he said."
    assert words_of(book) == [
        "I",
        "It was a dark night.\nThe rain fell.",
        "The wind, too.",
        "`So it seems,' he said.",
    ]


def test_indented_blocks_of_markdown_are_code() -> None:
    assert words_of("# Use\n\nCall it:\n\n    make all the things\n\nDone.") == ["Use", "Call it:", "Done."]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("head", ["Usage\n=====", "First.\n\nUsage\n-----", "**Usage**", "1. Use **this**:"])
def test_what_shows_that_a_text_is_markdown(head: str, line_end: str) -> None:
    text = f"{head}\n\nRun:\n\n    make install\n".replace("\n", line_end)
    assert words_of(text)[-1] == "Run:"
    assert MARKDOWN.search(text)


@pytest.mark.parametrize("head", ["***START***", "- Yes, he said.", "* * *", "He * she ** they.", "No   Yes\n---  ---"])
def test_what_plain_books_have_too_does_not_show_it(head: str) -> None:
    assert words_of(f"{head}\n\n    It was a dark night.\n")[-1] == "It was a dark night."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", ["one\ntwo", "three"]),
        ("# A *title* #\n", ["A *title*"]),
        ("Title\n=====\n", ["Title"]),
        ("> a\n> b\n", ["a b"]),
        ("- a\n  b\n\n  c\n- d", ["a b", "c", "d"]),
        ("- a\nlazy\n", ["a lazy"]),
        ("> - a\n>   b\n> - [ ] c\n", ["a b", "c"]),
        ("- 中文\n  中文\n", ["中文中文"]),
        ("- a  \n  b\\\n  c\n", ["a", "b", "c"]),
        ("a  \nb\n", ["a  \nb"]),
        ("| a | b \\| c |\n|--|--|\n|  | d |\n", ["a", "b \\| c", "d"]),
        ("> | a | b |\n> |--|--|\n> | c | d |\n", ["a", "b", "c", "d"]),
        ("a | b\n--|--\nc|d|e\n", ["a", "b", "c", "d"]),
        ("---\ntitle: x\n---\n\ntext", ["text"]),
        ("---\n\nno front matter\n\n---\n", ["no front matter"]),
        ("---\nNone either.\n\nMore.\n\n---\n\nEnd.\n", ["None either.", "More.", "End."]),
        ("---\n# A slide\n\n---\n# The next\n", ["A slide", "The next"]),
        ("---\n# of a page\nlayout: wide\ntags:\n\n- a\n---\n\ntext", ["text"]),
        ('+++\ntitle = "x"\n\n[extra]\ny = "z"\n+++\n\ntext', ["text"]),
        ("+++\nno front matter\n+++\n", ["+++\nno front matter\n+++"]),
        ("```\ncode\n\nmore\n```\ntext", ["text"]),
        ("text\n```\ncode\n\nmore\n```\ntext", ["text", "text"]),
        ("- a\n  ```\n  code\n\n  more\n  ```\n- b", ["a", "b"]),
        ("> ```\n> code\n> ```\n> b", ["b"]),
        ("<!-- a\n\nb -->\n\nc", ["c"]),
        ("<script>\nlet a;\n\nlet b;\n</script>\n\nc", ["c"]),
        ("<div>\n  <p>one <em>two</em>\n  three</p> <pre>code</pre>\n</div>\n", ["one <em>two</em> three"]),
        ("<details>\n<summary>Why?</summary>\n\nSo.\n\n</details>", ["Why?", "So."]),
        ("<p>one <SCRIPT>code</script > two</p>\n<pre>code</PRE> three", ["one", "two", "three"]),
        ("> <div>one\n> two <b>x</b></div>\n>\n> three\n", ["one two <b>x</b>", "three"]),
        ("1. a\n\n   <p>one\n   two</p>\n   <!-- b -->\n\n- > <p>c\r\n  > d\r\n", ["a", "one two", "c d"]),
        ("[a]: https://example.com 'Title'\n\n[^1]: A note.\n", ["A note."]),
        (
            "# T\n\n[^1]: A note.\n\n    More of it.\n\n    ```\n    code\n    ```\n\nb\n\n    code\n",
            ["T", "A note.", "More of it.", "b"],
        ),
        ('# T\n\n!!! note "Look"\n\n    Here.\n\n??? tip\n    There.\n', ["T", '"Look"', "Here.", "There."]),
        (
            "A [page], `[page]`, [that][page], [no].\n\n[Page]: a.html\n",
            ["A [page][page], `[page]`, [that][page], [no]."],
        ),
        ("> [!NOTE]\n> Look.\n", ["Look."]),
        ("He [Bob]: yes.\n[Ann]: I see.\n\nHe saw [Ann].", ["He [Bob]: yes.\n[Ann]: I see.", "He saw [Ann]."]),
        ("![](a.png) `code` https://example.com {name}\n\n***\n\n12 %\n", []),
        ("a\r\n\r\nb\rc\r\r# d\r\n", ["a", "b\rc", "d"]),
        ("\ufeff# Title\n", ["\ufeff# Title"]),
    ],
)
def test_the_words_of(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("use `a b` and ``c ` d`` now", ["`a b`", "``c ` d``"]),
        (
            "see https://a.org/b_(c)?d=e. Or www.b.org, or (https://c.org/x).",
            ["https://a.org/b_(c)?d=e", "www.b.org", "https://c.org/x"],
        ),
        ("见https://a.org/b。谢谢", ["https://a.org/b"]),
        ("write to me.too@b-c.org!", ["me.too@b-c.org"]),
        ("a <b class='x'>bold</b> <br/> <https://x.org> end", ["<b class='x'>", "</b>", "<br/>", "<https://x.org>"]),
        (
            "Hi {name}, {{ x.y }}, ${z}, {0:.2f}, {}, #{w}, %{v}",
            ["{name}", "{{ x.y }}", "${z}", "{0:.2f}", "{}", "#{w}", "%{v}"],
        ),
        ("%s of %d at %.2f by %(who)s, %1$s and %5d", ["%s", "%d", "%.2f", "%(who)s", "%1$s", "%5d"]),
        ("100 % sure, 50% discount, $5 and $6, {not one of these}, 5 % of it", []),
        ("$HOME and %PATH%, %user% here", ["$HOME", "%PATH%", "%user%"]),
        ("%sfoo, took %ds, (%dMB), 100%s of it", ["%s", "%d", "%d", "%s"]),
        ("100% sure, 5% of, 100 %sicher, 50%off 20%off, 20%d'inflation, 7 %dvon", []),
        ("Hello :name:! :thumbs-up:", [":name:", ":thumbs-up:"]),
        ("at 10:30: go; see: note: this; a:b:c; https: and ::c::", []),
        ("{user|upper} and {date, date, short}", ["{user|upper}", "{date, date, short}"]),
        (
            "{n, plural, =0 {none} one {# of {all}} other {# items}} left",
            ["{n, plural, =0 {none} one {# of {all}} other {# items}}"],
        ),
        ("{a, select few} of {them}", ["{them}"]),
        ("<0>Click</0> <1/> if 1 <3 and 5> 4", ["<0>", "</0>", "<1/>"]),
        ('[text](to/it "Title") and ![alt](pic.png)', ['](to/it "Title")', "](pic.png)"]),
        ("[text][label], [label][], a note[^2]", ["][label]", "[label][]", "[^2]"]),
        ("a {% if x %}b{% endif %}", ["{% if x %}", "{% endif %}"]),
    ],
)
def test_what_in_a_line_must_stay(text: str, fixed: list[str]) -> None:
    outcome = changed_leaf(text, in_chinese)
    found = [part.text.strip() for part in finer(text) if part.is_fixed]
    assert all(thing in outcome for thing in fixed)
    rest = "".join(found)
    for thing in fixed:
        rest = rest.replace(thing, "", 1)
    assert not re.search(r"[A-Za-z{}$]", rest.replace("$5", "").replace("$6", "")), rest


def test_marks_are_no_words() -> None:
    words = [
        part.text for part in finer("**bold** and *it_alics*, ~~no~~ [a link](b), _c_ \\*d\\*") if not part.is_fixed
    ]
    assert words == ["bold", "and", "it_alics", "no", "a link", "c", "d"]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("Run `make test`.", "Führe es aus.", ["`make test` is missing"]),
        ("Run `make test`.", "Führe `mache test` aus.", ["`make test` is missing", "`mache test` was added"]),
        ("See https://a.org.", "Siehe https://a.org https://a.org.", ["`https://a.org` was added"]),
        ("Hi {name}!", "Hallo!", ["`{name}` is missing"]),
        ("Hi {name}!", "Hallo {Name}!", ["`{name}` is missing", "`{Name}` was added"]),
        ("%d files", "Dateien", ["`%d` is missing"]),
        ("size: %dMB", "Größe: MB", ["`%d` is missing"]),
        ("took %ds", "dauerte %d s", []),
        ("<0>Click</0> here", "Klick hier", ["`<0>` is missing", "`</0>` is missing"]),
        ("a [b](c)", "a [b](d)", ["`(c)` is missing", "`(d)` was added"]),
        ("a <br> b", "a b", ["`<br>` is missing"]),
        ("Title", "# Titel", ["a heading was added"]),
        ("One thing", "- Ein Ding", ["a list was added"]),
        ("One thing", "1. Ein Ding", ["a list was added"]),
        ("One thing", "> Ein Ding", ["a quote was added"]),
        ("a **bold** word", "ein fettes Wort", ["bold is missing"]),
        ("a ~~bad~~ word", "ein schlechtes Wort", ["strikethrough is missing"]),
        ("a *nice* word", "ein **nettes** Wort", ["italics is missing", "bold was added"]),
        ("[***a***](b)", "***[a](b)***", ["a link"]),
        ("one cell", "eine | Zelle", ["a `|` was added"]),
        ("one \\| cell", "eine Zelle \\|", []),
        ("one cell", "eine\nZelle", ["a line break was added"]),
        ("a\n# b", "a\n# b", ["a line break was added"]),
    ],
)
def test_a_line_that_was_not_kept_is_told(source: str, target: str, expected: list[str]) -> None:
    found = faults(source, target, is_line=True)
    assert all(any(fault.startswith(entry) for fault in found) for entry in expected), found
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Ein Ding\n\nNoch eins", "a paragraph was added"),
        ("Ein Ding\n---", "a heading was added"),
        ("Ein Ding\n- noch eins", "a list was added"),
        ("    Ein Ding\n\n    noch eins", "a code block was added"),
        ("a | b\n--|--\nc | d", "a table was added"),
        ("Ein Ding  \nnoch eins", "a line break was added"),
        ("<div>\nEin Ding\n</div>", "`<div>` was added"),
        ("", "a paragraph is missing"),
    ],
)
def test_a_paragraph_that_did_not_stay_one_is_told(target: str, expected: str) -> None:
    assert expected in faults("One\nthing", target, is_line=False)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Run `make test`, {name}.", "{name}, führe `make test` aus."),
        ("A *nice* **day**.", "Ein **Tag**, ein *schöner*."),
        ("See [the docs](docs/a.md).", "Siehe [die Anleitung](docs/a.md)."),
        ("100 % sure, for $5", "zu 100 % sicher, für 5 $"),
        ("over two\nlines", "auf einer Zeile"),
        ("1986 was good", "1986 war gut"),
        ("See <https://a.org>.", "Siehe <https://a.org>."),
    ],
)
def test_a_faithful_translation_has_no_faults(source: str, target: str) -> None:
    assert faults(source, target, is_line=False) == []


WIDE_TABLE = "|" + "a|" * 200 + "\n|" + "-|" * 200 + "\n" + "|a\n" * 320


@pytest.mark.parametrize(
    "text",
    [
        *("(" * 100_000, "[" * 50_000, "*" * 50_000, "`" * 50_000, "<" * 50_000, "{" * 50_000, "](" * 25_000),
        *("_a" * 25_000, " " * 50_000, "<!--" * 12_000, "> " * 25_000, "- " * 25_000, "|" * 50_000, "\\" * 50_000),
        *("![" * 25_000, "a@" * 25_000, "http://" * 7_000, "[a](" * 12_000, "<a " * 15_000, "`` ` " * 10_000),
        *("<div>\n" * 8_000, "a\n=" * 10_000, "[a]" * 15_000, "\n" * 50_000, "[a]: b\n" * 7_000),
        *((WIDE_TABLE + "# x\n") * 8, "{a, plural," * 5_000, "{a,plural,{b}" * 4_000, "|-|\n" * 12_000, ":a" * 25_000),
        *("[a](" + " " * 50_000 + "b", "# a\n\n[a]:" + " " * 50_000 + "\n", "a" + " " * 50_000 + "\nb"),
    ],
    ids=lambda text: text[:6],
)
def test_no_text_takes_long(text: str) -> None:
    """Patterns and parsers can take hours for such."""
    start = time.monotonic()
    assert "".join(part.text for part in parts(text)) == text
    assert "".join(part.text for part in finer(text)) == text
    assert isinstance(faults(text, text[:-1], is_line=False), list)
    assert time.monotonic() - start < 5


def test_a_table_of_gaps_is_never_built() -> None:
    """Every row gets as many cells as its head has: 21 kB made 800,000 of them, of 600 bytes each."""
    assert max(len(part.text) for part in parts(WIDE_TABLE * 12)) > len(WIDE_TABLE)


@pytest.mark.parametrize("row", ["| W | W |", "W | W", "> | W | W |"])
def test_a_long_table_is_cells_to_its_end(row: str) -> None:
    rows = [row.replace("W", f"a word in row {number}") for number in range(4000)]
    rows.insert(1, row.replace("W", "---"))
    text = "# T\n\n" + "\n".join(rows) + "\n\nEnd.\n"
    found = list(parts(text))
    assert "".join(part.text for part in found) == text
    cells = [part for part in found if not part.is_fixed][1:-1]
    assert len(cells) == 8000
    assert all(cell.is_line and "|" not in cell.text and "\n" not in cell.text for cell in cells)
    if not row.startswith(">"):
        assert max(len(block.text) for block in blocks(text)) < 31_000


def test_what_follows_a_long_table_is_no_row_of_it() -> None:
    table = "a | b\n--|--\n" + "word | word\n" * 3000
    assert words_of(f"{table}\nText | text\nmore\n\n{table}")[-6002 - 1] == "Text | text\nmore"


@pytest.mark.parametrize(
    "text",
    [MANUAL, BOOK, BOOK.replace("\n\n", "\n"), BOOK.replace("\n", " ")],
    ids=["manual", "book", "lines", "one line"],
)
def test_a_long_text_is_read_no_further_than_needed(text: str) -> None:
    """No block is much larger than the limit, so that the first part of a long text comes at once."""
    long = text * 8
    found = list(blocks(long))
    assert "".join(block.text for block in found) == long
    assert max(len(block.text) for block in found) < 60_000


def test_code_that_never_ends_stays_code() -> None:
    text = "# A\n\n```\n" + "let it be\n\n" * 20_000
    assert words_of(text) == ["A"]


def test_a_part_knows_what_it_is() -> None:
    assert list(parts("# T\n\nText.\n")) == [
        Part("# ", is_fixed=True),
        Part("T", is_fixed=False, is_line=True),
        Part("\n\n", is_fixed=True),
        Part("Text.", is_fixed=False),
        Part("\n", is_fixed=True),
    ]
