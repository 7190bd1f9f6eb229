"""Summaries of long texts over HTTP, and what tells how far they are; and both chains in one."""

import json
from typing import Any

import pytest

from tests.server import Server
from tests.wire.asking import ask, custom, leave_at, told, until

LONG = "\n\n".join(f"Paragraph {number} tells of the sea, and of the boats on it. " * 8 for number in range(40))
"""More than the context of the scripted model holds."""

SHORT = {"max_tokens": 200}
CIPHER = "\n\n".join(["A cipher, in cipher pvcure, tells of the sea."] * 3)
"""Still a cipher when it is one."""


@pytest.fixture(scope="module")
def events(scripted_server: Server) -> list[Any]:
    return list(told(ask(scripted_server, "summarize/stream_events", {"text": LONG, "max_words": 5}, **SHORT)))


def test_a_stream_of_events_tells_how_far_a_summary_is(events: list[Any]) -> None:
    progress = [(each["stage"], each["done"], each["total"]) for each in custom(events, "progress")]
    parts = progress[0][2]
    assert parts > 3
    assert progress[: parts + 1] == [("map", done, parts) for done in range(parts + 1)]
    assert progress[-2:] == [("summarize", 0, 1), ("summarize", 1, 1)]
    names = [event["name"] for event in events if event["event"] == "on_chat_model_start"]
    assert sorted(names[:parts]) == sorted(f"map {number} of {parts}" for number in range(1, parts + 1))
    assert names[-1] == "summarize"


def test_the_last_words_stream_and_what_was_not_kept_is_told(events: list[Any]) -> None:
    own = [event for event in events if event["name"] == "/summarize"]
    streamed = [event["data"]["chunk"] for event in own if event["event"] == "on_chain_stream"]
    assert len(streamed) > 5
    assert own[-1]["data"]["output"] == "".join(streamed)
    (summary,) = custom(events, "summary")
    assert summary["num_words"] == len("".join(streamed).split())
    assert summary["max_words"] == 5
    assert f"{summary['num_words']} words where at most 5 were asked for" in summary["problems"]
    assert summary["usage"]["output_tokens"] > 200


def test_a_log_stream_has_the_steps_by_name(scripted_server: Server) -> None:
    patches = list(told(ask(scripted_server, "summarize/stream_log", {"text": LONG}, **SHORT)))
    added = {
        operation["value"]["name"]
        for patch in patches
        for operation in patch["ops"]
        if operation["path"].startswith("/logs/") and operation["op"] == "add" and "name" in (operation["value"] or {})
    }
    assert {"map 1 of 10", "map 10 of 10", "summarize"} <= added, json.dumps(sorted(added))


async def test_who_leaves_a_long_summary_frees_everything(scripted_server: Server) -> None:
    slow = {"text": LONG.replace("the sea", "a slow sea")}
    await leave_at(scripted_server, "summarize/stream_events", slow, '"progress"')
    await until(scripted_server, running=0, waiting=0, within_s=2)


def test_a_brief_is_both_chains_one_after_the_other_on_every_endpoint(scripted_server: Server) -> None:
    asked = {"text": CIPHER, "target_language": "German", "language": "English"}
    summary = scripted_server.chain("summarize").invoke({"text": CIPHER, "language": "English"})
    translation = scripted_server.chain("translate").invoke(
        {"text": summary, "target_language": "German", "source_language": "English"}
    )
    brief = scripted_server.chain("brief")
    assert brief.invoke(asked) == translation != summary
    assert brief.batch([asked, asked]) == [translation] * 2
    chunks = list(brief.stream(asked))
    assert len(chunks) > 3
    assert "".join(chunks) == translation


def test_what_both_chains_tell_goes_through_a_brief(scripted_server: Server) -> None:
    asked = {"text": LONG.replace("Paragraph", "Cipher"), "target_language": "German", "max_words": 5}
    events = list(told(ask(scripted_server, "brief/stream_events", asked, **SHORT)))
    stages = [each["stage"] for each in custom(events, "progress")]
    assert stages[0] == "map"
    assert stages[-1] == "summarize"
    assert custom(events, "summary")[0]["problems"]
    segments = custom(events, "segment")
    assert segments
    output = [e["data"]["output"] for e in events if e["event"] == "on_chain_end" and e["name"] == "/brief"]
    assert ["".join(segment["target"] for segment in segments)] == output
