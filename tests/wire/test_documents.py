"""Translations of long texts over HTTP: in order, from the start, told segment by segment; and those who leave."""

import asyncio
from typing import Any

import pytest

from tests.server import Server
from tests.wire.asking import ENDPOINTS, ask, at, custom, error_of, leave_at, told, until

NUM_PARAGRAPHS = 50
TEXT = "\n\n".join(
    f"Paragraph {index} of a cipher, with `code {index}` in the cipher." for index in range(NUM_PARAGRAPHS)
)
ASKED = {"text": TEXT, "target_language": "German", "source_language": "English"}
AT_ONCE = 16
"""Segments that are translated at once."""


@pytest.fixture(scope="module")
def translation(scripted_server: Server) -> str:
    return str(ask(scripted_server, "translate/invoke", ASKED).json()["output"])


def test_all_of_a_long_text_is_translated_in_order(translation: str) -> None:
    paragraphs = translation.split("\n\n")
    assert len(paragraphs) == NUM_PARAGRAPHS
    for index, paragraph in enumerate(paragraphs):
        assert paragraph == f"Cnentencu {index} bs n pvcure, jvgu `code {index}` va gur pvcure."


def test_a_stream_says_the_same_as_an_answer(scripted_server: Server, translation: str) -> None:
    chunks = list(scripted_server.chain("translate").stream(ASKED))
    assert len(chunks) > NUM_PARAGRAPHS
    assert "".join(chunks) == translation


def test_the_first_words_go_out_before_most_of_the_text_was_asked_for(scripted_server: Server) -> None:
    text = TEXT.replace("`", "")
    events = list(told(ask(scripted_server, "translate/stream_events", {**ASKED, "text": text})))
    kinds = [event["event"] if event["name"] != "/translate" else f"own {event['event']}" for event in events]
    first = kinds.index("own on_chain_stream")
    assert kinds.count("on_chat_model_start") >= NUM_PARAGRAPHS
    assert kinds[:first].count("on_chat_model_start") <= AT_ONCE


async def test_each_segment_is_told_while_a_translation_streams(scripted_server: Server, translation: str) -> None:
    events = [event async for event in scripted_server.chain("translate").astream_events(ASKED, version="v2")]
    segments = custom(events, "segment")
    assert len(segments) == NUM_PARAGRAPHS
    assert "".join(segment["source"] for segment in segments) == TEXT
    assert "".join(segment["target"] for segment in segments) == translation
    assert [segment["index"] for segment in segments] == list(range(NUM_PARAGRAPHS))
    assert segments[-1]["done"] == segments[-1]["total"] == len(TEXT)
    own = [event for event in events if event["name"] == "/translate" and event["event"] == "on_chain_stream"]
    assert "".join(event["data"]["chunk"] for event in own) == translation


def test_a_document_is_told_whole(scripted_server: Server, translation: str) -> None:
    chain = scripted_server.chain("translate/document")
    whole = chain.invoke(ASKED)
    assert set(whole) == {"text", "segments"}
    assert whole["text"] == "".join(segment["target"] for segment in whole["segments"]) == translation
    assert "".join(segment["source"] for segment in whole["segments"]) == TEXT
    assert {segment["status"] for segment in whole["segments"]} <= {"translated", "mended"}

    pieces = list(chain.stream(ASKED))
    assert "".join(piece.get("text", "") for piece in pieces) == translation
    assert len([segment for piece in pieces for segment in piece.get("segments", [])]) == NUM_PARAGRAPHS

    short = {**ASKED, "text": "One cipher."}
    assert [answer["text"] for answer in chain.batch([short, {**short, "text": "Two ciphers."}])] == [
        "Bar pvcure.",
        "Gjb pvcuref.",
    ]


def test_long_texts_in_a_batch_do_not_mix(scripted_server: Server) -> None:
    texts = ["\n\n".join(f"{name} cipher {index}." for index in range(20)) for name in ("Red", "Blue", "Green")]
    answers = scripted_server.chain("translate").batch([{**ASKED, "text": text} for text in texts])
    assert answers == [text.translate(ROT13) for text in texts]


