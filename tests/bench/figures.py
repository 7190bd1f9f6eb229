"""From answers to figures.

Tokens are counted alike for every engine: by the model's own tokenizer, in the text that came.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median
from typing import Self

from tests.bench.load import Answer, Load

TokenEnds = Callable[[str], Sequence[int]]
"""Gives, for each token of a text, how many characters there are up to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one engine did at one number of clients. None: there is no such thing to measure."""

    requests_per_s: float
    """Answers that were finished within the window, per second of it."""
    tokens_per_s: float
    """Output tokens that came within the window, per second of it."""
    ttft_p50_s: float | None
    """Until the first token came, of the requests that were begun within the window."""
    ttft_p95_s: float | None
    inter_token_p50_s: float | None
    """Between two tokens of an answer; where several came in one chunk, the time since the chunk before is spread
    evenly over them."""
    inter_token_p95_s: float | None
    stall_p95_s: float | None
    """The longest that an answer stood still: its longest wait between two chunks."""
    total_p50_s: float | None
    """From the request to the end of its answer."""
    total_p95_s: float | None
    warm_up_ttft_p95_s: float | None
    """Of the clients' first requests, all sent at once."""
    answer_tokens: float | None
    """Mean length of an answer, as we count it."""
    said_answer_tokens: float | None
    """The same as the engine says, where it says so of all."""
    said_prompt_tokens: float | None
    finished: int
    """Requests begun within the window and answered."""
    window_s: float
    load_cpu_share: float
    """Of one core, taken by the load generator itself."""
    peak_memory_bytes: int | None = None
    peak_device_memory_bytes: int | None = None
    errors: int = 0
    """Of all requests, those of the warm-up included."""

    @classmethod
    def of(cls, load: Load, token_ends: TokenEnds, *, max_tokens: int) -> Self:
        """Work them out. `max_tokens` is what an answer can hold: text of random weights may count as more."""
        good = [answer for answer in load.answers if answer.error is None]
        tokens = {id(answer): token_times(answer, token_ends(answer.text))[:max_tokens] for answer in good}
        counted = [answer for answer in good if load.open_s <= answer.started_s < load.close_s]
        early = [answer for answer in good if answer.started_s < load.open_s]
        window_s = load.close_s - load.open_s

        def within(time_s: float) -> bool:
            return load.open_s < time_s <= load.close_s

        first = [tokens[id(answer)][0] - answer.started_s for answer in counted if tokens[id(answer)]]
        gaps = [gap for answer in counted for gap in token_gaps(tokens[id(answer)])]
        stalls = [max(waits) for answer in counted if (waits := chunk_waits(answer))]
        total = [answer.ended_s - answer.started_s for answer in counted]
        warm_up = [tokens[id(answer)][0] - answer.started_s for answer in early if tokens[id(answer)]]
        return cls(
            requests_per_s=sum(within(answer.ended_s) for answer in good) / window_s,
            tokens_per_s=sum(within(time_s) for times in tokens.values() for time_s in times) / window_s,
            ttft_p50_s=percentile(first, 50),
            ttft_p95_s=percentile(first, 95),
            inter_token_p50_s=percentile(gaps, 50),
            inter_token_p95_s=percentile(gaps, 95),
            stall_p95_s=percentile(stalls, 95),
            total_p50_s=percentile(total, 50),
            total_p95_s=percentile(total, 95),
            warm_up_ttft_p95_s=percentile(warm_up, 95),
            answer_tokens=_mean([len(tokens[id(answer)]) for answer in counted]),
            said_answer_tokens=_mean_if_all([answer.output_tokens for answer in counted]),
            said_prompt_tokens=_mean_if_all([answer.prompt_tokens for answer in counted]),
            finished=len(counted),
            window_s=window_s,
            load_cpu_share=load.cpu_share,
            errors=len(load.answers) - len(good),
        )

    @classmethod
    def median(cls, repeats: Sequence[Self]) -> Self:
        """Each figure's own median; errors are added up."""
        values: dict[str, float | int | None] = {}
        for name in (field.name for field in fields(cls)):
            known = [value for repeat in repeats if (value := getattr(repeat, name)) is not None]
            values[name] = sum(known) if name == "errors" else median(known) if known else None
        return cls(**values)  # type: ignore[arg-type]


def token_times(answer: Answer, ends: Sequence[int]) -> list[float]:
    """When each token of an answer was whole, given the characters up to the end of each."""
    times: list[float] = []
    length, remaining = 0, iter(ends)
    end = next(remaining, None)
    for arrived_s, text in answer.pieces:
        length += len(text)
        while end is not None and end <= length:
            times.append(arrived_s)
            end = next(remaining, None)
    return times


def token_gaps(times: Sequence[float]) -> list[float]:
    """Seconds between each token and the one before; tokens that came together share the wait for them evenly."""
    # Those that came with the first token are left out: what they waited is the time to first token.
    chunks = list(Counter(times).items())
    return [gap for (before, _), (time_s, count) in pairwise(chunks) for gap in [(time_s - before) / count] * count]


def chunk_waits(answer: Answer) -> list[float]:
    """Seconds between each chunk and the one before."""
    times = [arrived_s for arrived_s, _ in answer.pieces]
    return [later - earlier for earlier, later in pairwise(times)]


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Linear between the two nearest ranks; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_if_all(values: Sequence[int | None]) -> float | None:
    return _mean([value for value in values if value is not None]) if None not in values else None
