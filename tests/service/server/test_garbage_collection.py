"""Finalizers of garbage run in a thread that holds no lock, whatever the other threads are doing."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.server import garbage_collection
from service.server.garbage_collection import MAX_GROWTH, MIN_YOUNG, THREAD_NAME, collect_in_own_thread


class Node:
    """A part of a cycle."""

    def __init__(self, finalize: Callable[[], None]) -> None:
        self.itself = self
        self.finalize = finalize
        self.text = ""
        self.other: Node | None = None

    def __del__(self) -> None:
        self.finalize()


@pytest.fixture(autouse=True)
def collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # as the service does: what other tests hold would postpone collections
    with collect_in_own_thread(interval_s=0.002):
        yield
    assert gc.isenabled()
    gc.unfreeze()


def churn(is_enough: Callable[[], bool]) -> None:
    """Make garbage of every generation until something has happened."""
    deadline = time.monotonic() + 20
    while not is_enough():
        assert time.monotonic() < deadline, "not collected within 20 s"
        held = [[index] for index in range(10 * MIN_YOUNG)]
        time.sleep(0.005)
        del held


def test_finalizers_run_in_the_thread_of_the_collection() -> None:
    threads: list[str] = []
    for _ in range(100):
        Node(lambda: threads.append(threading.current_thread().name))
    churn(lambda: len(threads) == 100)
    assert set(threads) == {THREAD_NAME}


def test_old_garbage_is_collected_too() -> None:
    finalized: list[bool] = []
    node = Node(lambda: finalized.append(True))
    gc.collect(1)
    gc.collect(1)  # it is in the oldest generation now
    del node
    churn(lambda: bool(finalized))


@pytest.mark.skipif(sys.platform != "linux", reason="the size of the process is in a file of Linux")
def test_a_little_garbage_with_large_texts_is_collected_soon() -> None:
    finalized: list[bool] = []
    deadline = time.monotonic() + 20
    while not finalized:
        assert time.monotonic() < deadline, "not collected within 20 s"
        Node(lambda: finalized.append(True)).text = "x" * (2 * MAX_GROWTH)
        time.sleep(0.1)


def test_old_garbage_waits_while_many_objects_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be looked at one by one, while all threads wait."""
    monkeypatch.setattr(garbage_collection, "MAX_OLD", len(gc.get_objects()) + 50_000)
    monkeypatch.setattr(garbage_collection, "POSTPONED_BY_S", 0.01)
    finalized: list[bool] = []
    alive = [[index] for index in range(100_000)]
    Node(lambda: finalized.append(True)).other = (node := Node(lambda: None))
    gc.collect(1)
    gc.collect(1)  # both are in the oldest generation now
    num_full = gc.get_stats()[2]["collections"]
    node.other = node
    begun = time.monotonic()
    churn(lambda: time.monotonic() > begun + 1)
    assert gc.get_stats()[2]["collections"] == num_full
    alive.clear()
    churn(lambda: gc.get_stats()[2]["collections"] > num_full)


def test_an_abandoned_stream_may_submit_work_while_others_do() -> None:
    """As LangChain's do at their end, by `handle_event`."""
    done: list[int] = []

    def stream(index: int) -> Generator[int]:
        try:
            yield 1
        finally:
            with ThreadPoolExecutor(1) as executor:
                executor.submit(done.append, index).result()

    def abandon(index: int) -> None:
        generator = stream(index)
        next(generator)
        cycle: list[object] = [generator]
        cycle.append(cycle)

    num_abandoned = 0

    def go_on() -> bool:
        nonlocal num_abandoned
        with ThreadPoolExecutor(1) as executor:
            executor.submit(int)
        if num_abandoned < 300:
            abandon(num_abandoned)
            num_abandoned += 1
        return len(done) == 300

    churn(go_on)
