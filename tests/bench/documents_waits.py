"""Who has to wait: whoever has a long document translated, for its first words; and whoever chats meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count as numbers
from multiprocessing import get_context
from statistics import mean

from chains.documents.languages import find_language
from chains.segments import Segment, segments
from chains.translate import AT_ONCE
from chains.translation_prompt import SEGMENT_TOKENS, Wish
from tests.bench import documents_texts as texts
from tests.bench.documents_client import Begun, begin, busy, freed, stream
from tests.bench.documents_found import Chats, FirstWords, Found, Plan
from tests.bench.documents_whole import LANGUAGE, say, translation
from tests.bench.load import Call, drive_http
from tests.bench.prose import question
from tests.server import Server

Count = Callable[[str], int]

LIMIT_S = 600
SETTLE_S = 3
"""In which those who came all at once are read."""

BUSY_S = 60
"""How long it may take until all slots are in use that are to be."""

_KEYS = {"short": "a-key-for-the-short-ones", "long": "a-key-for-the-long-ones"}

API_KEYS = ",".join(f"{name}:{key}" for name, key in _KEYS.items())
"""As SERVE_API_KEYS: what one of them has had computed is not kept for the other, so they may ask for the same text."""


def first_words(server: Server, *, plan: Plan, found: Found, engine: str) -> Iterator[None]:
    """The first words of the first pages of a document, and of the whole, in turn; each time another document."""
    begun: dict[str, list[Begun]] = {name: [] for name in _KEYS}
    short, long = plan.first_pages
    for repeat in range(-1, plan.repeats):
        text = texts.shuffled(long, seed=1000 + repeat)
        asks = [("short", texts.cropped(text, short)), ("long", text)]
        for name, asked in asks if repeat % 2 else reversed(asks):
            each = begin(server, "translate", translation(asked), key=_KEYS[name])
            if repeat >= 0:  # the first is the warm-up
                begun[name].append(each)
    words = FirstWords(engine, tuple(begun["short"]), tuple(begun["long"]))
    found.first.append(words)
    say(f"first words, {engine}: {words.ratio:.2f} times as long for {long:g} pages as for {short:g}")
    yield


def chats(server: Server, *, plan: Plan, found: Found, count: Count) -> Iterator[None]:
    """Chats beside nothing, beside plain streams that do what a translation's segments do, and beside a translation."""
    long = plan.first_pages[1]
    serials = numbers()
    for number in range(plan.rounds):
        text = texts.shuffled(long, seed=2000 + number)
        alike = plain_calls(texts.shuffled(long, seed=3000 + number), count)
        for beside, calls, clients in (
            ("nothing", [], 0),
            (f"{AT_ONCE} plain streams", alike, AT_ONCE),
            (f"a translation of {long:g} pages", [Call("/translate/stream", {"input": translation(text)})], 1),
        ):
            with _load(server, calls, clients):
                asked = [_chat(server, next(serials)) for _ in range(plan.chats)]
            freed_s = freed(server)
            found.chats.append(
                Chats(
                    beside,
                    tuple(first_s for first_s, _, _ in asked),
                    mean(running for _, running, _ in asked),
                    max(waiting for _, _, waiting in asked),
                    freed_s,
                )
            )
            say(f"chats beside {beside}: first words p95 {1000 * found.chats[-1].p95_s:.0f} ms")
            yield


def plain_calls(text: str, count: Count) -> list[Call]:
    """Chats that show the model what the translation of a text would, and end at the same length, if not before."""
    wish = Wish(source=find_language("en"), target=find_language(LANGUAGE), formality=None, glossary={})
    return [_plain(wish, segment, count) for segment in segments(text, budget=SEGMENT_TOKENS, count=count)]


def _plain(wish: Wish, segment: Segment, count: Count) -> Call:
    shown = wish.messages(segment.words, segment.before, segment.after)
    messages = [{"type": message.type, "content": message.text} for message in shown]
    options = {
        "temperature": 0,
        "repetition_penalty": 1,
        "max_tokens": wish.answer_tokens(count(segment.words)),
    }
    return Call("/chat/stream", {"input": {"messages": messages}, "config": {"configurable": options}})


@contextmanager
def _load(server: Server, calls: list[Call], clients: int) -> Iterator[None]:
    """So many clients that ask without a pause, in a process of their own, once as many slots are in use as will be."""
    if not clients:
        yield
        return
    process = get_context("spawn").Process(target=partial(drive_http, server.url, calls, clients, LIMIT_S), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + BUSY_S
        while busy(server)[0] < min(AT_ONCE, len(calls) if clients > 1 else AT_ONCE):
            if time.monotonic() > deadline or not process.is_alive():
                break  # it is said how many there are
            time.sleep(0.05)
        time.sleep(SETTLE_S)
        yield
    finally:
        process.kill()
        process.join()


def _chat(server: Server, serial: int) -> tuple[float, int, int]:
    """Until the first words of one, and how many ran and waited when it was asked."""
    running, waiting = busy(server)
    value = {"messages": [{"type": "human", "content": question(serial)}]}
    return stream(server, "chat", value, max_tokens=8).first_words_s, running, waiting
