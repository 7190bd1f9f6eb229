"""Summaries of texts of any length: every part is read once, progress is told, and what was not kept."""

import base64
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chains import summarize
from chains.documents.measure import Measure
from chains.errors import UnreadableFile
from chains.summarize import SummarizeInput
from chains.summarizer import AT_ONCE, CHUNK_TOKENS, NOTE_TOKENS, NOTES, PART, WHOLE
from tests.chains.marking import MarkingModel

BOOK = (Path(__file__).parent.parent / "texts" / "pride-and-prejudice.txt").read_text()


def pages(num: int) -> str:
    """So many pages of 500 words, none twice."""
    words = BOOK.split()
    return "\n\n".join(f"Page {index}.\n\n{' '.join(words[(index * 37) % 15_000 :][:500])}" for index in range(num))


class Marks:
    """Answers with the number of the call, and some words."""

    def __init__(self, words: int = 30) -> None:
        self.num = 0
        self.filling = " word" * words

    def __call__(self, text: str) -> str:
        self.num += 1
        return f"[{self.num - 1}]{self.filling}"


def stage(shown: str) -> tuple[str, str]:
    """What was asked for, and the text."""
    order, _, text = shown.partition(":\n\n")
    return order, text


def marks(text: str) -> list[int]:
    return [int(mark) for mark in re.findall(r"\[(\d+)\]", text)]


async def told_of(model: MarkingModel, asked: dict[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    """The summary, and the events."""
    events, text = [], ""
    async for event in summarize.build(model).runnable.astream_events(asked, version="v2"):
        if event["event"] == "on_custom_event":
            events.append((event["name"], event["data"]))
        if event["event"] == "on_chain_stream" and not event["parent_ids"]:
            text += event["data"]["chunk"]
    return text, events


async def test_of_a_thousand_pages_every_part_is_used_once_at_every_level() -> None:
    model = MarkingModel(answer=Marks(), context=8192)
    text = pages(1000)

    summary = await summarize.build(model).runnable.ainvoke({"text": text})

    asked = [stage(shown) for shown in model.shown]
    parts = [text for order, text in asked if order == PART]
    assert len(parts) > 300
    assert "".join(sorted(parts, key=text.index)) == text
    assert all(Measure(model).count(part) <= CHUNK_TOKENS for part in parts)
    used = Counter(mark for order, text in asked if order == NOTES for mark in marks(text))
    (last,) = marks(summary)
    assert set(used) == set(range(len(asked))) - {last}, "every summary but the last is part of another one"
    assert set(used.values()) == {1}
    assert sum(order == NOTES for order, _ in asked) > 10, "more than one level"
    assert 1 < model.most_at_once <= AT_ONCE


async def test_summaries_of_parts_stay_in_order() -> None:
    model = MarkingModel(answer=lambda shown: re.findall(r"Page \d+", shown)[0] if "Page" in shown else "end")
    text = pages(40)
    await summarize.build(model).runnable.ainvoke({"text": text})
    order, notes = stage(model.shown[-1])
    assert order == NOTES
    numbers = [int(number) for number in re.findall(r"Page (\d+)", notes)]
    assert numbers == sorted(numbers)
    assert len(numbers) > 10


async def test_what_fits_is_summarized_at_once() -> None:
    model = MarkingModel(answer=Marks())
    assert await summarize.build(model).runnable.ainvoke({"text": "It rained all day."}) == f"[0]{' word' * 30}"
    assert [stage(shown) for shown in model.shown] == [(WHOLE, "It rained all day.")]


@pytest.mark.parametrize("num_pages", [1, 12, 60])
async def test_the_summary_streams_and_is_the_same_whole(num_pages: int) -> None:
    model = MarkingModel(answer=lambda shown: "A few words of a summary.")
    chain = summarize.build(model).runnable
    chunks = [piece async for piece in chain.astream({"text": pages(num_pages)})]
    assert len([piece for piece in chunks if piece]) > 3
    assert "".join(chunks) == await chain.ainvoke({"text": pages(num_pages)}) == "A few words of a summary."
    assert chain.invoke({"text": pages(num_pages)}) == "A few words of a summary."


async def test_progress_is_told_stage_by_stage() -> None:
    model = MarkingModel(answer=Marks(100), context=2048)
    _, events = await told_of(model, {"text": pages(30)})
    progress = [data for name, data in events if name == "progress"]
    stages = list(dict.fromkeys((step["stage"], step["total"]) for step in progress))
    assert [name for name, _ in stages][:2] == ["map", "collapse"]
    assert stages[-1] == ("summarize", 1)
    for name, total in stages:
        done = [step["done"] for step in progress if (step["stage"], step["total"]) == (name, total)]
        assert done == list(range(total + 1))
    ((_, told),) = [event for event in events if event[0] == "summary"]
    assert told["num_parts"] == stages[0][1]
    assert told["finish_reason"] == "stop"
    assert told["usage"]["input_tokens"] > 0
    assert told["problems"] == []


async def test_runs_are_named_for_what_they_do() -> None:
    chain = summarize.build(MarkingModel(answer=Marks())).runnable
    events = chain.astream_events({"text": pages(20)}, version="v2")
    names = [event["name"] async for event in events if event["event"] == "on_chat_model_start"]
    assert names[0] == f"map 1 of {len(names) - 1}"
    assert set(names) == {f"map {index} of {len(names) - 1}" for index in range(1, len(names))} | {"summarize"}


@pytest.mark.parametrize(
    ("answer", "wishes", "problem"),
    [
        (lambda shown: " word" * 30, {"max_words": 10}, "30 words where at most 10 were asked for"),
        (lambda shown: "", {}, "the summary is empty"),
        (lambda shown: "word " * 9000, {}, "the summary was cut off at its greatest length"),
    ],
)
async def test_what_a_summary_did_not_keep_is_told(
    answer: Callable[[str], str], wishes: dict[str, Any], problem: str
) -> None:
    model = MarkingModel(answer=answer)
    options: Any = {"configurable": {"max_tokens": 200}}
    events = summarize.build(model).runnable.astream_events({"text": "It rained.", **wishes}, options, version="v2")
    told: Any
    (told,) = [event["data"] async for event in events if event["name"] == "summary"]
    assert problem in told["problems"]


async def test_no_part_is_missing_where_the_model_says_nothing_of_it() -> None:
    def answer(shown: str) -> str:
        return "" if "Page 3." in shown and PART in shown else "noted"

    model = MarkingModel(answer=answer)
    text = pages(20)
    _, events = await told_of(model, {"text": text})
    assert sum("Page 3." in shown and PART in shown for shown in model.shown) == 1
    _, notes = stage(model.shown[-1])
    assert notes.count("noted") == events[-1][1]["num_parts"] - 1
    silent = next(stage(shown)[1] for shown in model.shown if "Page 3." in shown)
    assert silent.strip()[:200] in notes, "its beginning stands for it"
    assert any("has no summary" in problem for problem in events[-1][1]["problems"])


async def test_summaries_of_parts_that_were_cut_off_are_counted() -> None:
    model = MarkingModel(answer=lambda shown: "word " * 5000 if PART in shown else "A summary.")
    _, events = await told_of(model, {"text": pages(20)})
    (told,) = [data for name, data in events if name == "summary"]
    assert told["problems"] == [f"cut off at their greatest length: {told['num_parts']} summaries of parts"]


async def test_white_space_is_no_part() -> None:
    model = MarkingModel(answer=lambda shown: "" if PART in shown else "A summary.")
    text = f"{pages(5)}{' ' * 40_000}{pages(5)}"
    assert await summarize.build(model).runnable.ainvoke({"text": text}) == "A summary."
    assert all(stage(shown)[1].strip() for shown in model.shown)


@pytest.mark.parametrize("context", [1024, 4096])
@pytest.mark.parametrize("words", [5, 3_000])
async def test_it_ends_whatever_the_model_says(words: int, context: int) -> None:
    """Even if it does not end where it is told to."""
    model = MarkingModel(answer=Marks(words), obeys=False, context=context)
    await summarize.build(model).runnable.ainvoke({"text": pages(20)})
    for call in model.calls:
        assert Measure(model).count_messages(call) < context


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=300) | st.just("Words, and more of them. " * 40), min_size=1, max_size=40),
    st.sampled_from([1024, 2048]),
)
async def test_any_text_is_read_whole_and_within_the_context(paragraphs: list[str], context: int) -> None:
    text = "\n\n".join(paragraphs)
    if not text.strip():
        return
    model = MarkingModel(answer=lambda shown: "noted", context=context)
    await summarize.build(model).runnable.ainvoke({"text": text})
    asked = [stage(shown) for shown in model.shown]
    read = [shown for order, shown in asked if order in (PART, WHOLE)]
    assert "".join(part for shown in read for part in shown.split()) == "".join(text.split())
    assert all(Measure(model).count_messages(call) < context for call in model.calls)


