"""More than the service can take: what those get who are let in, and how soon the others hear that they are not.

`python -m tests.chaos.overload` starts the service with the embedded model, finds out its capacity with as many clients
as it takes in at once, then lets them come by chance at that rate, and at four times that rate, and prints figures.

The clients run in a process of their own and parse nothing: they share the cores with the service.
"""

import argparse
import asyncio
import gc
import math
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from tests.bench.mix import ASKS_PER_RUN, OPTIONS, mix
from tests.chaos.client import Outcome, ask, request
from tests.server import Server

SLOTS, QUEUE = 16, 2
TIMES = 4
"""How much more than it can take."""

WARM_UP = 0.15
"""Share of a run before it counts."""

RETRY_S = 0.05
"""Pause of a client that was refused though there are no more clients than places: one of them is not free yet."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of the requests of a run."""

    outcomes: Sequence[Outcome]
    rate: float
    """Whole answers per second."""
    cpu_share: float
    """Of one core, taken by the clients."""

    @property
    def ends(self) -> Counter[str]:
        return Counter(outcome.label for outcome in self.outcomes)

    @property
    def first_tokens_s(self) -> list[float]:
        """From asking to the first token, of those that were answered."""
        return [
            outcome.first_token_s - outcome.started_s
            for outcome in self.outcomes
            if outcome.is_answered and outcome.first_token_s is not None
        ]

    @property
    def refusals(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status in (429, 503)]

    def __str__(self) -> str:
        said = f"{self.rate:.2f} answers/s; first token {_spread(self.first_tokens_s)}"
        if self.refusals:
            said += f"; refusals {_spread([outcome.took_s for outcome in self.refusals])}"
        return f"{said}; {dict(self.ends)}; clients {self.cpu_share:.0%} of a core"


def _spread(values_s: Sequence[float]) -> str:
    middle, most, longest = (1000 * quantile(values_s, share) for share in (0.5, 0.95, 1))
    return f"p50 {middle:.0f} ms, p95 {most:.0f} ms, max {longest:.0f} ms"


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so many of them do not exceed; nan if there are none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.nan


def asks(run: int) -> list[bytes]:
    """The requests of the benchmark's mix."""
    options = {"configurable": OPTIONS}
    return [
        request(f"/{one.kind}/stream", {"input": one.input, "config": options}) for one in mix(ASKS_PER_RUN, run=run)
    ]


async def closed_loop(port: int, messages: Sequence[bytes], *, clients: int, seconds: float) -> Figures:
    """So many clients, each of which asks again as soon as it has its answer."""
    clock = _Clock(seconds)
    outcomes: list[Outcome] = []
    left = iter(messages)

    async def client() -> None:
        while not clock.is_over and (message := next(left, None)) is not None:
            outcomes.append(await ask(port, message))
            if outcomes[-1].status == 503:
                await asyncio.sleep(RETRY_S)

    await asyncio.gather(*(client() for _ in range(clients)))
    return clock.figures(outcomes)


async def open_loop(port: int, messages: Sequence[bytes], *, rate: float, seconds: float, seed: int = 0) -> Figures:
    """Clients that come by chance, so many a second, whatever becomes of the others."""
    clock = _Clock(seconds)
    chance = Random(seed)
    running: list[asyncio.Task[Outcome]] = []
    due_s = clock.started_s
    for message in messages:
        due_s += chance.expovariate(rate)
        if due_s > clock.started_s + seconds:
            break
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        running.append(asyncio.create_task(ask(port, message)))
    return clock.figures(await asyncio.gather(*running))


class _Clock:
    """Begins when it is made."""

    def __init__(self, seconds: float) -> None:
        self.started_s = time.perf_counter()
        self._started_cpu_s = time.process_time()
        self._seconds = seconds

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self.started_s + self._seconds

    def figures(self, outcomes: Sequence[Outcome]) -> Figures:
        """What was answered after the warm-up and before the end counts for the rate."""
        opened_s, closed_s = self.started_s + WARM_UP * self._seconds, self.started_s + self._seconds
        in_time = sum(opened_s <= outcome.ended_s < closed_s for outcome in outcomes if outcome.is_answered)
        cpu_share = (time.process_time() - self._started_cpu_s) / (time.perf_counter() - self.started_s)
        return Figures(outcomes, in_time / (closed_s - opened_s), cpu_share)


