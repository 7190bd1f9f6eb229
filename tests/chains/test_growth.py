"""Growth: four times as much text costs about four times as much CPU, whatever is in it, for each pattern and loop.

A pattern holds the interpreter's lock while it runs, so one that backtracks on a line of 60 kB stops the whole server.
"""

import ast
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage
from pydantic import TypeAdapter

from chains import summarize, translate
from chains.conversation import trim
from chains.documents import cutting, inline, languages, markup
from chains.documents.blocks import blocks, is_mostly_gaps, lines
from chains.documents.formats import Blocks, FileLimits, detect, html, package, pdf, plain
from chains.documents.kept import faults
from chains.documents.languages import detect as detect_language
from chains.documents.languages import find_language
from chains.errors import InputError
from chains.messages import parse_message
from chains.segments import segments
from chains.texts import Text
from chains.translation_prompt import Wish
from chains.translator import Attempt
from llm import prompt as llm_prompt
from service.entry import access, body
from service.records import recorder
from tests.chains.marking import MarkingModel

ROOT = Path(__file__).parents[2]
PACKAGES = ("chains", "service", "llm")

MAX_RATIO = 8
"""Of CPU times for a text and for one four times as long: linear is 4, quadratic is 16."""

FLOOR_S = 0.004
"""Below it a ratio says nothing."""

MAX_PER_BYTE_S = 50e-6


class Row(NamedTuple):
    """A function of a text, and a text for it of any size. Each unit is repeated between a beginning and an end."""

    covers: str
    """The patterns and loops, by the names that `patterns_of` gives them, without `chains.`; in words otherwise."""
    run: Callable[[str], object]
    units: Iterable[str]
    begin: str = ""
    end: str = ""
    size: int = 4_000
    """Characters of the smaller text."""


def all_of(function: Callable[[str], Iterator[Any]], prefix: str = "") -> Callable[[str], object]:
    return lambda text: [*function(prefix + text)]


def count(text: str) -> int:
    return len(text) // 4 + 1


def quietly(read: Callable[[bytes], object]) -> Callable[[str], object]:
    """The same of a text, whether it is refused or not."""

    def run(text: str) -> object:
        try:
            return read(text.encode())
        except InputError as error:
            return error

    return run


def attempt(words: str) -> Callable[[str], object]:
    def run(text: str) -> str:
        made = Attempt(words)
        for start in range(0, len(text), 8):
            made.add(AIMessageChunk(content=text[start : start + 8]))
            assert made.has_new_marks in (True, False)
            made.take()
        return made.text

    return run


def in_quotes(text: str) -> object:
    return [*markup.parts("# T\n\n> " + text.replace("\n", "\n> "))]


def in_items(text: str) -> object:
    return [*markup.parts("# T\n\n- " + text.replace("\n", "\n  "))]


def block_of_items(text: str) -> object:
    kept = Blocks(10**9)
    for item in text.split("\n"):
        kept.add(item)
    return kept.text()


def parse_all(text: str) -> object:
    return [parse_message(["user", content]) for content in text.split()]


