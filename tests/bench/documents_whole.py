"""Whole documents, translated and summarized to their ends: what they take, and whether all of them is there."""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tests.bench import documents_texts as texts
from tests.bench.documents_client import Told, Watch, follow, stream
from tests.bench.documents_found import Found, Plan, Summarized, Translated
from tests.server import Server

LANGUAGE = "German"

SUMMARY_TOKENS = 256
"""Of the final summary where the cost of a page is asked for: it is the same for any number of pages, and the embedded
model does not find its end."""


def translation(text: str) -> dict[str, object]:
    """The input that asks for one."""
    return {"text": text, "target_language": LANGUAGE}


def long(server: Server, *, plan: Plan, found: Found) -> Iterator[None]:
    """The real text: as a stream of events as often as is planned, as a plain stream, and as a summary."""
    book = texts.cropped(texts.book(), min(plan.pages, len(texts.book().split()) / texts.PAGE_WORDS))
    for _ in range(plan.passes):
        found.translated.append(_translated(server, book))
        yield
    part = texts.cropped(book, min(plan.pages, plan.streamed_pages))
    found.streamed = stream(server, "translate", translation(part))
    found.streamed_pages = _pages(part)
    say(f"plain stream: {found.streamed.wall_s:.0f} s")
    yield
    found.summarized.append(_summarized(server, book))
    yield


def scale(server: Server, *, plan: Plan, found: Found) -> Iterator[None]:
    """Documents of several lengths: no text of one stands among the same neighbours in another."""
    for pages in plan.summarize_pages:
        text = texts.shuffled(pages, seed=1)
        found.summarized_by_pages.append(_summarized(server, text, max_tokens=SUMMARY_TOKENS))
        yield
    for pages in plan.translate_pages:
        found.translated_by_pages.append(_translated(server, texts.shuffled(pages, seed=2)))
        yield


def _translated(server: Server, text: str) -> Translated:
    with Watch(server) as watch:
        told = follow(server, "translate", translation(text))
    segments = [segment for _, segment in told.custom["segment"]]
    usage = [segment["usage"] for segment in segments if segment["usage"]]
    translated = Translated(
        pages=_pages(text),
        wall_s=told.wall_s,
        first_words_s=told.first_words_s or told.wall_s,
        segments=len(segments),
        calls=len(told.answers),
        statuses=dict(Counter(segment["status"] for segment in segments)),
        problems=dict(Counter(problem for segment in segments for problem in set(segment["problems"]))),
        prompt_tokens=sum(each["input_tokens"] for each in usage),
        output_tokens=sum(each["output_tokens"] for each in usage),
        is_whole=is_whole(text, told),
        is_in_order=is_in_order(text, segments),
        event_bytes=told.num_bytes,
        mean_running=watch.mean_running,
        memory_bytes=tuple(watch.at(part / 4) for part in range(5)),
        peak_bytes=watch.peak,
    )
    say(
        f"translated {translated.pages:g} pages in {told.wall_s:.0f} s: {len(segments)} segments, "
        f"{translated.output_tokens} tokens, {'whole' if translated.is_whole else 'NOT WHOLE'}"
    )
    return translated


def is_whole(text: str, told: Told) -> bool:
    """Whether the segments are the text, and the translation, which was streamed the same."""
    segments = [segment for _, segment in told.custom["segment"]]
    target = "".join(segment["target"] for segment in segments)
    return "".join(segment["source"] for segment in segments) == text and target == told.output == told.streamed


def is_in_order(text: str, segments: list[dict[str, Any]]) -> bool:
    """Whether progress only went on, to the end of the text."""
    done = [segment["done"] for segment in segments]
    return (
        [segment["index"] for segment in segments] == list(range(len(segments)))
        and all(before < after for before, after in pairwise(done))
        and done[-1] == segments[-1]["total"] == len(text)
    )


def _summarized(server: Server, text: str, **options: object) -> Summarized:
    with Watch(server) as watch:
        told = follow(server, "summarize", {"text": text}, **options)
    progress = told.custom["progress"]
    stages: list[dict[str, int]] = []
    for _, said in progress:
        if said["done"] == 0:
            stages.append({"stage": said["stage"], "total": said["total"], "done": 0})
        else:
            stages[-1]["done"] += said["done"] == stages[-1]["done"] + 1
    (_, summary), *_ = told.custom["summary"]
    summarized = Summarized(
        pages=_pages(text),
        wall_s=told.wall_s,
        parts_s=next(after_s for after_s, said in progress if said["stage"] == "summarize"),
        first_words_s=told.first_words_s or told.wall_s,
        stages=[(str(each["stage"]), each["total"]) for each in stages],
        num_parts=summary["num_parts"],
        num_words=summary["num_words"],
        finish_reason=summary["finish_reason"],
        problems=dict(Counter(re.sub(r"\d+(/\d+)?", "N", problem) for problem in summary["problems"])),
        prompt_tokens=summary["usage"]["input_tokens"],
        output_tokens=summary["usage"]["output_tokens"],
        is_in_order=all(each["done"] == each["total"] for each in stages),
        mean_running=watch.mean_running,
        peak_bytes=watch.peak,
    )
    say(f"summarized {summarized.pages:g} pages in {told.wall_s:.0f} s, parts until {summarized.parts_s:.0f} s")
    return summarized


def _pages(text: str) -> float:
    return round(len(text.split()) / texts.PAGE_WORDS, 2)


def say(text: str) -> None:
    """Tell whoever waits how far it is."""
    print(f"  {text}", file=sys.stderr, flush=True)