def apart(drive: Callable[..., Coroutine[None, None, Figures]], *arguments: object, **named: object) -> Figures:
    """Run one of these loops in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, drive, arguments, named).result()


def _run(
    drive: Callable[..., Coroutine[None, None, Figures]], arguments: Sequence[object], named: Mapping[str, object]
) -> Figures:
    gc.disable()
    return asyncio.run(drive(*arguments, **named))


@dataclass(frozen=True, slots=True)
class Measured:
    """Three runs of one service."""

    capacity: Figures
    at_capacity: Figures
    beyond: Figures

    @property
    def first_token_ratio(self) -> float:
        """Of the time that 95 % of the first tokens keep within, beyond capacity to at capacity."""
        return quantile(self.beyond.first_tokens_s, 0.95) / quantile(self.at_capacity.first_tokens_s, 0.95)

    @property
    def first_token_ratio_when_full(self) -> float:
        """The same, to capacity with all places taken."""
        return quantile(self.beyond.first_tokens_s, 0.95) / quantile(self.capacity.first_tokens_s, 0.95)

    @property
    def rate_ratio(self) -> float:
        return self.beyond.rate / self.capacity.rate

    @property
    def refusal_p95_s(self) -> float:
        return quantile([outcome.took_s for outcome in self.beyond.refusals], 0.95)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"capacity, {SLOTS + QUEUE} clients: {self.capacity}",
                f"1 x capacity, by chance: {self.at_capacity}",
                f"{TIMES} x capacity, by chance: {self.beyond}",
                f"{TIMES} x to 1 x, first token p95: {self.first_token_ratio:.2f} by chance, "
                f"{self.first_token_ratio_when_full:.2f} with all places taken; answers/s: {self.rate_ratio:.2f}",
            ]
        )


@dataclass(frozen=True, slots=True)
class Repeated:
    """The same several times, and the medians of its ratios."""

    repeats: Sequence[Measured]

    @property
    def first_token_ratio(self) -> float:
        return median(measured.first_token_ratio for measured in self.repeats)

    @property
    def rate_ratio(self) -> float:
        return median(measured.rate_ratio for measured in self.repeats)

    @property
    def refusal_p95_s(self) -> float:
        return max(measured.refusal_p95_s for measured in self.repeats)

    def __str__(self) -> str:
        said = f"medians: first token p95 {self.first_token_ratio:.2f}, answers/s {self.rate_ratio:.2f}"
        return "\n".join([*map(str, self.repeats), said])


def measure(server: Server, *, seconds: float, repeats: int) -> Repeated:
    """Find out the capacity, and what happens at that rate and far beyond it."""
    apart(closed_loop, server.port, asks(0), clients=SLOTS, seconds=15)  # warm-up
    measured: list[Measured] = []
    for repeat in range(repeats):
        new = [asks(1 + 3 * repeat + run) for run in range(3)]
        capacity = apart(closed_loop, server.port, new[0], clients=SLOTS + QUEUE, seconds=seconds)
        at_capacity = apart(open_loop, server.port, new[1], rate=capacity.rate, seconds=seconds)
        beyond = apart(open_loop, server.port, new[2], rate=TIMES * capacity.rate, seconds=seconds)
        measured.append(Measured(capacity, at_capacity, beyond))
    return Repeated(measured)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="length of each of the three runs")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        Server(Path(directory) / "log", max_slots=str(SLOTS), max_queue=str(QUEUE)) as server,
    ):
        print(measure(server, seconds=arguments.seconds, repeats=arguments.repeats))


if __name__ == "__main__":
    main()