ROT13 = {ord(c): (ord(c) - base + 13) % 26 + base for base in (65, 97) for c in map(chr, range(base, base + 26))}


async def test_segments_are_translated_at_once(scripted_server: Server) -> None:
    answer = asyncio.create_task(scripted_server.chain("translate").ainvoke(ASKED))
    running = []
    while not answer.done():
        health: Any = await asyncio.to_thread(scripted_server.health)
        running.append(health["running"])
        await asyncio.sleep(0.02)
    await answer
    assert 4 < max(running) <= AT_ONCE


@pytest.mark.parametrize("chain", ["translate", "translate/document"])
@pytest.mark.parametrize("endpoint", ["stream", "stream_log", "stream_events"])
def test_what_is_sent_grows_as_the_text_does(scripted_server: Server, chain: str, endpoint: str) -> None:
    """LangChain's log of runs would say all of the output again with each piece of it."""
    short, long = (
        ask(scripted_server, f"{chain}/{endpoint}", {**ASKED, "text": "\n\n".join(["A cipher here."] * num)})
        for num in (20, 160)
    )
    assert len(long.content) < 10 * len(short.content)
    if endpoint == "stream_log":
        operations = [operation for patch in told(long) for operation in patch["ops"]]
        (final,) = [operation["value"] for operation in operations if operation["path"] == "/final_output"]
        assert (final if chain == "translate" else final["text"]) == "\n\n".join(["N pvcure urer."] * 160)


@pytest.mark.parametrize("chain", ["translate", "translate/document"])
@pytest.mark.parametrize("endpoint", ["stream", "stream_log", "stream_events"])
async def test_who_leaves_a_long_translation_frees_everything(
    scripted_server: Server, chain: str, endpoint: str
) -> None:
    long = {**ASKED, "text": "\n\n".join([TEXT] * 10)}
    await leave_at(scripted_server, f"{chain}/{endpoint}", long, "Cnentencu 3")
    await until(scripted_server, running=0, waiting=0, within_s=2)
    await asyncio.sleep(0.3)
    await until(scripted_server, running=0, waiting=0, within_s=0)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("chain", "field", "value", "near"),
    [
        ("translate", "target_language", "Germn", "German (de)"),
        ("translate", "source_language", "Frenhc", "French (fr)"),
        ("translate/document", "target_language", "Spainish", "Spanish (es)"),
        ("summarize", "language", "Itlaian", "Italian (it)"),
        ("brief", "language", "Portugeese", "Portuguese (pt)"),
        ("brief", "target_language", "Dutsch", "Dutch (nl)"),
    ],
)
def test_a_language_that_there_is_not_is_refused_with_those_that_there_are(
    scripted_server: Server, endpoint: str, chain: str, field: str, value: str, near: str
) -> None:
    asked = {"text": "Hi!"} if chain == "summarize" else {"text": "Hi!", "target_language": "German"}
    response = ask(scripted_server, f"{chain}/{endpoint}", {**asked, field: value})
    error = error_of(response, 422, "invalid_request")
    assert error["field"] == at(endpoint, f".{field}")
    assert f"there is no language '{value}'; did you mean" in error["message"]
    assert near in error["message"]


FRENCH = "Bonjour à tous, nous sommes très heureux de vous voir ici ce matin.\n\nIl a plu toute la journée.\n"


@pytest.mark.parametrize("given", [{}, {"source_language": "French"}, {"source_language": "fr-FR"}])
def test_a_text_in_the_language_already_comes_back_as_it_is_and_no_model_is_asked(
    scripted_server: Server, given: dict[str, str]
) -> None:
    asked = {"text": FRENCH, "target_language": "français", **given}
    events = list(told(ask(scripted_server, "translate/stream_events", asked)))
    assert not any(event["event"].startswith("on_chat_model") for event in events)
    (segment,) = custom(events, "segment")
    assert segment["status"] == "kept"
    assert scripted_server.chain("translate").invoke(asked) == FRENCH
    assert "".join(scripted_server.chain("translate").stream(asked)) == FRENCH
