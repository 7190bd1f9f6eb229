"""Work in threads that ends with its task, and is shared fairly."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import pytest

from chains.cancellable import Scheduler, WorkCancelled, checkpoint, current_tenant, run_cancellable

name: ContextVar[str] = ContextVar("name", default="")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Endless:
    """Work without end, in steps that wait for permission."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.has_ended = threading.Event()

    def __call__(self) -> None:
        try:
            while True:
                self.num_steps += 1
                checkpoint()
        finally:
            self.has_ended.set()


async def test_it_returns_and_raises_what_the_function_does() -> None:
    assert await run_cancellable(divmod, 7, 2) == (3, 1)
    assert await run_cancellable(sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        await run_cancellable(divmod, 7, 0)


async def test_context_variables_go_with_it() -> None:
    name.set("ada")
    assert await run_cancellable(name.get) == "ada"


def test_a_checkpoint_elsewhere_does_nothing() -> None:
    checkpoint()


async def test_work_ends_at_the_next_checkpoint_after_its_task_was_cancelled() -> None:
    work = Endless()
    task = asyncio.create_task(run_cancellable(work))
    await until(lambda: work.num_steps > 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(work.has_ended.wait, 30)


async def test_a_cancelled_task_does_not_wait_for_a_thread_that_is_stuck() -> None:
    go_on = threading.Event()
    scheduler = Scheduler(1)
    task = asyncio.create_task(scheduler.run(go_on.wait, 30))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not go_on.is_set()
    go_on.set()
    assert await scheduler.run(int) == 0, "its permit is free again"


async def test_work_that_is_cancelled_before_it_has_a_permit_never_begins() -> None:
    go_on, begun = threading.Event(), threading.Event()
    scheduler = Scheduler(1)
    first = asyncio.create_task(scheduler.run(go_on.wait, 30))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(scheduler.run(begun.set))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    assert await first
    assert await scheduler.run(int) == 0
    assert not begun.is_set()


async def test_work_that_is_cancelled_in_a_full_queue_never_begins() -> None:
    go_on, begun = threading.Event(), threading.Event()
    scheduler = Scheduler(2, max_started=1)
    first = asyncio.create_task(scheduler.run(go_on.wait, 30))
    second = asyncio.create_task(scheduler.run(begun.set))
    third = asyncio.create_task(scheduler.run(int))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    assert await first
    assert await third == 0
    assert not begun.is_set()


@pytest.mark.parametrize("end", ["returns", "raises", "is cancelled", "is cancelled in the queue"])
async def test_what_work_was_given_is_freed_at_its_end_without_a_garbage_collection(end: str) -> None:
    class Text:
        """Stands for a large text."""

    given = Text()
    freed = weakref.ref(given)
    scheduler = Scheduler(2, max_started=1)
    go_on = threading.Event()

    def work(text: Text) -> Text:
        if end == "raises":
            raise ZeroDivisionError
        while end == "is cancelled":
            checkpoint()
        return text

    gc.disable()
    try:
        first = asyncio.create_task(scheduler.run(go_on.wait, 30))
        if end != "is cancelled in the queue":
            go_on.set()
            await first
        task = asyncio.create_task(scheduler.run(work, given))
        del given
        await asyncio.sleep(0.02)
        if end.startswith("is cancelled"):
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == end.startswith("is cancelled")
        assert task.cancelled() or isinstance(task.exception(), ZeroDivisionError) == (end == "raises")
        del task
        await until(lambda: freed() is None)
        go_on.set()
        await first
    finally:
        gc.enable()


async def test_short_work_does_not_wait_for_the_end_of_long_work() -> None:
    scheduler = Scheduler(1, slice_s=0.001)
    endless = [Endless() for _ in range(4)]
    long = [asyncio.create_task(scheduler.run(work)) for work in endless]
    await until(lambda: all(work.num_steps for work in endless))
    async with asyncio.timeout(30):
        assert await scheduler.run(int) == 0
        steps = [work.num_steps for work in endless]
        await until(lambda: all(work.num_steps > before for work, before in zip(endless, steps, strict=True)))
    for task in long:
        task.cancel()
    await asyncio.wait(long)
    assert all([await asyncio.to_thread(work.has_ended.wait, 30) for work in endless])


async def test_tenants_compute_in_round_robin_order_however_much_one_of_them_submits() -> None:
    scheduler = Scheduler(1)
    go_on = threading.Event()
    order: list[str] = []

    def work(tenant: str) -> Callable[[], None]:
        return lambda: order.append(tenant)

    first = asyncio.create_task(scheduler.run(go_on.wait, 30))
    await asyncio.sleep(0.01)
    many = [asyncio.create_task(scheduler.run(work("ada"), tenant="ada")) for _ in range(50)]
    await until(lambda: len(scheduler._waiting.get("ada", ())) == 16)
    token = current_tenant.set("bob")
    few = [asyncio.create_task(scheduler.run(work("bob"))) for _ in range(3)]
    current_tenant.reset(token)
    await until(lambda: len(scheduler._waiting.get("bob", ())) == 3)
    go_on.set()
    await asyncio.gather(first, *many, *few)
    assert order.count("ada") == 50
    assert order[:6].count("bob") == 3


async def test_an_iterator_is_read_in_threads_and_no_further_than_its_reader_wants() -> None:
    scheduler = Scheduler(1, slice_s=0.0)
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    items = scheduler.iterate(numbers())
    assert [await anext(items), await anext(items)] == [0, 1]
    assert len(read) < 4
    assert [item async for item in items] == [*range(2, 100)]


async def test_a_tenant_leaves_nothing_behind() -> None:
    scheduler = Scheduler(1, max_started=1)
    await asyncio.gather(*(scheduler.run(int, tenant=str(number % 3)) for number in range(30)))
    await until(lambda: not (scheduler._started or scheduler._queued or scheduler._waiting))


async def test_what_is_cancelled_cannot_be_caught_as_an_exception() -> None:
    assert not issubclass(WorkCancelled, Exception)


async def test_an_error_that_handlers_of_errors_would_miss_is_raised_as_an_exception() -> None:
    """Libraries in Rust raise their panics as BaseException: the server's handlers did not see them."""

    class PanicException(BaseException):
        """As pyo3 names it."""

    def work() -> None:
        raise PanicException("it says what it was given")

    with pytest.raises(RuntimeError, match=r"^work of a request failed: PanicException$") as failure:
        await run_cancellable(work)
    assert isinstance(failure.value.__cause__, PanicException)


async def test_a_scheduler_that_was_resized_runs_as_many_works_at_once() -> None:
    scheduler, go_on = Scheduler(1), threading.Event()
    scheduler.resize(2)
    waiting = asyncio.create_task(scheduler.run(go_on.wait, 30, tenant="eve"))
    assert await asyncio.wait_for(scheduler.run(len, "two", tenant="ada"), 10) == 3
    go_on.set()
    assert await waiting
