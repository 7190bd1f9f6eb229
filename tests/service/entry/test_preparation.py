"""Preparing requests: large ones one at a time, tenants in round-robin order, and those that left are forgotten."""

import threading
from collections.abc import Callable
from functools import partial

import anyio
import pytest

from service.entry.preparation import LARGE, Preparation, TenantPermits


async def started(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def test_a_small_request_does_not_wait_for_large_ones() -> None:
    preparation, go_on = Preparation(), threading.Event()
    async with anyio.create_task_group() as others:
        for number in range(50):
            others.start_soon(partial(preparation.run, go_on.wait, 30, tenant=f"eve {number}", size=LARGE))
        with anyio.fail_after(5):
            assert await preparation.run(len, "Hi!", tenant="ada", size=3) == 3
        go_on.set()


async def test_large_requests_are_prepared_one_at_a_time_and_tenants_alternate() -> None:
    preparation = Preparation()
    go_on = threading.Semaphore(0)
    begun: list[str] = []

    def read(name: str) -> None:
        begun.append(name)
        assert go_on.acquire(timeout=30)

    async with anyio.create_task_group() as tasks:
        for name in ("eve 1", "eve 2", "eve 3", "ada 1"):
            tasks.start_soon(partial(preparation.run, read, name, tenant=name[:3], size=LARGE))
            await anyio.sleep(0.01)
        for number in range(1, 5):
            await started(lambda: len(begun) >= number)  # noqa: B023
            await anyio.sleep(0.02)
            assert len(begun) == number, "one at a time"
            go_on.release()
    assert begun == ["eve 1", "ada 1", "eve 2", "eve 3"]


async def test_a_cancelled_request_leaves_the_queue() -> None:
    preparation, go_on = Preparation(), threading.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(preparation.run, go_on.wait, 30, tenant="eve", size=LARGE))
        await anyio.sleep(0.05)
        with anyio.move_on_after(0.05):
            await preparation.run(len, "", tenant="eve", size=LARGE)
        go_on.set()
    with anyio.fail_after(5):
        assert await preparation.run(len, "", tenant="eve", size=LARGE) == 0


@pytest.mark.parametrize(("tenants", "at_once"), [("ada ada ada", 1), ("ada bob ada eve", 2)])
async def test_a_tenant_holds_one_permit_at_a_time(tenants: str, at_once: int) -> None:
    permits, running, most = TenantPermits(2), 0, 0

    async def take(tenant: str) -> None:
        nonlocal running, most
        async with permits.hold(tenant):
            running += 1
            most = max(most, running)
            await anyio.sleep(0.02)
            running -= 1

    async with anyio.create_task_group() as others:
        for tenant in tenants.split():
            others.start_soon(take, tenant)
    assert most == at_once


async def test_tenants_that_have_left_are_forgotten() -> None:
    permits = TenantPermits(2)
    for number in range(1000):
        async with permits.hold(f"203.0.113.{number}"):
            assert permits.num_tenants == 1
    assert permits.num_tenants == 0
