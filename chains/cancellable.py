"""CPU work of requests in threads of its own: cancelled with the task that awaits it, and shared fairly.

A thread cannot be stopped from outside. So code that computes for long calls `checkpoint()` every few milliseconds.
There, work whose task was cancelled ends, and work whose time slice is used up lets others run first: tenants in
round-robin order, and the works of one tenant in the order in which they came. Knows no chain and no model.
"""

import asyncio
import contextvars
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

SLICE_S = 0.02
"""How long work runs before it lets others run, if any wait."""

MAX_STARTED = 16
"""Works of one tenant that may have a thread at once; its others wait in a queue."""

MAX_THREADS = 1024

current_tenant: ContextVar[str] = ContextVar("current_tenant", default="")
"""For which tenant the current code submits work. Set per request; inherited by tasks and threads."""


class WorkCancelled(BaseException):
    """Raised by `checkpoint()` in the thread, to end work that is no longer awaited.

    No `Exception`, so that code which catches those does not carry on.
    """


class _Work:
    """One call of a function, and whether it may run now.

    While it runs, it refers neither to the call nor to the result. Its context refers to the work, and so does an error
    by its frames: what the call was given would be freed by a garbage collection alone, which may come late.
    """

    def __init__(self, scheduler: "Scheduler", tenant: str, call: Callable[[], Any], result: "Future[Any]") -> None:
        self.scheduler = scheduler
        self.tenant = tenant
        self._job: tuple[Callable[[], Any], Future[Any]] | None = (call, result)
        self.is_cancelled = False
        self.has_permit = False
        self.may_run = threading.Event()
        self.slice_ends = 0.0

    def take(self) -> tuple[Callable[[], Any], Future[Any]]:
        """The call, and where its result belongs. Once."""
        assert self._job is not None
        job, self._job = self._job, None
        return job

    def drop(self) -> None:
        """Forget the call."""
        self._job = None


_current_work: ContextVar[_Work | None] = ContextVar("current_work", default=None)


def checkpoint() -> None:
    """End the current work if it was cancelled, and let others run if its time slice is used up.

    To be called in every loop that computes for long; cheap, and harmless outside of such work.
    """
    work = _current_work.get()
    if work is not None:
        work.scheduler.checkpoint(work)


