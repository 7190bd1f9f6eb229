"""Translations of texts of any length: nothing is lost, nothing changes that must stay, and what went wrong is told."""

import asyncio
import codecs
import json
import re
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError
from tokenizers import Tokenizer

from chains import translate
from chains.documents.in_order import WAITING
from chains.documents.inline import has_words
from chains.documents.languages import find_language
from chains.documents.markup import parts
from chains.documents.measure import Measure
from chains.errors import InputError
from chains.segments import CONTEXT_TOKENS, segments
from chains.translate import AT_ONCE
from chains.translation_prompt import SEGMENT_TOKENS, Wish
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from llm.loading import prepare
from tests.chains.marking import Answer, MarkingModel

TEXTS = Path(__file__).parent.parent / "texts"
FREEDOM: dict[str, str] = json.loads((TEXTS / "human-rights.json").read_text())
BOOK = (TEXTS / "pride-and-prejudice.txt").read_text()
MANUAL = (TEXTS / "manual.md").read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """That of the embedded model, which knows few words but English ones."""
    return Tokenizer.from_file(str(prepare("embedded").directory / "tokenizer.json"))


def german(text: str) -> str:
    """A translation that is as long as its source, and surely German."""
    filling = "Das ist ein ganz gewöhnlicher deutscher Satz, der hier nur zur Übung steht. "
    return (filling * (len(text) // len(filling) + 1))[: max(len(text), 3)].strip()


def counted(text: str) -> int:
    return -(-len(text) // 4)


def cipher(text: str) -> str:
    """A translation that can be read back."""
    return codecs.encode(text, "rot13")


async def document(model: MarkingModel, text: str, **asked: Any) -> dict[str, Any]:
    asked = {"text": text, "target_language": "German", "source_language": "English", **asked}
    result: dict[str, Any] = await translate.build_document(model).runnable.ainvoke(asked)
    assert "".join(segment["source"] for segment in result["segments"]) == text
    assert "".join(segment["target"] for segment in result["segments"]) == result["text"]
    return result


def statuses(result: dict[str, Any]) -> list[str]:
    return [segment["status"] for segment in result["segments"]]


# Cutting


TEXT = st.lists(
    st.sampled_from(
        ["word ", "Ein Satz. ", "\n\n", "\n", "# ", "- ", "> ", "`x`", "| a | b |\n|---|---|\n", "```\n", "語"]
    )
    | st.text(max_size=8)
).map("".join)


@settings(max_examples=600, deadline=None)
@given(TEXT, st.sampled_from([16, 40, 300]))
def test_segments_are_the_text_and_fit(text: str, budget: int) -> None:
    cut = list(segments(text, budget=budget, count=counted))
    assert "".join(segment.source for segment in cut) == text
    assert [segment.end for segment in cut][-1:] == [len(text)] * bool(text)
    assert [segment.index for segment in cut] == list(range(len(cut)))
    for segment in cut:
        assert segment.source or segment.words
        assert counted(segment.words) <= budget
        assert segment.words == segment.words.strip()
        assert max(counted(segment.before), counted(segment.after)) <= CONTEXT_TOKENS
    assert all(segment.words for segment in cut[:-1])


WRAPPED = st.lists(
    st.text(st.sampled_from("abz. 1239é\u4e2d\n"), min_size=1, max_size=300).map(
        lambda lines: "\n".join(f"> {line}" for line in lines.split("\n"))
    ),
    min_size=1,
).map("\n\n".join)
"""Quotes over several lines."""


@given(TEXT | WRAPPED, st.sampled_from([16, 40, 300]))
def test_all_of_a_text_comes_out_once(text: str, budget: int) -> None:
    """What goes out around the words, and the words, are all that there is to read, with the space between them."""
    shown = "".join(part.words if has_words(part.words) and not part.is_fixed else part.text for part in parts(text))
    assert "".join(each.lead + each.words for each in segments(text, budget=budget, count=counted)) == shown


@pytest.mark.parametrize("numbers", ["first", "last", "alone"])
async def test_a_quote_that_has_to_be_cut_loses_nothing_and_doubles_nothing(numbers: str) -> None:
    many = "\n".join(f"> {number} {number + 1} {number + 2}" for number in range(1000, 2000, 3))
    says = "\n".join(f"> This is sentence {name} of a quote, which goes on." for name in ("one", "two", "three") * 9)
    text = {"first": f"{many}\n{says}", "last": f"{says}\n{many}", "alone": says}[numbers]
    result = await document(MarkingModel(answer=cipher), text)
    unquoted = " ".join(text.replace("> ", "").split())
    assert " ".join(result["text"].replace("> ", "").split()) == cipher(unquoted)
    assert "".join(segment["source"] for segment in result["segments"]) == text


def test_what_stands_around_a_segment_is_its_context() -> None:
    first, second, third = segments("One two.\n\nThree four.\n\nFive six.", budget=16, count=counted)
    assert (first.before, first.after) == ("", "Three four.")
    assert (second.before, second.after) == ("One two.", "Five six.")
    assert (third.before, third.after) == ("Three four.", "")


# Order, bounds, streaming


def pages(num: int) -> str:
    """So many pages of 500 words, no paragraph twice."""
    words = BOOK.replace("_", "").split()
    starts = ((index * 165) % 15_000 for index in range(num * 3))
    return "\n\n".join(f"Paragraph {index}: {' '.join(words[at : at + 165])}" for index, at in enumerate(starts))


FAR = AT_ONCE * (1 + WAITING)
"""Segments that may have been asked for while the first goes out."""


async def test_two_hundred_pages_come_out_in_order_and_each_segment_is_asked_for_once() -> None:
    text = pages(200)
    marks = iter(range(1_000_000))
    model = MarkingModel(answer=lambda words: f"[{next(marks)}] {german(words)}")

    result = await document(model, text)

    assert Counter(statuses(result)) == {"translated": len(result["segments"])}
    assert len(model.shown) == len(result["segments"]) >= 600
    assert sorted(segment["source"].strip() for segment in result["segments"]) == sorted(model.shown)
    shown = [segment["source"].strip() for segment in result["segments"]]
    assert [int(mark) for mark in re.findall(r"\[(\d+)\]", result["text"])] == [
        model.shown.index(each) for each in shown
    ]
    assert 1 < model.most_at_once <= AT_ONCE


async def test_the_first_words_come_before_the_rest_is_looked_at() -> None:
    model = MarkingModel(answer=german, delay_s=0.05)
    asked = {"text": pages(200), "target_language": "German", "source_language": "English"}
    async with aclosing(translate.build(model).runnable.astream(asked)) as pieces:  # type: ignore[type-var]
        first = await anext(pieces)
        assert first.strip() == "Das"
        assert 1 < model.num_running <= AT_ONCE
        assert len(model.calls) <= FAR
    for _ in range(100):
        await asyncio.sleep(0.001)
    assert model.num_running == 0, "who leaves ends all that runs"


async def test_no_more_is_translated_ahead_than_may() -> None:
    model = MarkingModel(answer=german)
    asked = {"text": pages(40), "target_language": "German", "source_language": "English"}
    async with aclosing(translate.build(model).runnable.astream(asked)) as pieces:  # type: ignore[type-var]
        await anext(pieces)
        async with asyncio.timeout(10):
            while len(model.calls) < FAR:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        assert len(model.calls) == FAR


@pytest.mark.parametrize("text", ["A single sentence of some length, as people write them.", BOOK[:8000], MANUAL])
async def test_streamed_and_whole_are_the_same(text: str) -> None:
    model = MarkingModel(answer=german)
    chain = translate.build(model).runnable
    asked = {"text": text, "target_language": "German", "source_language": "English"}
    whole = await chain.ainvoke(asked)
    assert "".join([piece async for piece in chain.astream(asked)]) == whole
    assert chain.invoke(asked) == whole
    assert "".join(chain.stream(asked)) == whole
    assert await chain.abatch([asked, asked]) == [whole, whole]


async def test_plain_words_flow_and_those_with_code_in_them_come_at_once() -> None:
    model = MarkingModel(answer=german)
    chain = translate.build(model).runnable

    async def chunks(text: str) -> list[str]:
        asked = {"text": text, "target_language": "German", "source_language": "English"}
        return [piece async for piece in chain.astream(asked)]

    assert len(await chunks("A plain sentence with a number of words in it.")) > 5
    model.answer = lambda text: "Starte `make serve` und öffne die Seite."
    assert await chunks("Run `make serve` and open the page.") == ["Starte `make serve` und öffne die Seite."]


async def test_each_segment_is_told_as_an_event_in_order() -> None:
    chain = translate.build(MarkingModel(answer=german)).runnable
    asked = {"text": BOOK[:6000], "target_language": "German", "source_language": "English"}
    told: list[Any] = []
    text = ""
    async for event in chain.astream_events(asked, version="v2"):
        if event["event"] == "on_custom_event" and event["name"] == "segment":
            told.append(event["data"])
        if event["event"] == "on_chain_stream" and not event["parent_ids"]:
            text += event["data"]["chunk"]
            assert text.startswith("".join(segment["target"] for segment in told))
    assert "".join(segment["source"] for segment in told) == asked["text"]
    assert "".join(segment["target"] for segment in told) == text
    assert [segment["done"] for segment in told] == sorted({segment["done"] for segment in told})
    assert told[-1]["done"] == told[-1]["total"] == len(asked["text"])


# What must stay


def kinds(text: str) -> list[str]:
    """The structure of a Markdown text: its tokens, and what in them must stay."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        tags = "".join(re.findall("<[^>]*>", token.content)) if token.type == "html_block" else ""
        found.append(token.type + tags + (token.content if token.type in ("fence", "code_block") else ""))
        inline = [child for child in token.children or [] if child.type not in ("text", "softbreak", "text_special")]
        found += sorted(
            f"{child.type} {child.content if child.type in ('code_inline', 'html_inline') else ''} {child.attrs or ''}"
            for child in inline
            if child.type != "image"
        )
    return found


KEPT = [
    re.compile(r"`[^`\n]+`"),
    re.compile(r"\{\{? ?\w+ ?\}?\}|\$\{\w+\}|%\(\w+\)[sd]|%[sd]\b"),
    re.compile(r"https?://[\w./?=&-]*\w"),
    re.compile(r"</?\w+[^>]*>"),
]


@pytest.mark.parametrize(
    "answer",
    [german, lambda text: text.swapcase(), lambda text: "# Neu\n\n- eins\n- zwei `neu` {neu} https://neu.example"],
    ids=["loses all", "changes all", "adds things"],
)
async def test_a_manual_keeps_its_code_its_placeholders_and_its_structure(answer: Answer) -> None:
    result = await document(MarkingModel(answer=answer), MANUAL)
    assert kinds(result["text"]) == kinds(MANUAL)
    for kept in KEPT:
        assert Counter(kept.findall(result["text"])) == Counter(kept.findall(MANUAL))


@pytest.mark.parametrize("answer", ["# Titel", "- eins", "1. eins", "`Ein` Wort", "{neu} ist es", "<b>Ein</b> Wort"])
async def test_an_answer_that_begins_with_marks_of_its_own_is_mended_in_a_stream_too(answer: str) -> None:
    model = MarkingModel(answer=lambda text: answer if text.endswith(".") else "Wort")
    chain = translate.build(model).runnable
    asked = {"text": "This is a word.", "target_language": "German", "source_language": "English"}
    streamed = "".join([piece async for piece in chain.astream(asked)])
    assert streamed == await chain.ainvoke(asked)
    assert answer not in streamed


@pytest.mark.parametrize("answer", ["12 neue Wörter.", "Das sind 12.", "-5 Grad."])
async def test_numbers_flow(answer: str) -> None:
    chain = translate.build(MarkingModel(answer=lambda text: answer)).runnable
    asked = {"text": "These are words.", "target_language": "German", "source_language": "English"}
    pieces = [piece async for piece in chain.astream(asked)]
    assert "".join(pieces) == answer
    assert len(pieces) > 1


@pytest.mark.parametrize(("max_tokens", "flows"), [(None, False), (100, False), (8, True)])
async def test_a_copy_is_held_until_it_is_whole_unless_it_cannot_be(max_tokens: int | None, flows: bool) -> None:
    text = "These are words of a sentence that is long enough for a copy."
    chain = translate.build(MarkingModel(answer=lambda text: text)).runnable
    asked = {"text": text, "target_language": "German", "source_language": "English"}
    options: Any = {"configurable": {"max_tokens": max_tokens}}
    pieces = [piece async for piece in chain.astream(asked, options)]
    assert (len(pieces) > 3) is flows
    assert text.startswith("".join(pieces))


async def test_what_comes_after_new_marks_is_told() -> None:
    chain = translate.build_document(MarkingModel(answer=lambda text: "Ein {neues} Wort.")).runnable
    asked = {"text": "This is a word.", "target_language": "German", "source_language": "English"}
    pieces = [piece async for piece in chain.astream(asked)]
    (segment,) = pieces[-1]["segments"]
    assert segment["status"] == "faulty"
    assert "{neues}" in str(segment["problems"])


async def test_what_a_model_loses_is_mended_piece_by_piece() -> None:
    def answer(text: str) -> str:
        return {"Press": "Drücke", "and wait for": "und warte auf"}.get(text, "Drücke und warte.")

    result = await document(MarkingModel(answer=answer), "Press `Q` and wait for {name}.")
    (segment,) = result["segments"]
    assert result["text"] == "Drücke `Q` und warte auf {name}."
    assert (segment["status"], segment["problems"]) == ("mended", [])


async def test_what_a_model_keeps_is_not_asked_for_again() -> None:
    model = MarkingModel(answer=lambda text: "Warte auf {name} und drücke `Q`.")
    result = await document(model, "Press `Q` and wait for {name}.")
    assert statuses(result) == ["translated"]
    assert len(model.calls) == 1


# What goes wrong


LONG = ("The first sentence is here for you. The second sentence is here for me. " * 2).strip()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda text: " \n", "the answer was empty"),
        (lambda text: text, "it came back untranslated"),
        (
            lambda text: "Here are some words which you did not ask for, and they are quite surely English, my friend.",
            "it came back untranslated",
        ),
        (lambda text: "Immer weiter so. " * 1000, "the answer was cut off at its greatest length"),
    ],
    ids=["empty", "equal", "in the language of the source", "endless"],
)
async def test_a_bad_answer_is_asked_for_again_in_smaller_pieces_and_told(answer: Answer, problem: str) -> None:
    model = MarkingModel(answer=answer)
    result = await document(model, LONG)
    (segment,) = result["segments"]
    assert segment["status"] == "faulty"
    assert problem in segment["problems"]
    first, *again = model.shown
    assert first == LONG
    assert len(again) >= 2
    assert " ".join(again) == first
    assert segment["target"].strip(), "never dropped"
    if problem != "the answer was cut off at its greatest length":
        assert result["text"] == LONG, "what cannot be had stays as it was"
    else:
        assert segment["finish_reason"] == "length"


async def test_what_is_right_at_the_second_try_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MarkingModel(answer=lambda text: "" if len(text) > 100 else german(text))
    result = await document(model, LONG)
    assert statuses(result) == ["mended"]
    assert result["segments"][0]["problems"] == []
    assert "deutscher" in result["text"]


async def test_what_has_gone_out_is_told_and_not_said_twice() -> None:
    model = MarkingModel(answer=lambda text: "Immer weiter so. " * 1000)
    chain = translate.build_document(model).runnable
    asked = {"text": "A short sentence.", "target_language": "German", "source_language": "English"}
    pieces = [piece async for piece in chain.astream(asked)]
    (segment,) = pieces[-1]["segments"]
    assert segment["status"] == "faulty"
    assert segment["problems"] == ["the answer was cut off at its greatest length"]
    assert len(model.calls) == 1
    assert "".join(piece.get("text", "") for piece in pieces) == segment["target"]


async def test_a_length_that_was_asked_for_is_told_and_not_tried_again() -> None:
    model = MarkingModel(answer=german)
    chain = translate.build_document(model).runnable
    asked = {"text": "A sentence of some length.", "target_language": "German", "source_language": "English"}
    result = await chain.ainvoke(asked, {"configurable": {"max_tokens": 2}})
    assert result["text"] == "Das ist"
    (segment,) = result["segments"]
    assert (segment["status"], segment["finish_reason"]) == ("faulty", "length")
    assert segment["problems"] == ["the answer was cut off at its greatest length"]
    assert len(model.calls) == 1


@pytest.mark.parametrize(("stop", "left"), [("Satz", "Das ist ein ganz gewöhnlicher deutscher"), ("Das", "")])
async def test_what_a_stop_string_cuts_off_is_told_and_not_tried_again(stop: str, left: str) -> None:
    engine = ScriptedEngine(lambda message: german(message) if "sea" in message else "Regen.")
    chain = translate.build_document(ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))).runnable
    text = "The sea is wide and deep and cold and blue and old.\n\nIt rained."
    asked = {"text": text, "target_language": "German", "source_language": "English"}
    result = await chain.ainvoke(asked, {"configurable": {"stop": [stop]}})
    engine.close()
    assert result["text"] == f"{left}\n\nRegen."
    assert statuses(result) == ["faulty", "translated"]
    assert result["segments"][0]["problems"] == [f"the answer was cut off at “{stop}”"]


@pytest.mark.parametrize("reason", ["end_turn", None])
async def test_a_reason_to_stop_that_nobody_asked_for_cuts_nothing_off(reason: str | None) -> None:
    chain = translate.build_document(MarkingModel(answer=german, stop_reason=reason)).runnable
    asked = {"text": "A sentence of some length.", "target_language": "German", "source_language": "English"}
    for options in ({}, {"stop": ["never"]}):
        assert statuses(await chain.ainvoke(asked, {"configurable": options})) == ["translated"]


@pytest.mark.parametrize("language", FREEDOM)
def test_no_language_needs_more_tokens_than_a_translation_may_have(language: str, tokenizer: Tokenizer) -> None:
    wish = Wish(source=None, target=find_language(language), formality=None, glossary={})
    source, target = (len(tokenizer.encode(FREEDOM[name]).ids) for name in ("en", language))
    assert 1.1 * target < wish.growth * source


async def test_a_name_may_stay_what_it_is() -> None:
    result = await document(MarkingModel(answer=lambda text: text), "Ada Lovelace")
    assert statuses(result) == ["translated"]


async def test_the_usage_is_that_of_all_tries() -> None:
    model = MarkingModel(answer=lambda text: "" if len(text) > 100 else german(text))
    (segment,) = (await document(model, LONG))["segments"]
    assert segment["usage"]["input_tokens"] == sum(counted(message.text) for call in model.calls for message in call)


async def test_terms_are_asked_for_where_they_stand_and_told_where_they_are_missing() -> None:
    model = MarkingModel(answer=lambda text: "Der Motor ist heiß." if "engine" in text else "Die Räder drehen sich.")
    text = "The engine is hot.\n\nThe wheels are turning."
    result = await document(model, text, glossary={"engine": "Motor", "wheels": "Reifen", "brake": "Bremse"})
    engine, wheels = result["segments"]
    assert engine["problems"] == []
    assert wheels["problems"] == ["“wheels” is not “Reifen”"]
    assert "“engine” as “Motor”" in model.calls[0][0].text
    assert "Reifen" not in model.calls[0][0].text


@pytest.mark.parametrize(
    ("term", "text", "is_there"),
    [
        ("engine", "An Engine.", True),
        ("engine", "Engines", False),
        ("steam engine", "the steam\nengine", True),
        ("engine ", "the engine runs", True),
        ("引擎", "这台引擎很热。", True),
        ("เครื่องยนต์", "นี่คือเครื่องยนต์ของฉัน", True),
        ("C++", "in C++ and", True),
        ("a.c", "abc", False),
    ],
)
def test_a_term_is_a_word_of_its_own_where_words_are_written_apart(term: str, text: str, is_there: bool) -> None:
    wish = Wish(source=None, target=find_language("de"), formality=None, glossary={term: "…"})
    assert bool(wish.terms_in(text)) is is_there


@pytest.mark.parametrize("term", ["", " ", "\x1c", "\u3000", "x" * 101])
def test_a_term_has_something_to_look_for(term: str) -> None:
    with pytest.raises(ValidationError):
        translate.TranslateInput(text="Hi!", target_language="German", glossary=[{"term": term, "translation": "x"}])


# Languages and limits


@pytest.mark.parametrize(
    "asked",
    [
        {"target_language": "French", "source_language": "fr"},
        {"target_language": "fr"},
        {"target_language": "French", "source_language": "fr-CA"},
    ],
)
async def test_a_text_that_is_in_the_language_already_comes_back_as_it_is(asked: dict[str, str]) -> None:
    text = " Bonjour à tous, nous sommes très heureux de vous voir ici ce matin.\n"
    model = MarkingModel(answer=german)
    assert await translate.build(model).runnable.ainvoke({"text": text, **asked}) == text
    result = await translate.build_document(model).runnable.ainvoke({"text": text, **asked})
    assert [(segment["source"], segment["target"], segment["status"]) for segment in result["segments"]] == [
        (text, text, "kept")
    ]
    assert model.calls == []


async def test_a_text_without_words_comes_back_without_being_asked_for() -> None:
    model = MarkingModel(answer=german)
    result = await document(model, "1 + 1 = 2\n\n---\n\n```\ncode\n```\n")
    assert result["text"] == "1 + 1 = 2\n\n---\n\n```\ncode\n```\n"
    assert model.calls == []


async def test_a_model_with_little_room_gets_small_segments() -> None:
    model = MarkingModel(answer=german, context=700)
    result = await document(model, pages(1))
    assert max(map(counted, model.shown)) < SEGMENT_TOKENS / 2
    assert len(result["segments"]) > 10


@pytest.mark.parametrize("max_tokens", [1, 500, *range(1650, 2048, 31)])
async def test_long_answers_leave_less_room_for_segments_or_are_refused_at_once(max_tokens: int) -> None:
    model = MarkingModel(answer=german, context=2048)
    chain = translate.build(model)
    text = f"Hello.\n\n{BOOK[:4000]}"
    asked = {"text": text, "target_language": "German", "source_language": "English", "glossary": {"truth": "Wahrheit"}}
    options = {"max_tokens": max_tokens}
    refusal = ""
    try:
        first = Measure(model).count_messages(chain.messages(asked, options))
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert max_tokens > 1650
        assert f"answers of {max_tokens} tokens" in refusal
        return
    if first + max_tokens > 2048:
        return  # the service counts, and says so
    await chain.runnable.ainvoke(asked, {"configurable": options})
    assert all(Measure(model).count_messages(call) + max_tokens <= 2048 for call in model.calls)


async def test_a_context_without_room_says_for_what() -> None:
    model = MarkingModel(answer=german, context=500)
    asked = {"text": "Hello there.", "target_language": "Thai", "source_language": "English"}
    with pytest.raises(InputError, match="context of 500 tokens has no room for a translation into Thai"):
        await translate.build(model).runnable.ainvoke(asked)


async def test_a_glossary_that_fills_the_context_is_refused() -> None:
    model = MarkingModel(answer=german, context=700)
    terms = {f"term number {index} of these": "x" * 60 for index in range(100)}
    with pytest.raises(ValueError, match=r"context of 700 tokens has no room for .* with this glossary"):
        await document(model, "Hello there, my friend.", glossary=terms)
