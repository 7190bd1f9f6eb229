import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import documents_obeyed, documents_report, documents_texts, documents_waits, documents_whole
from tests.bench.documents_client import Broken, Told, follow
from tests.bench.documents_found import QUICK, Found
from tests.server import Server

PLAN = replace(QUICK, pages=2, summarize_pages=(3,), chats=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose model says always the same; it takes a byte for a token."""
    command = (sys.executable, "-m", "tests.bench.documents_scripted")
    log = tmp_path_factory.mktemp("documents") / "server.log"
    with Server(log, command=command, api_keys=documents_waits.API_KEYS) as keyed:
        yield keyed


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same, for everybody."""
    command = (sys.executable, "-m", "tests.bench.documents_scripted")
    with Server(tmp_path_factory.mktemp("documents") / "server.log", command=command) as server:
        yield server


def told(*segments: tuple[str, str]) -> Told:
    """As if these sources had become these targets."""
    done, events = 0, []
    for index, (source, target) in enumerate(segments):
        done += len(source)
        events.append((0.0, {"index": index, "source": source, "target": target, "done": done, "total": 6}))
    return Told(output="UnoDue", streamed="UnoDue", custom={"segment": events})


def test_a_document_has_as_many_words_as_its_pages_say() -> None:
    assert len(documents_texts.cropped(documents_texts.book(), 30).split()) == 15_000
    assert len(documents_texts.shuffled(200, seed=0).split()) == 100_000


def test_no_paragraph_comes_twice_before_all_came_and_no_seed_gives_the_order_of_another() -> None:
    paragraphs = documents_texts.shuffled(20, seed=1).split("\n\n")

    assert len(set(paragraphs[:-1])) == len(paragraphs[:-1])
    assert paragraphs != documents_texts.shuffled(20, seed=2).split("\n\n")


def test_each_small_text_has_what_is_looked_for_in_its_translation() -> None:
    assert all(text.count(mark) == 1 for text, mark in documents_texts.marked_texts(30))
    assert len({mark for _, mark in documents_texts.marked_texts(30)}) == len(documents_texts.MARKS)
    assert all(term in text for text, term in documents_texts.term_texts(30, seed=0))
    assert len(documents_texts.term_texts(30, seed=0)) == 30


def test_a_document_is_whole_if_its_segments_are_the_text_and_its_translation() -> None:
    assert documents_whole.is_whole("onetwo", told(("one", "Uno"), ("two", "Due")))
    assert not documents_whole.is_whole("onetwo", told(("one", "Uno")))
    assert not documents_whole.is_whole("onetwo", told(("one", "Uno"), ("two", "Tre")))


def test_progress_is_in_order_if_it_goes_on_to_the_end() -> None:
    whole = [said for _, said in told(("one", "Uno"), ("two", "Due")).custom["segment"]]

    assert documents_whole.is_in_order("onetwo", whole)
    assert not documents_whole.is_in_order("onetwo", whole[::-1])
    assert not documents_whole.is_in_order("onetwo", whole[:1])


def test_plain_streams_are_shown_what_a_translation_s_segments_are() -> None:
    text = documents_texts.cropped(documents_texts.book(), 1)

    calls = documents_waits.plain_calls(text, lambda part: len(part.split()))

    shown = [call.body["input"]["messages"] for call in calls]  # type: ignore[index]
    assert "".join("".join(words["content"].split()) for _, words in shown) == "".join(text.split())
    assert all("Translate from English into German" in system["content"] for system, _ in shown)


def test_a_long_document_is_measured_whole_and_told_of_in_words_and_in_json(
    open_server: Server, tmp_path: Path
) -> None:
    found = Found()

    for _ in documents_whole.long(open_server, plan=PLAN, found=found):
        documents_report.write(tmp_path, {}, {}, found)
    for _ in documents_whole.scale(open_server, plan=PLAN, found=found):
        documents_report.write(tmp_path, {}, {}, found)

    (translated,), (summarized,) = found.translated, found.summarized_by_pages
    assert translated.is_whole
    assert translated.is_in_order
    assert translated.pages == 2
    assert sum(translated.statuses.values()) == translated.segments <= translated.calls
    assert dict(summarized.stages)["map"] == summarized.num_parts > 1
    assert summarized.is_in_order
    assert summarized.output_tokens >= summarized.num_parts
    kept = json.loads((tmp_path / "documents.json").read_text())
    assert kept["translated"][0]["segments"] == translated.segments
    assert "yes, yes" in (tmp_path / "documents.md").read_text()


def test_the_first_words_of_short_and_long_documents_are_compared(server: Server) -> None:
    found = Found()

    list(documents_waits.first_words(server, plan=PLAN, found=found, engine="scripted"))

    (words,) = found.first
    assert len(words.short) == len(words.long) == PLAN.repeats
    assert f"{words.ratio:.2f} x" in documents_report.text(found)


def test_chats_are_measured_beside_nothing_plain_streams_and_a_translation(open_server: Server) -> None:
    found = Found()

    list(documents_waits.chats(open_server, plan=PLAN, found=found, count=len))

    assert [len(each.first_s) for each in found.chats] == [1, 1, 1]
    assert len(documents_report.text(found).splitlines()) == 7


def test_what_a_model_did_not_do_is_told(open_server: Server) -> None:
    found = Found()

    list(documents_obeyed.obeyed(open_server, plan=PLAN, found=found))

    *lengths, terms, marks = found.obeyed
    assert [each.at_once for each in lengths] == [2, 2, 2]
    assert (terms.at_once, terms.told) == (0, 2)
    assert (marks.at_once, marks.after_mending) == (0, 2)


def test_a_refusal_is_no_measurement(open_server: Server) -> None:
    with pytest.raises(Broken, match="422"):
        follow(open_server, "translate", {"text": "", "target_language": "German"})
