"""Reading bodies: in time, within the budget, and counted before anything is made of them."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from fastapi import Request
from starlette.types import Message

from service.entry.body_reader import MAX_READING, MAX_VALUES, VALUE_BYTES, BodyReader
from service.errors import Refusal


def reader(**limits: Any) -> BodyReader:
    return BodyReader(**{"max_total": 1000, "timeout_s": 30, "idle_timeout_s": 30, "min_rate": 0, **limits})


def request(
    *pieces: bytes, wait_s: float = 0, ends: bool = True, headers: Sequence[tuple[bytes, bytes]] = ()
) -> Request:
    """A request whose body comes in these pieces, each after a wait; `ends` false: and then nothing more."""
    left = list(pieces)

    async def receive() -> Message:
        await anyio.sleep(wait_s)
        if not left and not ends:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": left.pop(0) if left else b"", "more_body": bool(left) or not ends}

    return Request({"type": "http", "method": "POST", "headers": list(headers)}, receive)


async def refused(bodies: BodyReader, asked: Request, *, max_body: int = 1000, tenant: str = "ada") -> Refusal:
    with pytest.raises(Refusal) as caught, anyio.fail_after(10):
        async with bodies.read(asked, max_body, tenant=tenant):
            pass
    return caught.value


async def test_a_body_comes_out_as_it_came_and_is_held_until_its_request_ends() -> None:
    bodies, size = reader(), 8 + VALUE_BYTES
    async with bodies.read(request(b'{"a"', b": 1}"), 100, tenant="ada") as body:
        assert (bytes(body.content), body.size, bodies.num_bytes) == (b'{"a": 1}', size, size)
        body.resize(500)
        assert bodies.num_bytes == 500
    assert bodies.num_bytes == 0


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"101")], [(b"content-length", b"9" * 5000)]])
async def test_a_body_that_is_too_large_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    problem = (await refused(reader(), request(b" " * 60, b" " * 41, headers=headers), max_body=100)).problem
    assert (problem.status, problem.kind) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("limits", "asked", "said"),
    [
        ({"idle_timeout_s": 0.05}, request(b"[", ends=False), "nothing came for 0.05 s (SERVE_IDLE_TIMEOUT_S)"),
        ({"timeout_s": 0.1}, request(*[b" "] * 99, wait_s=0.02), "it took more than 0.1 s (SERVE_BODY_TIMEOUT_S)"),
        (
            {"idle_timeout_s": 0.1, "min_rate": 1000},
            request(*[b" "] * 99, wait_s=0.02),
            "less than 1000 bytes per second (SERVE_MIN_BODY_RATE)",
        ),
    ],
)
async def test_a_slow_body_is_refused_by_its_own_deadlines(limits: dict[str, float], asked: Request, said: str) -> None:
    problem = (await refused(reader(**limits), asked)).problem
    assert (problem.status, problem.kind) == (408, "timeout")
    assert said in problem.message


async def test_a_body_at_the_minimum_rate_may_take_longer_than_the_idle_timeout() -> None:
    bodies = reader(max_total=2000, idle_timeout_s=0.2, min_rate=1000)
    async with bodies.read(request(*[b" " * 90] * 10, wait_s=0.05), 1000, tenant="ada") as body:
        assert body.size == 900


async def test_all_bodies_share_a_budget_of_which_a_tenant_has_half() -> None:
    bodies = reader(max_total=1000)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(bodies.read(request(b" " * 300), 1000, tenant="eve"))
        problem = (await refused(bodies, request(b" " * 201), tenant="eve")).problem
        assert (problem.status, problem.kind) == (503, "bodies_full")
        assert "500 bytes, half of SERVE_MAX_BODY_TOTAL" in problem.message
        assert int(problem.headers["Retry-After"]) >= 1
        body = await stack.enter_async_context(bodies.read(request(b" " * 450), 1000, tenant="ada"))
        assert (
            "1000 bytes (SERVE_MAX_BODY_TOTAL)"
            in (await refused(bodies, request(b" " * 251), tenant="bob")).problem.message
        )
        with pytest.raises(Refusal) as never:
            body.resize(501)  # a file was unpacked
        assert (never.value.problem.status, never.value.problem.kind) == (413, "body_too_large")
        assert "501 bytes of memory" in never.value.problem.message
    assert bodies.num_bytes == 0
    async with bodies.read(request(b" " * 500), 1000, tenant="eve"):
        pass


async def test_many_values_are_charged_by_the_memory_that_they_take() -> None:
    bodies = reader(max_total=100 * VALUE_BYTES)
    async with bodies.read(request(b"[" + b"1," * 39 + b"1]"), 1000, tenant="eve"):
        assert 40 * VALUE_BYTES < bodies.num_bytes < 41 * VALUE_BYTES
        problem = (await refused(bodies, request(b"[1,1,1,1,1,1,1,1,1,1,1]"), tenant="eve")).problem
        assert (problem.status, problem.kind) == (503, "bodies_full")
    problem = (await refused(bodies, request(b"[" + b"1," * 60 + b"1]"), tenant="eve")).problem
    assert (problem.status, problem.kind) == (413, "body_too_large")


async def test_slow_bodies_of_one_tenant_leave_room_for_those_of_others() -> None:
    bodies = reader()
    async with anyio.create_task_group() as others:

        async def drip() -> None:
            async with bodies.read(request(b"[", ends=False), 1000, tenant="eve"):
                pass

        for _ in range(MAX_READING // 8):
            others.start_soon(drip)
        await anyio.sleep(0.05)
        assert (await refused(bodies, request(b"[]"), tenant="eve")).problem.kind == "bodies_full"
        async with bodies.read(request(b"[]"), 1000, tenant="ada") as body:
            assert body.size == 2
        others.cancel_scope.cancel()
    assert bodies.num_bytes == 0
    async with bodies.read(request(b"[]"), 1000, tenant="eve"):
        pass


async def test_tenants_that_fill_the_budget_with_unfinished_bodies_make_room_for_one_that_holds_less() -> None:
    bodies, evicted = reader(max_total=1000), []
    async with anyio.create_task_group() as others:

        async def hold(tenant: str, size: int) -> None:
            evicted.append((tenant, size, await refused(bodies, request(b" " * size, ends=False), tenant=tenant)))

        for tenant, size in (("eve", 300), ("eve", 200), ("mallory", 250), ("mallory", 250)):
            others.start_soon(hold, tenant, size)
        await anyio.sleep(0.02)
        assert bodies.num_bytes == 1000
        async with bodies.read(request(b" " * 100), 1000, tenant="ada"):
            await anyio.sleep(0.02)
            ((tenant, size, refusal),) = evicted
            assert (tenant, size, refusal.problem.status, refusal.problem.kind) == ("eve", 300, 503, "bodies_full")
            assert "made room" in refusal.problem.message
            assert bodies.num_bytes == 800
            async with bodies.read(request(b" " * 200), 1000, tenant="ada"):
                # Eve has 200 bytes now, Mallory 500 and Ada 300: a third more for Ada would not be fairer.
                assert (await refused(bodies, request(b" " * 200), tenant="ada")).problem.kind == "bodies_full"
                assert (await refused(bodies, request(b" " * 1), tenant="mallory")).problem.kind == "bodies_full"
        assert len(evicted) == 1
        others.cancel_scope.cancel()
    assert bodies.num_bytes == 0


async def test_complete_bodies_are_not_given_up_for_others() -> None:
    bodies = reader(max_total=1000)
    async with (
        bodies.read(request(b" " * 500), 1000, tenant="eve"),
        bodies.read(request(b" " * 500), 1000, tenant="mallory"),
    ):
        assert (await refused(bodies, request(b" "), tenant="ada")).problem.kind == "bodies_full"
        assert bodies.num_bytes == 1000


async def test_many_tenants_with_unfinished_bodies_make_room_for_one_that_has_none() -> None:
    bodies, evicted = reader(max_total=1_000_000), []
    async with anyio.create_task_group() as others:

        async def hold(tenant: str, number: int) -> None:
            evicted.append((number, await refused(bodies, request(b" " * number, ends=False), tenant=tenant)))

        for tenant in range(8):
            for number in range(MAX_READING // 8):
                others.start_soon(hold, f"eve {tenant}", number + 1)
        await anyio.sleep(0.3)
        async with bodies.read(request(b"[]"), 1000, tenant="ada") as body:
            assert body.size == 2
        await anyio.sleep(0.02)
        ((number, refusal),) = evicted
        assert (number, refusal.problem.kind) == (1, "bodies_full")
        others.cancel_scope.cancel()
    assert bodies.num_bytes == 0


@pytest.mark.parametrize("value", ["[]", "{}", "1", '"a"', '{"a":[]}'])
async def test_a_body_with_too_many_values_is_refused_before_it_has_come(value: str) -> None:
    """A parser would make an object of each: 32 MB of `[]` took a gigabyte and held the event loop up for seconds."""
    piece, num_read = (value + ",").encode() * 1000, 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_read
        yield b"["
        while True:
            num_read += 1000
            yield piece

    pieces = endless()

    async def receive() -> Message:
        return {"type": "http.request", "body": await anext(pieces), "more_body": True}

    asked = Request({"type": "http", "method": "POST", "headers": []}, receive)
    problem = (await refused(reader(max_total=2**30), asked, max_body=2**30)).problem
    assert (problem.status, problem.kind, problem.field) == (400, "invalid_json", "body")
    assert f"{MAX_VALUES} values" in problem.message
    assert num_read <= MAX_VALUES + 1000


async def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    deep = json.dumps([]).replace("[]", "[" * 101 + "]" * 101).encode()
    assert "nested 100 deep" in (await refused(reader(), request(deep))).problem.message
    assert (await refused(reader(), request(b"[" * 900, ends=False))).problem.kind == "invalid_json"
