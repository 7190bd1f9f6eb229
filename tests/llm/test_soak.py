"""A long run of the real engine. `make soak` runs it and shows its figures."""

import random
import threading
import time
from collections import Counter

import psutil  # type: ignore[import-untyped]
import pytest

from llm.engine import EngineState, Request
from llm.generation import Chunk
from llm.local_engine import LocalEngine
from llm.sampling import Sampling

NUM_REQUESTS = 2000
NUM_CLIENTS = 24
CANCELLED = 0.3
WARM_UP = 500
"""Requests after which memory must not grow any more: the cache is full by then."""
GROWTH = 64 * 2**20
"""Bytes that count as noise of the allocators."""


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_two_thousand_requests_leave_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    engine = LocalEngine("embedded", max_slots=8, max_context=1024)
    engine.wait_until_ready(100)
    numbers = iter(range(NUM_REQUESTS))
    lock = threading.Lock()
    ends: Counter[str] = Counter()
    memory: list[int] = []
    states: set[EngineState] = set()
    threads_before = threading.active_count()

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while True:
            with lock:
                number = next(numbers, None)
                if number is None:
                    return
                if number % 100 == 0:
                    memory.append(psutil.Process().memory_info().rss)
            reason = one_request(engine, chance, caller=f"client {seed}")
            with lock:
                ends[reason] += 1
                states.add(engine.health().state)

    started = time.monotonic()
    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    took_s = time.monotonic() - started
    health = engine.health()

    with capsys.disabled():
        mib = [round(size / 2**20) for size in memory]
        print(f"\n{dict(ends)} in {took_s:.0f} s; RSS at each hundredth request, MiB: {mib}")
    assert ends.total() == NUM_REQUESTS
    assert CANCELLED / 2 < ends["cancelled"] / NUM_REQUESTS < CANCELLED * 2
    assert (health.state, health.running, health.waiting, health.restarts) == (EngineState.READY, 0, 0, 0)
    assert states == {EngineState.READY}
    assert threading.active_count() == threads_before
    assert max(memory[WARM_UP // 100 :]) - memory[WARM_UP // 100] < GROWTH
    # All slots are still there: as many as ever run at once.
    generations = [engine.generate(Request(prompt=(1, 2, 3), sampling=Sampling(max_tokens=200))) for _ in range(8)]
    firsts = [next(generation) for generation in generations]
    assert engine.health().running == len(firsts) == 8
    engine.close()


def one_request(engine: LocalEngine, chance: random.Random, *, caller: str) -> str:
    """Ask for something; leave at a random moment in some cases. Says how it ended."""
    length = chance.choice((5, 30, 60, 200, 600))  # the longest is read in three pieces
    request = Request(
        prompt=tuple(chance.randrange(100, 40_000) for _ in range(length)),
        sampling=Sampling(max_tokens=chance.randrange(1, 16), temperature=chance.choice((0.0, 0.8)), top_p=0.9),
        owner=chance.choice(("", "a", "b")),
        caller=caller,
    )
    generation = engine.generate(request)
    if chance.random() < CANCELLED:
        timer = threading.Timer(chance.random() * 0.5, generation.cancel)
        timer.start()
        answer = sum(generation, Chunk())
        generation.cancel()
        timer.cancel()
        timer.join()
    else:
        answer = sum(generation, Chunk())
    return str(answer.finish_reason)
