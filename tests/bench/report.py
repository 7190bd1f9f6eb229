"""What was measured, for people and for programs: a table, JSON, a picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.alone import Measurement
from tests.bench.compare import DIRECT, NAMES, Result
from tests.bench.figures import Figures
from tests.bench.limits import Limits
from tests.bench.peers import PEERS

Column = tuple[str, Callable[[Figures], float | int | None], str]

_COLUMNS: tuple[Column, ...] = (
    ("requests/s", lambda figures: figures.requests_per_s, ".2f"),
    ("tokens/s", lambda figures: figures.tokens_per_s, ".0f"),
    ("TTFT p50, s", lambda figures: figures.ttft_p50_s, ".2f"),
    ("TTFT p95, s", lambda figures: figures.ttft_p95_s, ".2f"),
    ("between tokens p50, ms", lambda figures: _milli(figures.inter_token_p50_s), ".0f"),
    ("p95, ms", lambda figures: _milli(figures.inter_token_p95_s), ".0f"),
    ("longest stall p95, ms", lambda figures: _milli(figures.stall_p95_s), ".0f"),
    ("tokens/answer", lambda figures: figures.answer_tokens, ".0f"),
    ("memory, GB", lambda figures: _giga(figures.peak_memory_bytes), ".2f"),
    ("errors", lambda figures: figures.errors, ".0f"),
    ("load's own CPU", lambda figures: 100 * figures.load_cpu_share, ".0f%"),
)


def table(results: Sequence[Result]) -> str:
    """The comparison as Markdown: medians of the repeats."""
    header = ["clients", "engine", *(name for name, _, _ in _COLUMNS)]
    rows: list[list[str]] = []
    for clients in sorted({clients for result in results for clients in result.figures}):
        for result in results:
            figures = result.median(clients)
            if figures is not None:
                rows.append([str(clients), result.name, *(_cell(read(figures), form) for _, read, form in _COLUMNS)])
    lines = [markdown(header, rows)] if rows else []
    lines += [f"{result.name}: {result.failure}" for result in results if result.failure]
    return "\n".join(lines)


def ratios(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Ours against each of the others at each number of clients: requests/s, and against our engine tokens/s.

    Each is the median of the repeats' own ratios.
    """
    ours = next((result for result in results if result.name == PEERS[0].name), None)
    found: dict[str, dict[str, float]] = {}
    for other in results:
        if ours is None or other is ours:
            continue
        read = _tokens_per_s if other.name == DIRECT else _requests_per_s
        for clients, theirs in other.figures.items():
            pairs = zip(ours.figures.get(clients, []), theirs, strict=False)
            if values := [read(mine) / read(peer) for mine, peer in pairs if read(peer)]:
                found.setdefault(other.name, {})[str(clients)] = median(values)
    return found


def ratio_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Of `ratios`."""
    clients = sorted({number for by_clients in found.values() for number in by_clients}, key=int)
    header = ["ours against", *(f"at {number}" for number in clients)]
    rows = [
        [
            f"{name} ({'tokens/s' if name == DIRECT else 'requests/s'})",
            *(f"{by_clients[number]:.2f} x" if number in by_clients else "-" for number in clients),
        ]
        for name, by_clients in found.items()
    ]
    return markdown(header, rows) if rows else ""


def alone_table(measured: Sequence[Measurement], limits: Limits) -> str:
    """The engine alone, beside what the machine could do at most."""
    rows = [
        [
            item.name,
            str(item.rows),
            str(item.context),
            f"{_cell(item.median, '.4g')} {item.unit}",
            f"{min(item.values):.4g} to {max(item.values):.4g}" if item.values else "-",
            _cell(item.limit, ".4g"),
            _cell(None if item.of_limit is None else 100 * item.of_limit, ".0f%"),
        ]
        for item in measured
    ]
    found = (
        f"This machine ({limits.device}): reads {limits.read_bytes_per_s / 1e9:.1f} GB/s, copies "
        f"{limits.copy_bytes_per_s / 1e9:.1f} GB/s, {limits.bfloat16_flops / 1e12:.3g} TFLOP/s in bfloat16, "
        f"{limits.float32_flops / 1e12:.3g} in float32. The limits count the bytes of the weights as they are kept.\n"
    )
    header = ["", "rows", "prompt", "median", "range", "limit", "of it"]
    return f"{found}\n{markdown(header, rows)}"


def record(
    described: Mapping[str, object],
    settings: Mapping[str, object],
    results: Sequence[Result],
    measured: Sequence[Measurement],
    limits: Limits | None,
) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "machine": dict(described),
        "settings": dict(settings),
        "engines": [_engine(result) for result in results],
        "ratios": ratios(results),
        "limits": None if limits is None else asdict(limits),
        "alone": [asdict(item) | {"median": item.median, "of_limit": item.of_limit} for item in measured],
    }


def write(directory: Path, everything: Mapping[str, Any], text: str, results: Sequence[Result]) -> None:
    """Put `bench.json`, `bench.md` and, where there is something to draw, `bench.png` into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.json").write_text(json.dumps(everything, indent=1) + "\n")
    (directory / "bench.md").write_text(text)
    if any(result.figures for result in results):
        draw(directory / "bench.png", results, str(everything["machine"]["cpu"]))


