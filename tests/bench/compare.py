"""The engines side by side: each started, put under the same load with more and more clients, and stopped."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

from tests.bench import direct
from tests.bench.figures import Figures, TokenEnds
from tests.bench.load import Load, drive_http
from tests.bench.memory import PeakMemory
from tests.bench.mix import MAX_TOKENS, Ask, mix
from tests.bench.peers import PEERS, Peer, Weights

DIRECT = "engine"
"""Our engine, called without the service; the other names are those of `PEERS`."""

NAMES = (PEERS[0].name, DIRECT, *(peer.name for peer in PEERS[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much load, and how often."""

    clients: tuple[int, ...] = (1, 4, 16, 64)
    repeats: int = 3
    requests_per_client: int = 10
    """Counted, where that takes less than `limit_s`; twice as many for a client alone."""
    limit_s: float = 120
    """Of one number of clients, once it is warm."""
    seed: int = 0

    def num_asks(self, clients: int) -> int:
        """Each client's first is the warm-up, and those under way when the last is begun are not counted."""
        return max((self.requests_per_client + 2) * clients, 2 * self.requests_per_client + 1)


@dataclass(slots=True)
class Result:
    """What came of one engine."""

    name: str
    about: str
    flags: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    version: str | None = None
    start_s: float | None = None
    """From its start until it was ready."""
    figures: dict[int, list[Figures]] = field(default_factory=dict)
    """By number of clients, one of each repeat."""
    failure: str | None = None
    """Why it did not run, or did not go on."""

    def median(self, clients: int) -> Figures | None:
        """Of the repeats."""
        repeats = self.figures.get(clients)
        return Figures.median(repeats) if repeats else None


@dataclass(frozen=True, slots=True)
class _Running:
    """An engine that is ready."""

    pid: int
    load: Callable[[Sequence[Ask], int, float], Load]


def compare(weights: Weights, names: Sequence[str], plan: Plan, token_ends: TokenEnds, logs: Path) -> Iterator[Result]:
    """Run the engines one after the other, in the order of `NAMES`."""
    kinds = {kind.name: kind for kind in PEERS}
    for name in NAMES:
        if name not in names:
            continue
        if name == DIRECT:
            result = Result(DIRECT, "this service's engine, called in its own process, without HTTP and LangChain")
            _run(result, _directly(weights), plan, token_ends)
        else:
            peer = kinds[name](weights)
            result = Result(peer.name, peer.about, peer.flags, peer.variables, failure=peer.missing)
            if result.failure is None:
                result.version = peer.version
                _run(result, _serving(peer, logs / f"{peer.name}.log"), plan, token_ends)
        yield result


def _run(result: Result, engine: AbstractContextManager[_Running], plan: Plan, token_ends: TokenEnds) -> None:
    """One engine that fails does not end the comparison: it is said in its result."""
    _say(f"{result.name}: {result.about}")
    started_s = time.monotonic()
    try:
        with engine as running:
            result.start_s = time.monotonic() - started_s
            for repeat in range(plan.repeats):
                for level, clients in enumerate(plan.clients):
                    asks = mix(plan.num_asks(clients), run=repeat * len(plan.clients) + level, seed=plan.seed)
                    figures = _measured(running, asks, clients, plan.limit_s, token_ends)
                    result.figures.setdefault(clients, []).append(figures)
    except (RuntimeError, OSError, EOFError, subprocess.SubprocessError) as error:
        result.failure = type(error).__name__
        _say(f"{result.name} failed: {type(error).__name__}: {error}")


def _measured(running: _Running, asks: Sequence[Ask], clients: int, limit_s: float, token_ends: TokenEnds) -> Figures:
    with PeakMemory(running.pid) as memory:
        load = running.load(asks, clients, limit_s)
    figures = replace(
        Figures.of(load, token_ends, max_tokens=MAX_TOKENS),
        peak_memory_bytes=memory.host_bytes,
        peak_device_memory_bytes=memory.device_bytes,
    )
    ttft = "-" if figures.ttft_p95_s is None else f"{figures.ttft_p95_s:.2f} s"
    _say(
        f"  {clients} clients: {figures.requests_per_s:.2f} requests/s, {figures.tokens_per_s:.0f} tokens/s, "
        f"TTFT p95 {ttft}, {figures.finished} counted, {figures.errors} errors"
    )
    for error in sorted({answer.error for answer in load.answers if answer.error})[:3]:
        _say(f"    {error}")
    if figures.errors == len(load.answers):
        raise RuntimeError("it answered nothing")
    return figures


@contextmanager
def _serving(peer: Peer, log: Path) -> Iterator[_Running]:
    """The load comes from a process of its own, so that nothing of ours shares its interpreter."""
    # Broken off, the server is stopped first: the load notices, while the server would go on for its sake.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process, peer.server(log) as server:

        def load(asks: Sequence[Ask], clients: int, limit_s: float) -> Load:
            calls = [peer.call(ask) for ask in asks]
            return process.submit(drive_http, server.url, calls, clients, limit_s).result()

        yield _Running(server.process.pid, load)


@contextmanager
def _directly(weights: Weights) -> Iterator[_Running]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=direct.serve_rounds, args=(weights.reference, theirs), daemon=True)
    process.start()
    theirs.close()

    def load(asks: Sequence[Ask], clients: int, limit_s: float) -> Load:
        ours.send((asks, clients, limit_s))
        answer: Load = ours.recv()
        return answer

    try:
        ours.recv()  # it is ready
        assert process.pid is not None
        yield _Running(process.pid, load)
        ours.send(None)
        process.join(60)
    finally:
        process.kill()
        ours.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
