"""What was measured of documents, as Markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.documents_client import Begun
from tests.bench.documents_found import Chats, Found, Obeyed, Summarized, Translated
from tests.bench.figures import percentile
from tests.bench.report import markdown


def text(found: Found) -> str:
    """All there is, as Markdown."""
    parts: list[str] = []
    if found.translated:
        parts += ["## A long document\n", _translated(found.translated)]
    if found.streamed:
        parts += [
            f"\nThe first {found.streamed_pages:g} pages by the plain stream: {found.streamed.wall_s:.0f} s, "
            f"first words after {found.streamed.first_words_s:.2f} s."
        ]
    if found.summarized:
        parts += ["\n### Summarized\n", _summarized(found.summarized)]
    if found.translated_by_pages or found.summarized_by_pages:
        parts += ["\n## What a page costs"]
        parts += ["\n### Translated\n", _translated(found.translated_by_pages)] if found.translated_by_pages else []
        parts += ["\n### Summarized\n", _summarized(found.summarized_by_pages)] if found.summarized_by_pages else []
    if found.first:
        parts += ["\n## Time to the first words of a short and a long document\n", _first(found)]
    if found.chats:
        parts += ["\n## Chats beside it\n", _chats(found.chats)]
    if found.obeyed:
        parts += ["\n## What the model does of what it is asked for\n", _obeyed(found.obeyed)]
    return "\n".join(parts).strip() + "\n"


def write(directory: Path, described: Mapping[str, object], settings: Mapping[str, object], found: Found) -> None:
    """Put `documents.json` and `documents.md` into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    everything = {"machine": dict(described), "settings": dict(settings), **asdict(found)}
    if found.streamed:
        del everything["streamed"]["text"]
    (directory / "documents.json").write_text(json.dumps(everything, indent=1) + "\n")
    (directory / "documents.md").write_text(text(found))


def _translated(documents: Sequence[Translated]) -> str:
    header = ["pages", "seconds", "a page", "first words", "segments", "calls", "what became of them", "prompt tokens"]
    header += ["answer tokens", "tokens/s", "slots in use", "whole, in order", "events", "memory, GB: before … after"]
    rows = [
        [
            f"{each.pages:g}",
            f"{each.wall_s:.0f}",
            f"{each.wall_s / each.pages:.1f} s",
            f"{each.first_words_s:.2f} s",
            str(each.segments),
            str(each.calls),
            _counts(each.statuses),
            str(each.prompt_tokens),
            str(each.output_tokens),
            f"{each.output_tokens / each.wall_s:.0f}",
            f"{each.mean_running:.1f}",
            f"{_yes(each.is_whole)}, {_yes(each.is_in_order)}",
            f"{each.event_bytes / 1e6:.0f} MB",
            " ".join(f"{memory / 1e9:.2f}" for memory in each.memory_bytes) + f", peak {each.peak_bytes / 1e9:.2f}",
        ]
        for each in documents
    ]
    return markdown(header, rows)


def _summarized(documents: Sequence[Summarized]) -> str:
    header = ["pages", "seconds", "parts until", "a page", "summaries made", "prompt tokens", "answer tokens"]
    header += ["words", "ended by", "slots in use", "in order", "memory, peak", "told"]
    rows = [
        [
            f"{each.pages:g}",
            f"{each.wall_s:.0f}",
            f"{each.parts_s:.0f}",
            f"{each.parts_s / each.pages:.2f} s",
            ", ".join(f"{stage} {number}" for stage, number in each.stages),
            str(each.prompt_tokens),
            str(each.output_tokens),
            str(each.num_words),
            each.finish_reason,
            f"{each.mean_running:.1f}",
            _yes(each.is_in_order),
            f"{each.peak_bytes / 1e9:.2f} GB",
            _counts(each.problems),
        ]
        for each in documents
    ]
    return markdown(header, rows) + "\n\nA page: until all parts are summarized."


def _first(found: Found) -> str:
    header = ["engine", "document", "n", "median", "range", "slots in use when left", "all free after, median, longest"]
    rows: list[list[str]] = []
    for each in found.first:
        rows += [
            [each.engine, "short", *_begun(each.short)],
            [each.engine, "long", *_begun(each.long)],
            [each.engine, "long to short", "", f"{each.ratio:.2f} x", "", "", ""],
        ]
    return markdown(header, rows)


def _begun(begun: Sequence[Begun]) -> list[str]:
    first = [1000 * each.first_words_s for each in begun]
    freed = [1000 * each.freed_s for each in begun]
    return [
        str(len(begun)),
        f"{median(first):.0f} ms",
        f"{min(first):.0f} to {max(first):.0f}",
        f"{median(each.num_running for each in begun):g}",
        f"{median(freed):.0f}, {max(freed):.0f} ms",
    ]


def _chats(chats: Sequence[Chats]) -> str:
    header = ["beside", "n", "first words p50", "p95", "longest", "of that beside plain streams", "slots in use"]
    header += ["waiting at most", "all free after, longest"]
    by_load: dict[str, list[Chats]] = {}
    for each in chats:
        by_load.setdefault(each.beside, []).append(each)
    times = {beside: [time_s for each in rounds for time_s in each.first_s] for beside, rounds in by_load.items()}
    plain = next((values for beside, values in times.items() if "streams" in beside), None)
    rows = [
        [
            beside,
            str(len(times[beside])),
            *(f"{1000 * (percentile(times[beside], percent) or 0):.0f} ms" for percent in (50, 95, 100)),
            f"{(percentile(times[beside], 95) or 0) / (percentile(plain, 95) or 1):.2f} x" if plain else "-",
            f"{sum(each.mean_running for each in rounds) / len(rounds):.1f}",
            str(max(each.max_waiting for each in rounds)),
            f"{1000 * max(each.freed_s for each in rounds):.0f} ms",
        ]
        for beside, rounds in by_load.items()
    ]
    return markdown(header, rows)


def _obeyed(obeyed: Sequence[Obeyed]) -> str:
    header = ["asked for", "tried", "done at once", "after mending", "not done", "of these told", ""]
    rows = [
        [
            each.asked,
            str(each.tried),
            str(each.at_once),
            str(each.after_mending),
            str(each.tried - each.at_once - each.after_mending),
            str(each.told),
            each.note,
        ]
        for each in obeyed
    ]
    return markdown(header, rows)


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "-"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"