def draw(file: Path, results: Sequence[Result], machine: str) -> None:
    """Requests per second and time to first token over the number of clients."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    panels: tuple[tuple[str, Callable[[Figures], float | None], bool], ...] = (
        ("requests per second", _requests_per_s, False),
        ("time to first token, p95, seconds", lambda figures: figures.ttft_p95_s, True),
    )
    picture = Figure(figsize=(11, 4.5), layout="constrained")
    levels = sorted({clients for result in results for clients in result.figures})
    for place, (title, read, is_log) in zip(picture.subplots(1, len(panels)), panels, strict=True):
        for result in results:
            curve = _curve(result, read)
            place.errorbar(
                list(curve),
                [median(values) for values in curve.values()],
                yerr=[
                    [median(values) - min(values) for values in curve.values()],
                    [max(values) - median(values) for values in curve.values()],
                ],
                marker="o",
                capsize=3,
                color=f"C{NAMES.index(result.name)}",
                label=result.name,
                linewidth=2.5 if result.name == PEERS[0].name else 1.3,
                linestyle="--" if result.name == DIRECT else "-",
            )
        place.set_xscale("log", base=2)
        place.set_xticks(levels, [str(clients) for clients in levels])
        place.minorticks_off()
        if is_log:
            place.set_yscale("log")
            place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.yaxis.set_major_formatter("{x:g}")
            place.yaxis.set_minor_formatter(NullFormatter())
        else:
            place.set_ylim(bottom=0)
        place.set_xlabel("clients")
        place.set_title(title)
        place.grid(alpha=0.3)
    picture.axes[0].legend()
    picture.suptitle(machine, fontsize=9)
    picture.savefig(file, dpi=110)


def _curve(result: Result, read: Callable[[Figures], float | None]) -> dict[int, list[float]]:
    """What the repeats gave, by number of clients."""
    known = {
        clients: [value for figures in repeats if (value := read(figures)) is not None]
        for clients, repeats in sorted(result.figures.items())
    }
    return {clients: values for clients, values in known.items() if values}


def _engine(result: Result) -> dict[str, Any]:
    levels = [
        {"clients": clients, "median": asdict(Figures.median(repeats)), "repeats": [asdict(one) for one in repeats]}
        for clients, repeats in sorted(result.figures.items())
    ]
    return {
        "name": result.name,
        "about": result.about,
        "flags": result.flags,
        "variables": result.variables,
        "version": result.version,
        "start_s": result.start_s,
        "failure": result.failure,
        "levels": levels,
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _requests_per_s(figures: Figures) -> float:
    return figures.requests_per_s


def _tokens_per_s(figures: Figures) -> float:
    return figures.tokens_per_s


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form.removesuffix('%')}}{'%' if form.endswith('%') else ''}"


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _giga(size: int | None) -> float | None:
    return None if size is None else size / 1e9
