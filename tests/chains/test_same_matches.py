"""Patterns that were made linear find what the plain ones that they stand for find."""

import re
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk, BaseMessage, HumanMessage, SystemMessage

from chains import conversation
from chains.documents import blocks, inline, markup
from chains.documents.formats import detect
from chains.documents.languages import find_language
from chains.translation_prompt import Wish
from chains.translator import Attempt


def made_of(*fragments: str, most: int = 14) -> st.SearchStrategy[str]:
    other = st.text(max_size=3)
    return st.lists(st.one_of(st.sampled_from(fragments), st.sampled_from(fragments), other), max_size=most).map(
        "".join
    )


FENCE = re.compile(
    r"(?P<before>[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?:(?P<ticks>`{3,})(?![^\r\n]*`)|(?P<tildes>~{3,}))"
)


@settings(max_examples=150, deadline=None)
@given(made_of("`", "```", "~~~", "~", " ", "- ", "-  ", "1. ", "\t", "a", "\n", "2)", "* "))
def test_fences(line: str) -> None:
    old, new = FENCE.match(line), blocks._FENCE.match(line)
    assert (old and (old.group(), old.groupdict())) == (new and (new.group(), new.groupdict()))


@settings(max_examples=150, deadline=None)
@given(
    made_of(" ", "`", "~", "\t", "a", "\r", "\n", "```"), st.sampled_from("`~"), st.integers(3, 5), st.integers(3, 6)
)
def test_ends_of_fences(line: str, mark: str, length: int, indent: int) -> None:
    old = re.search(rf"\A {{0,{indent}}}{mark}{{{length},}}[ \t]*[\r\n]*\Z", line)
    assert blocks._closes_fence(line, mark=mark * length, max_indent=indent) == bool(old)


@settings(max_examples=150, deadline=None)
@given(
    made_of(
        "[a]:", "[b c]:", "[", "]:", "\n", "\r", " ", ">", "x", "<y>", '"t"', "[a]: b\n", "\n> [a]: b", "^", "\n[a]:\n"
    )
)
def test_labels_of_definitions(text: str) -> None:
    assert [*markup._defined_labels(text)] == [found[1] for found in markup._DEFINITION.finditer(text)]


@settings(max_examples=120, deadline=None)
@given(made_of("<!--", "-->", "-", ">", "<b>", "a", "\n", "--", "<!"))
def test_comments_without_another_opener_in_them(text: str) -> None:
    plain = [found for found in re.findall(r"(?s)<!--.{0,1000}?-->", text) if found.count("<!--") == 1]
    kept = [piece.text for piece in inline.pieces(text) if piece.kind is inline.Kind.KEPT]
    assert [found for found in plain if found not in kept] == []


@settings(max_examples=80, deadline=None)
@given(made_of("%PDF-1", "\n", " ", "\r", "a", "\t").map(str.encode))
def test_where_a_pdf_begins(content: bytes) -> None:
    assert bool(detect.PDF.search(content)) == bool(re.search(rb"(?m)^\s*%PDF-\d", content))


@settings(max_examples=150, deadline=None)
@given(
    made_of("a", "1", "- ", "`", "\n", "ß", "S", " ").map(str.strip),
    st.lists(made_of(" ", "\n", "a", "1", "`", "ss", "- ", most=4)),
)
def test_an_answer_chunk_by_chunk(words: str, chunks: list[str]) -> None:
    """After each chunk all is as if the whole answer was looked at anew."""
    made, raw = Attempt(words), ""
    for chunk in chunks:
        made.add(AIMessageChunk(content=chunk))
        raw += chunk
        text = raw.strip()
        text = re.sub(r"\n\s*\n\s*", "\n", text) if "\n" in words else re.sub(r"\s*\n\s*", " ", text)
        said, source = text.casefold(), words.casefold()
        assert made.text == text
        assert made.is_copy == (source.startswith(said) or said.startswith(source))
        item = re.compile(r"(?:[-+]|\d{1,9}[.)])(?:\s|$)|\d{1,9}$")
        is_item = bool(item.match(text) and not item.match(words))
        assert made.has_new_marks == (bool(set("`*#|<>[]{}$%\\~=") & set(text) - set(words)) or is_item)


@settings(max_examples=100, deadline=None)
@given(made_of("A", "b", " ", "\n", "中", "-", "1", most=4).filter(str.strip), made_of("a", "b", " ", "中", "-", "1"))
def test_terms_of_a_glossary(term: str, words: str) -> None:
    def is_cased(letter: str) -> bool:
        return letter.isdigit() or letter.lower() != letter.upper()

    spelled = r"\s+".join(map(re.escape, term.split()))
    before = r"(?<!\w)" if is_cased(term.strip()[0]) else ""
    after = r"(?!\w)" if is_cased(term.strip()[-1]) else ""
    wish = Wish(source=None, target=find_language("de"), formality=None, glossary={term: "x"})
    if term.isascii() and words.isascii():
        assert bool(wish.terms_in(words)) == bool(re.search(before + spelled + after, words, re.IGNORECASE))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=40), st.integers(10, 300))
def test_turns_counted_in_groups_are_left_out_as_if_counted_one_by_one(
    turns: list[tuple[bool, int]], room: int
) -> None:
    messages: list[BaseMessage] = [
        SystemMessage("s" * size) if is_system else HumanMessage("h" * size) for is_system, size in turns
    ]

    def count(prompt: list[BaseMessage]) -> int:
        return 3 + sum(2 + len(message.text) for message in prompt)

    assert conversation.trim(messages, room, count) == _one_by_one(messages, room, count)


def _one_by_one(messages: list[BaseMessage], room: int, count: Callable[[list[BaseMessage]], int]) -> list[BaseMessage]:
    """The rule, as it reads."""
    starts = [0, *(i for i, message in enumerate(messages) if i and isinstance(message, HumanMessage))]
    num_tokens = count(messages)
    if num_tokens <= room or len(starts) == 1:
        return messages
    left = len(starts) - 1
    least = count(conversation._kept(messages, starts[-1]))
    free, excess, left_out = room - least, num_tokens - room, num_tokens - least
    step = max(room // 4, 1)
    while step > max(free // 3, 1):
        step //= 2
    enough = -(-excess // step) * step
    while left:
        turn = messages[starts[left - 1] : starts[left]]
        size = sum(2 + len(message.text) for message in turn if not isinstance(message, SystemMessage))
        if left_out - size < (enough if left_out <= enough + step else excess):
            break
        left_out -= size
        left -= 1
    return conversation._kept(messages, starts[left])