# What is given


def test_documents_are_put_together_with_their_titles() -> None:
    asked = SummarizeInput.model_validate({"documents": [{"title": "One", "text": "First."}, {"text": "Second."}]})
    assert asked.whole == "# One\n\nFirst.\n\nSecond."


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "got none"),
        ({"text": "x", "file": "eA=="}, "got text and file"),
        ({"text": "x", "documents": [{"text": "y"}]}, "got text and documents"),
    ],
)
def test_there_is_exactly_one_source(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=f"exactly one of text, file, documents; {said}"):
        SummarizeInput.model_validate(given)


@pytest.mark.parametrize("prefix", ["", "data:text/plain;base64,"])
async def test_a_file_is_read_without_a_server_too(prefix: str) -> None:
    model = MarkingModel(answer=Marks())
    encoded = prefix + base64.b64encode(b"# Rain\n\nIt rained all day.").decode()
    await summarize.build(model).runnable.ainvoke({"file": encoded})
    assert "It rained all day." in model.shown[0]


async def test_base64_may_be_wrapped() -> None:
    model = MarkingModel(answer=Marks())
    wrapped = base64.encodebytes(b"# Rain\n\nIt rained all day. " * 10).decode()
    assert wrapped.count("\n") > 1
    await summarize.build(model).runnable.ainvoke({"file": wrapped})
    assert "It rained all day." in model.shown[0]


@pytest.mark.parametrize("file", ["¡no!", "It rained", "data:text/plain,It rained", "data:text/plain,SGk="])
async def test_what_is_not_in_base64_is_no_file(file: str) -> None:
    with pytest.raises(UnreadableFile, match="not in base64"):
        await summarize.build(MarkingModel(answer=Marks())).runnable.ainvoke({"file": file})


async def test_options_are_for_the_final_summary() -> None:
    model = MarkingModel(answer=Marks(400))
    options: Any = {"configurable": {"max_tokens": 3}}
    summary = await summarize.build(model).runnable.ainvoke({"text": pages(20)}, options)
    assert len(summary) <= 12
    _, notes = stage(model.shown[-1])
    assert Measure(model).count(notes) > NOTE_TOKENS