def trim_all(text: str) -> object:
    """Old turns are left out of a conversation of many."""
    turns = [HumanMessage(content) for content in text.split()]
    return trim(turns, len(turns) // 2, lambda messages: sum(len(message.content) for message in messages))


terms = {"a " * length: "b" for length in range(1, 51)} | {"a" * length + "b": "c" for length in range(1, 50)}
wish = Wish(source=None, target=find_language("de"), formality=None, glossary=terms)
model = MarkingModel(answer=str.upper)
translating, summarizing = translate.build(model), summarize.build(model)
special = llm_prompt._any_of(
    ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", *(f"<|reserved_special_token_{n}|>" for n in range(253))]
)

MARKDOWN_UNITS = (
    *(
        "# a\n",
        "a\n\n",
        "1\n\n",
        "> ",
        ">\n",
        "- ",
        "* a\n",
        "1. a\n",
        "    a\n",
        "```\n",
        "~~~a\n",
        "`",
        "<div>\n",
        "<!--\n",
    ),
    *(
        "<script>\n",
        "</p>",
        "|",
        "|a",
        "|a\n",
        "a|b\n",
        "|-|\n",
        "[a]: b\n",
        "[a]:\n",
        "\n[",
        "[^1]: a\n",
        "---\n",
        "a\n=\n",
    ),
    *("<em>", "<a ", "\\\n", "a  \n", "\0|", "!!! a\n", "\t", "\r", "\r\n", " ", "a\n    b\n", "```\n~~~\n", "***\n"),
)
INLINE_UNITS = (
    *(
        "<!--",
        "<!-- a ",
        "<!-- -",
        "<a:",
        "<a@",
        "<a b ",
        "</a ",
        "<1",
        "<code>a",
        "`a",
        "`a``b```c````d`````e",
        "``a`",
    ),
    *("](", "](a(b)", "](a b", "](<", "]( ", '](a "', "](a (", "][a", "[a", "[a][", "[^a", "](\\", "](a(<)"),
    *("http://", "a://:", "www.", "www.a(", "mailto:{", "+a", "a@", "a@b.", " a@b-", "tel:+"),
    *(
        "{a, plural,",
        "{a,plural,{b}",
        "{{",
        "{{a ",
        "{%",
        "{% a",
        "${",
        "{a.",
        "{#a",
        "$(",
        "$a",
        "%(a",
        "%1$",
        "%a",
        ":a",
        "0%",
    ),
    *("  ", "  \n", "\\", "&a", "&#1", "&#x", "![", "*", "~~", "_a", "_", "é", "word "),
)

ROWS = (
    Row(
        "documents.blocks._LINE documents.blocks._SENTENCE_END",
        all_of(lines),
        ("a", "a. ", "a ", "。", "\r", "\n"),
        size=12_000,
    ),
    Row("documents.blocks._FENCE", all_of(blocks), ("`", "- ", "-  ", "1. ", "~", "\t", "1"), end="x`\n", size=4_900),
    Row("documents.blocks._FENCE", all_of(blocks), ("`", "~"), begin="- ", end=" x`\n", size=4_900),
    Row(
        "documents.blocks._UNDERLINE documents.blocks._BEGINS",
        all_of(blocks),
        ("-", "| ", ">", "> ", " "),
        begin="a\n",
        end="x",
    ),
    Row(
        "documents.blocks._RAW documents.blocks._RAW_END_TAG",
        all_of(blocks),
        ("<!--\n", "<!--", "<script>\n", "</script\n", "<?\n", "<![CDATA[\n", "</"),
        begin="<pre>\n",
    ),
    Row("fences and what ends them", all_of(blocks), ("```\n", "````\n~~~\n", "  ```\n", "```` ``\n"), begin="````\n"),
    Row(
        "documents.blocks._FRONT_MATTER documents.blocks._YAML_END",
        all_of(blocks),
        ("---x\n", "# \n", "--- ", " "),
        begin="---\na: b\n",
    ),
    Row("documents.blocks._FRONT_MATTER", all_of(blocks), ("#\n", "# a\n", " ", "a"), begin="---\n"),
    Row("documents.blocks._TOML_END", all_of(blocks), ("+++x\n", "+++ ", "\n"), begin="+++\na = b\n"),
    Row("is_mostly_gaps", is_mostly_gaps, ("|", "|\n", "a|b\n"), size=20_000),
    Row(
        "documents.markup.MARKDOWN",
        markup.MARKDOWN.search,
        (
            "](a",
            "\n\na\n",
            "\n\n" + "a" * 200 + "\n=",
            "**a",
            "`a ",
            "\n ",
            "\r",
            "\n```",
            "\n|-",
            "\n---",
            "# ",
            "\n#",
        ),
        size=10_000,
    ),
    Row(
        "documents.markup._DEFINITION",
        markup._DEFINITION.search,
        ("\n[a", "\n[a]:", "\n[a]: <", "\n>>", "\n[a]:\n", "[a]: b ", "\n[a]: b c", "\n [a]:" + " " * 99, "]:"),
        size=10_000,
    ),
    Row(
        "documents.markup._DEFINITION",
        all_of(markup._defined_labels),
        ("[a]: b\n", "]:", "[]:", "\n[a]:", "[" + "a" * 300 + "]:", ">[a]:", "\n[a]: " + "b" * 100),
        size=10_000,
    ),
    Row(
        "documents.markup._MARKED_LINE documents.markup._INDENTED_LINE "
        "documents.markup._LINE_END documents.markup._GAP",
        all_of(markup.parts),
        ("\n ", " ", "\n\t", "a\n", "\r\n", "\n \n", "a\n \n", "1", "\n1", "\u2028"),
        begin="a\n",
        size=2_500,
    ),
    Row(
        "documents.markup._INDENTS documents.markup._HEAD",
        all_of(markup.parts, "# a\n\n"),
        ("!", "!!! ", "a"),
        begin="!!! ",
    ),
    Row("documents.markup._HEAD", all_of(markup.parts, "# a\n\n"), ("[x] ", "[^a", "[!a", "??? a "), begin="- "),
    Row(
        "documents.markup._TAG_AMONG_WORDS documents.markup._TAG_END documents.markup._COMMENT_END",
        all_of(markup.parts),
        ("<em>", "<em ", "<em>a</em>", "<!--", "<!-- -->", "<", "a<b>c"),
        begin="<div>\n",
    ),
    Row(
        "documents.markup._RAW_TAG documents.markup._RAW_TAG_ENDS",
        all_of(markup.parts),
        ("<script>", "</script ", "<pre></pre>", "<style ", "</SCRIPT"),
        begin="<div><script>",
    ),
    Row("the parser of blocks", all_of(markup.parts, "# T\n\n"), MARKDOWN_UNITS, size=800),
    Row("the parser of blocks in quotes", in_quotes, MARKDOWN_UNITS[::2], size=600),
    Row("the parser of blocks in lists", in_items, MARKDOWN_UNITS[1::2], size=600),
    Row("documents.inline._NOT_WORDS", markup.finer, INLINE_UNITS, size=1_500),
    Row("documents.inline._SHORT_REFERENCE", lambda text: inline.spelled_out(text, {"a"}), INLINE_UNITS, size=2_500),
    Row("the parser of lines", lambda text: faults(text, text, is_line=False), INLINE_UNITS, size=400),
    Row(
        "segments",
        lambda text: [*segments(text, budget=300, count=count)],
        ("1\n\n", "a\n\n", "- 1\n", "> [a] b\n", "中", "  1"),
        size=3_000,
    ),
    Row(
        "what is cut",
        lambda text: cutting.cut(text, budget=100, count=count),
        ("a", "a ", "中", "\n", "a. ", " "),
        size=10_000,
    ),
    Row(
        "documents.languages._NO_PROSE",
        lambda text: languages._NO_PROSE.sub(" ", text),
        ("a", "[", "a@", "<a", "{", "`a\n", "```", "www.", "%(a"),
        size=3_000,
    ),
    Row("the language of a text", detect_language, ("Ein Satz. ", "中", "a@", "<", "```a"), size=20_000),
    Row(
        "translator.LINE_END translator.ITEM",
        attempt("a"),
        (" ", "\n ", " \n", "a\n", "a", "1", "\t"),
        begin="a",
        end="b",
        size=4_000,
    ),
    Row(
        "translator.PARAGRAPH_END",
        attempt("a\nb"),
        (" ", "\n ", "\n", "a\n\n", "a\nb"),
        begin="a\n",
        end="b",
        size=4_000,
    ),
    Row("translation_prompt._stands_in", wish.terms_in, ("a ", "a", "a\n ", "aab ", "b"), size=4_000),
    Row(
        "formats' blocks: documents.formats.Blocks.LIST_ITEM",
        block_of_items,
        (" ", "1", "- a\n", "1. a\n", "\n"),
        size=20_000,
    ),
    Row("documents.formats.plain.NO_TEXT", plain.NO_TEXT.search, ("a", "\n"), size=50_000),
    Row(
        "documents.formats.plain.HEADING", plain.HEADING.search, ("# ", "#", "\n# ", " ", "\n"), begin="# ", size=20_000
    ),
    Row(
        "documents.formats.plain.DECLARED",
        lambda text: plain.declared_encoding(text.encode()),
        ("<meta ", "<meta charset", "<?xml encoding = ", " "),
        begin="<meta ",
        size=1_024,
    ),
    Row("the encoding of a text", lambda text: plain.decode(text.encode("utf-16-le")[1:]), ("ab", "é"), size=2_000),
    Row(
        "documents.formats.html.BEFORE",
        html.BEFORE.match,
        (" ", "<!--", "<!-- -->", "<?xml?>", "<?xml ", "-->"),
        size=15_000,
    ),
    Row(
        "documents.formats.html.PAGE documents.formats.html.FRAGMENT",
        html.is_html,
        ("<a ", "<p", "<h1 a", " ", "<!--a-->"),
        size=15_000,
    ),
    Row(
        "documents.formats.html.Page.data documents.formats.html.Page.flush",
        quietly(lambda content: html.read(content, FileLimits())),
        (
            "a  b",
            " ",
            "<i>",
            "<b></b>",
            "<br>",
            "<td>",
            "<tr><td>",
            "<p>a",
            "<a b=c ",
            "&amp;",
            "</i>",
            "<title>",
            "<pre>a",
            "<ul><li>",
        ),
        begin="<!doctype html>",
        size=8_000,
    ),
    Row(
        "documents.formats.detect.PDF",
        lambda text: detect.PDF.search(text.encode()),
        ("\n", " ", "\n ", "%PDF-", "\r\n"),
        size=10_000,
    ),
    Row(
        "documents.formats.package.PART",
        package.PART.search,
        ("wordprocessingml.", "ms-word.", "a", "wordprocessingml.a"),
        size=10_000,
    ),
    Row("documents.formats.package.PART", package.PART.search, ("a", "a.", "_"), begin="ms-word.", size=10_000),
    Row(
        "documents.formats.pdf.HYPHEN",
        lambda text: pdf.HYPHEN.sub("", text),
        ("\ufffe", "\x02\r\n", "\x02\r", "a"),
        size=20_000,
    ),
    Row("texts", TypeAdapter(Text).validate_python, (" ", "\n"), end="a", size=100_000),
    Row("messages", parse_all, ("a ", "ab cd "), size=4_000),
    Row("old turns", trim_all, ("a ", "aa a "), size=8_000),
    Row(
        "what a translation counts before the model runs",
        lambda text: translating.messages({"text": text, "target_language": "German"}, {}),
        ("1\n\n", "a", "> ", "`", "[a]: b\n", "word "),
        begin="# T\n\n",
        size=2_000,
    ),
    Row(
        "what a summary counts before the model runs",
        lambda text: summarizing.messages({"text": text}, {}),
        ("a", " ", "word ", "\n"),
        end="a",
        size=20_000,
    ),
    Row(
        "service.entry.access.AUTHORITY", access.AUTHORITY.fullmatch, ("a", ":", "[", "a:", "0"), begin="[", size=20_000
    ),
    Row("service.entry.access.AUTHORITY", access.AUTHORITY.fullmatch, ("a", "0"), end=":x", size=20_000),
    Row(
        "service.entry.body.FOREIGN_KEYS",
        body.FOREIGN_KEYS.fullmatch,
        ("_", "checkpoint_", "thread_id"),
        begin="__",
        size=20_000,
    ),
    Row("service.records.recorder.REQUEST_ID", recorder.REQUEST_ID.fullmatch, ("a", ".", "é"), size=20_000),
    Row(
        "service.records.recorder.SHARED",
        lambda path: recorder.SHARED.sub("", path),
        ("/c/", "/c", "/", "a"),
        size=20_000,
    ),
    Row(
        "llm.prompt._any_of",
        lambda text: special.sub("", text),
        ("<|", "<|eot_id|", "<", "<|start_header_id", "<|reserved_special_token_"),
        size=20_000,
    ),
)

NOT_OF_USERS = {
    "chains.chain.NAME": "the name of a chain is written by its author",
    "chains.documents.languages._NO_LANGUAGE": "names of languages from a library",
    "chains.documents.languages._PLACED": "at most languages.MAX_CHARS characters",
    "chains.documents.languages._named": "at most languages.MAX_CHARS characters",
    "chains.documents.languages._by_name_and_place": "at most languages.MAX_CHARS characters",
    "chains.documents.languages._near.guesses": "at most languages.MAX_CHARS characters",
    "chains.documents.formats.docx.HEADING": "matches at one place, and nothing in it repeats",
    "service.settings.ORIGIN": "a setting",
    "service.settings.is_service_link": "a variable of the environment",
    "service.entry.access.SCHEME": "possessive, from one place on: a header of 16 kB at most",
    "llm.machine._mounts": "what the kernel says of mounts",
    "service.entry.keys.NAME": "the key file",
    "service.entry.keys.LINE": "the key file",
    "service.entry.keys.GIVEN_KEY": "one class from one place on: a key that is made or configured",
    "service.pages.playground.INLINE_SCRIPT": "a page that comes with LangServe",
    "llm.references._REPOSITORY": "a setting",
    "service.entry.quota.RATE": "a setting",
    "llm.prompt._Encoder.__init__": "the server's own random digits, and five more",
    "llm.scripted_engine._last_message": "a model for tests",
}
"""Patterns that see no text of any length from callers, and why."""


def cpu_s(run: Callable[[str], object], text: str, *, is_enough: Callable[[float], bool]) -> float:
    """The least CPU time of up to four runs."""
    best = float("inf")
    for _ in range(4):
        start = time.thread_time()
        run(text)
        best = min(best, time.thread_time() - start)
        if is_enough(best):
            break
    return best


def text_of(row: Row, unit: str, size: int) -> str:
    return row.begin + unit * (size // len(unit)) + row.end


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.covers)
def test_four_times_as_much_costs_four_times_as_much(row: Row) -> None:
    row.run(text_of(row, next(iter(row.units)), 100))  # loads what it needs
    for unit in row.units:
        small, large = text_of(row, unit, row.size), text_of(row, unit, 4 * row.size)
        allowed_s = MAX_PER_BYTE_S * len(large.encode())
        few_s = cpu_s(row.run, small, is_enough=lambda seconds: seconds <= FLOOR_S)
        most_s = min(MAX_RATIO * few_s + FLOOR_S, allowed_s)
        many_s = cpu_s(row.run, large, is_enough=lambda seconds, most_s=most_s: seconds <= most_s)  # type: ignore[misc]
        assert many_s <= most_s, (
            f"{row.covers}: {unit!r}: {few_s * 1e3:.1f} ms, {many_s * 1e3:.1f} ms for 4 times as much"
        )


class _Calls(ast.NodeVisitor):
    """Collects where a module compiles or uses a pattern: the name that it assigns one to, else the function."""

    def __init__(self, module: str) -> None:
        self._scope = [module]
        self.found: set[str] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._inside(node)

    def _inside(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        before = set(self.found)
        self.generic_visit(node)
        is_constant = isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
        if self.found != before and is_constant:
            assert isinstance(node.targets[0], ast.Name)
            self.found = before | {".".join([*self._scope, node.targets[0].id])}

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called.startswith("re.") and called != "re.escape":
            self.found.add(".".join(self._scope))


def patterns_of(source: str, module: str) -> set[str]:
    """The patterns of a module: `module.NAME`, or `module.function` of one that has no name."""
    calls = _Calls(module)
    calls.visit(ast.parse(source))
    return calls.found


def all_patterns() -> set[str]:
    found: set[str] = set()
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*.py"):
            names = path.relative_to(ROOT).with_suffix("").parts
            found |= patterns_of(path.read_text(), ".".join(names[:-1] if names[-1] == "__init__" else names))
    return found


def test_every_pattern_is_measured_or_sees_no_text_of_users() -> None:
    """A new pattern needs a row above with what makes it slow, or a reason why it needs none."""
    words = {word for row in ROWS for word in row.covers.split()}
    found = all_patterns()
    unmeasured = {name for name in found if not {name, name.removeprefix("chains.")} & words} - NOT_OF_USERS.keys()
    assert unmeasured == set()
    assert NOT_OF_USERS.keys() - found == set(), "these are no more"


def test_a_pattern_without_a_name_is_found_too() -> None:
    source = (
        "import re\nA = re.compile('a')\nclass B:\n    C = re.compile('c')\n    def d(self): return re.sub('', '', 'e')"
    )
    assert patterns_of(source, "m") == {"m.A", "m.B.C", "m.B.d"}


def test_a_quadratic_pattern_fails() -> None:
    """The measure itself: this one tries each shorter run of backticks against the rest of the line."""
    import re

    slow = re.compile(r"`{3,}(?![^\n]*`)")
    row = Row("slow", slow.match, ("`",), end="x`", size=4_000)
    # A machine may slow down while the smaller text is measured.
    assert any(is_refused(row) for _ in range(5))


def is_refused(row: Row) -> bool:
    try:
        test_four_times_as_much_costs_four_times_as_much(row)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("unit", ["`", "1\n\n", "> a\n", "[a]: b\n", "<em>", "{a, plural,"])
async def test_a_whole_translation_costs_as_much_as_its_text_is_long(unit: str) -> None:
    """All of its threads together; the model says what it was shown."""
    took: list[float] = []
    for size in (1_000, 4_000):
        text = "# T\n\n" + unit * (size // len(unit)) + "x`\n"
        start = time.process_time()
        said = await translating.runnable.ainvoke({"text": text, "target_language": "German"})
        took.append(time.process_time() - start)
        assert [*filter(str.isalpha, said.casefold())] == [*filter(str.isalpha, text.casefold())]
    assert took[1] <= MAX_RATIO * took[0] + 0.1