class Scheduler:
    """Runs works in threads, of which only a few compute at any time. Serves any number of event loops."""

    def __init__(
        self,
        num_permits: int | None = None,
        *,
        slice_s: float = SLICE_S,
        max_started: int = MAX_STARTED,
        max_threads: int = MAX_THREADS,
    ) -> None:
        """Begin without threads: they start with the work.

        Args:
            num_permits: Works that compute at once; None: as many as there are CPUs for this process, at least two.
            slice_s: How long a work computes before it lets others compute.
            max_started: Works of one tenant that have a thread at once.
            max_threads: Of all tenants together.
        """
        self._slice_s = slice_s
        self._max_started = max_started
        self._max_threads = max_threads
        self._num_permits = num_permits or max(2, num_cpus())
        self._start_anew()

    def resize(self, num_permits: int) -> None:
        """Let so many works compute at once. Only before there is any work.

        Args:
            num_permits: As for the constructor.
        """
        self._num_permits = num_permits
        self._start_anew()

    def _start_anew(self) -> None:
        """Have no work and no threads. In a forked process, where the threads of its parent are not."""
        self._lock = threading.Lock()
        self._num_free = self._num_permits
        self._waiting: OrderedDict[str, deque[_Work]] = OrderedDict()  # for a permit; the next tenant's first
        self._started: dict[str, int] = {}
        self._queued: dict[str, deque[_Work]] = {}  # for a thread
        self._threads = ThreadPoolExecutor(self._max_threads, thread_name_prefix="request work")

    async def run(self, function: Callable[..., T], *arguments: Any, tenant: str | None = None, **named: Any) -> T:
        """Call a function in a thread, with the current context variables; if cancelled, do not wait for its end.

        Args:
            function: Calls `checkpoint()` if it computes for long.
            arguments: What to call it with.
            tenant: For whom; None: `current_tenant`.
            named: What to call it with.
        """
        context = contextvars.copy_context()
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()  # one that was cancelled could not take a result any more
        call = partial(context.run, function, *arguments, **named)
        work = _Work(self, current_tenant.get() if tenant is None else tenant, call, result)
        context.run(_current_work.set, work)
        self._submit(work)
        try:
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError:
            self._cancel(work)
            raise
        finally:
            del context, result, call, work  # an error refers to this frame

    async def iterate(self, items: Iterator[T], *, tenant: str | None = None) -> AsyncGenerator[T]:
        """Yield what an iterator yields, computed ahead in a thread by a time slice at most."""

        def some() -> tuple[list[T], bool]:
            taken: list[T] = []
            ends = time.monotonic() + self._slice_s
            for item in items:
                taken.append(item)
                if time.monotonic() >= ends:
                    return taken, False
                checkpoint()
            return taken, True

        is_done = False
        while not is_done:
            taken, is_done = await self.run(some, tenant=tenant)
            for item in taken:
                yield item

    def checkpoint(self, work: _Work) -> None:
        """See the function of that name."""
        if work.is_cancelled:
            raise WorkCancelled
        if time.monotonic() < work.slice_ends:
            return
        with self._lock:
            if not self._waiting:
                work.slice_ends = time.monotonic() + self._slice_s
                return
            self._give_back(work)
            self._ask(work)
        self._wait(work)

    def _submit(self, work: _Work) -> None:
        with self._lock:
            if self._started.get(work.tenant, 0) >= self._max_started:
                self._queued.setdefault(work.tenant, deque()).append(work)
                return
            self._start(work)

    def _start(self, work: _Work) -> None:
        self._started[work.tenant] = self._started.get(work.tenant, 0) + 1
        self._threads.submit(self._run, work)

    def _run(self, work: _Work) -> None:
        """What a thread does."""
        call, result = work.take()
        try:
            with self._lock:
                self._ask(work)
            self._wait(work)
            result.set_result(call())
        except BaseException as error:  # raised where the work is awaited
            result.set_exception(_catchable(error))
        finally:
            with self._lock:
                self._give_back(work)
                self._end(work)
            del work, call, result  # an error refers to this frame

    def _end(self, work: _Work) -> None:
        """Let the next of the tenant's works have the thread."""
        self._started[work.tenant] -= 1
        queued = self._queued.get(work.tenant)
        if queued:
            self._start(queued.popleft())
        if not queued:
            self._queued.pop(work.tenant, None)
        if not self._started[work.tenant]:
            del self._started[work.tenant]

    def _ask(self, work: _Work) -> None:
        """Get a permit, or join the queue for one."""
        work.may_run.clear()
        if work.is_cancelled:
            work.may_run.set()
        elif self._num_free and not self._waiting:
            self._num_free -= 1
            self._permit(work)
        else:
            self._waiting.setdefault(work.tenant, deque()).append(work)

    def _permit(self, work: _Work) -> None:
        work.has_permit = True
        work.slice_ends = time.monotonic() + self._slice_s
        work.may_run.set()

    def _give_back(self, work: _Work) -> None:
        """Hand the permit to the next tenant, whose others then have to wait until all tenants had one."""
        if not work.has_permit:
            return
        work.has_permit = False
        if not self._waiting:
            self._num_free += 1
            return
        tenant, works = self._waiting.popitem(last=False)
        following = works.popleft()
        if works:
            self._waiting[tenant] = works
        self._permit(following)

    def _wait(self, work: _Work) -> None:
        work.may_run.wait()
        if work.is_cancelled:
            raise WorkCancelled

    def _cancel(self, work: _Work) -> None:
        with self._lock:
            work.is_cancelled = True
            for queue in (self._waiting, self._queued):
                works = queue.get(work.tenant)
                if works and work in works:
                    works.remove(work)
                    if not works:
                        del queue[work.tenant]
                    if queue is self._queued:
                        work.drop()
            work.may_run.set()  # to find out that it was cancelled


def _catchable(error: BaseException) -> BaseException:
    """Make an Exception of an error that no handler expects, such as the panic of a library that is written in Rust."""
    if isinstance(error, Exception | WorkCancelled | KeyboardInterrupt | SystemExit):
        return error
    failure = RuntimeError(f"work of a request failed: {type(error).__name__}")
    failure.__cause__ = error
    return failure


def num_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_scheduler = Scheduler()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_scheduler._start_anew)


def limit_cpus(num_cpus: int) -> None:
    """Use so many CPUs for the work of requests, and two threads at least. To be called before there is any work."""
    _scheduler.resize(max(2, num_cpus))


async def run_cancellable(function: Callable[..., T], *arguments: Any, tenant: str | None = None, **named: Any) -> T:
    """`Scheduler.run`, by the scheduler of this process."""
    return await _scheduler.run(function, *arguments, tenant=tenant, **named)


def iterate_cancellable(items: Iterator[T], *, tenant: str | None = None) -> AsyncGenerator[T]:
    """`Scheduler.iterate`, by the scheduler of this process."""
    return _scheduler.iterate(items, tenant=tenant)
