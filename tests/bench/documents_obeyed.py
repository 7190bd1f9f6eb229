"""How often a model does what the chains ask of it, and whether they tell where it does not."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, TypeVar

from tests.bench import documents_texts as texts
from tests.bench.documents_client import follow, invoke
from tests.bench.documents_found import Found, Obeyed, Plan
from tests.bench.documents_whole import say, translation
from tests.server import Server

T = TypeVar("T")

MAX_WORDS = (20, 50, 100)

SUMMARY_TOKENS = 512
"""More than any of these words are: what has not ended by then has too many."""

CLIENTS = 8


def obeyed(server: Server, *, plan: Plan, found: Found) -> Iterator[None]:
    """Lengths, glossaries, and what must stay."""
    for most in MAX_WORDS:
        found.obeyed.append(_lengths(server, most, plan.each))
        yield
    for work in (_terms, _marks):
        found.obeyed.append(work(server, plan.each))
        yield
    for each in found.obeyed:
        say(f"{each.asked}: {each.at_once} of {each.tried} at once, {each.after_mending} after mending")


def _lengths(server: Server, most: int, each: int) -> Obeyed:
    def summary(text: str) -> dict[str, Any]:
        told = follow(server, "summarize", {"text": text, "max_words": most}, max_tokens=SUMMARY_TOKENS)
        said: dict[str, Any] = told.custom["summary"][0][1]
        return said

    said = _all(summary, texts.paragraphs(each, words=range(80, 400), seed=most))
    over = [told for told in said if told["num_words"] > most]
    told = sum(any("words where at most" in problem for problem in each["problems"]) for each in over)
    note = f"words written: median {median(each['num_words'] for each in said):.0f}"
    if over:
        note += f"; of those that are too long {median(each['num_words'] for each in over):.0f}"
    return Obeyed(f"`max_words` {most}", len(said), len(said) - len(over), told=told, note=note)


def _terms(server: Server, each: int) -> Obeyed:
    def translated(asked: tuple[str, str]) -> tuple[bool, bool]:
        text, term = asked
        wanted = texts.GLOSSARY[term]
        value = {**translation(text), "glossary": {term: wanted}}
        document = invoke(server, "translate/document", value)
        is_told = any(f"“{wanted}”" in problem for segment in document["segments"] for problem in segment["problems"])
        return wanted.casefold() in document["text"].casefold(), is_told

    done = _all(translated, texts.term_texts(each, seed=4))
    missed = [is_told for is_there, is_told in done if not is_there]
    return Obeyed("`glossary`, a term", len(done), len(done) - len(missed), told=sum(missed))


def _marks(server: Server, each: int) -> Obeyed:
    def translated(asked: tuple[str, str]) -> tuple[bool, bool, str]:
        text, mark = asked
        told = follow(server, "translate", translation(text))
        ((_, segment),) = told.custom["segment"]
        return told.answers["segment 1"].count(mark) == 1, told.output.count(mark) == 1, segment["status"]

    done = _all(translated, texts.marked_texts(each))
    at_once = sum(is_in_answer for is_in_answer, _, _ in done)
    lost = [status for _, is_kept, status in done if not is_kept]
    statuses = Counter(status for _, _, status in done)
    note = "segments: " + ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))
    return Obeyed(
        "a placeholder, code, URL or tag stays",
        len(done),
        at_once,
        after_mending=len(done) - len(lost) - at_once,
        told=lost.count("faulty"),
        note=note,
    )


def _all(work: Callable[[Any], T], asked: Sequence[Any]) -> list[T]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(work, asked))
