"""Preparing requests: large ones of a tenant one at a time, tenants in turn, and those that left are forgotten."""

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


async def test_large_requests_of_a_tenant_are_prepared_one_at_a_time_beside_those_of_others() -> None:
    preparation = Preparation()
    go_on = {name: threading.Event() for name in ("eve 1", "eve 2", "eve 3", "ada 1")}
    begun: list[str] = []

    def read(name: str) -> None:
        begun.append(name)
        assert go_on[name].wait(30)

    async with anyio.create_task_group() as tasks:
        for name in go_on:
            tasks.start_soon(partial(preparation.run, read, name, tenant=name[:3], size=LARGE))
            await anyio.sleep(0.01)
        await started(lambda: len(begun) == 2)
        await anyio.sleep(0.02)
        assert begun == ["eve 1", "ada 1"]
        for number in (1, 2):
            go_on[f"eve {number}"].set()
            await started(lambda: len(begun) == 2 + number)  # noqa: B023
            assert begun[-1] == f"eve {number + 1}"
        go_on["eve 3"].set()
        go_on["ada 1"].set()


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
