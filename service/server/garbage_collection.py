"""When Python's cyclic garbage collector runs: in a thread of its own, which holds no lock.

By default it runs in whichever thread has just allocated an object, amid whatever that thread does, and so do the
finalizers of what it collects. LangChain's sync streams have long ones: one that was abandoned reports its end to its
callbacks, for which it submits work to a `ThreadPoolExecutor`. If the thread that collects is itself in `submit`, whose
lock is not reentrant, it waits for itself for ever: the service hung when this happened in the event loop's thread.
"""

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERVAL_S = 0.05
MIN_YOUNG = 700
"""New containers, fewer the freed ones, from which on the youngest generation is collected: CPython's own default."""

YOUNGER_PER_OLDER = 10
"""A generation is collected after so many collections of the next younger one: CPython's own default too."""

MAX_GROWTH = 64 << 20
"""Bytes that this process may grow by before all generations are collected. The collector by itself counts containers:
a few of them may hold texts of a hundred megabytes."""

MAX_FULL_SHARE = 0.02
"""The share of the time that collections of all generations may take, as the others wait meanwhile."""

MAX_OLD = 200_000
"""Containers of the oldest generation from which on its collection is postponed: it takes up to 0.7 µs for each, and
all other threads wait meanwhile. Requests that hold so many, chats of thousands of messages, mostly end soon."""

POSTPONED_BY_S = 5.0
MAX_POSTPONED_S = 600.0

THREAD_NAME = "garbage collection"


@contextmanager
def collect_in_own_thread(interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Within this context, garbage is collected by a thread of its own, and by no other unless it calls `gc.collect`.

    A finalizer that blocks for ever blocks that thread alone. It is not waited for at the end.

    Args:
        interval_s: How often the thread looks if there is something to collect.
    """
    is_over = threading.Event()
    was_enabled = gc.isenabled()
    gc.disable()
    threading.Thread(target=_collect_until, args=(is_over, interval_s), name=THREAD_NAME, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        if was_enabled:
            gc.enable()


def _collect_until(is_over: threading.Event, interval_s: float) -> None:
    num_since = [0, 0]  # collections of the youngest generation, and of the one after it, since an older one
    size, next_full, due_since = _resident_bytes(), 0.0, None
    while not is_over.wait(interval_s):
        now = time.monotonic()
        is_due = num_since[1] >= YOUNGER_PER_OLDER or _resident_bytes() - size > MAX_GROWTH
        if is_due and now >= next_full:
            due_since = due_since or now
            if len(gc.get_objects(2)) > MAX_OLD and now - due_since < MAX_POSTPONED_S:
                next_full = now + POSTPONED_BY_S
                continue
            gc.collect(2)
            ended = time.monotonic()
            size, next_full, due_since = _resident_bytes(), ended + (ended - now) / MAX_FULL_SHARE, None
            num_since = [0, 0]
        elif gc.get_count()[0] < MIN_YOUNG:
            continue
        elif num_since[0] < YOUNGER_PER_OLDER:
            gc.collect(0)
            num_since[0] += 1
        else:
            gc.collect(1)
            num_since = [0, num_since[1] + 1]


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say in a file."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
