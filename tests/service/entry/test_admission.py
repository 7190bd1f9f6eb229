"""Places: who gets one, who is told to come back, and when all must go."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from llm import ScriptedEngine
from llm.caller import Caller
from llm.engine import Request
from llm.errors import EngineLoading, ShuttingDown
from llm.sampling import Sampling
from service.entry.admission import Admission
from service.entry.quota import LocalQuota, parse_rate
from service.errors import Refusal

SLOTS = 2


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    engine = ScriptedEngine("a long answer" * 100, max_slots=SLOTS, token_delay_s=0.005)
    engine.wait_until_ready()
    return engine


@pytest.fixture
def open_admission(engine: ScriptedEngine) -> Callable[..., Admission]:
    def build(
        *, rate: str = "", max_queue: int = 1, max_concurrent: int | None = None, has_keys: bool = False
    ) -> Admission:
        quota = LocalQuota(parse_rate(rate))
        return Admission(engine, quota, max_queue=max_queue, max_concurrent=max_concurrent, has_keys=has_keys)

    return build


async def enter(admission: Admission, stack: AsyncExitStack, owner: str = "", caller: Caller | None = None) -> Caller:
    caller = caller or Caller(owner=owner)
    await admission.count_call(caller.owner)
    await stack.enter_async_context(admission.place(caller, timeout_s=60))
    admission.start(caller)
    return caller


async def refused(admission: Admission, owner: str = "") -> Refusal:
    async with AsyncExitStack() as stack:
        with pytest.raises(Refusal) as caught:
            await enter(admission, stack, owner)
    assert int(caught.value.problem.headers["Retry-After"]) >= 1
    return caught.value


async def test_there_are_as_many_places_as_slots_and_queue(open_admission: Callable[..., Admission]) -> None:
    admission = open_admission(max_queue=1)
    async with AsyncExitStack() as stack:
        for _ in range(SLOTS + 1):
            await enter(admission, stack)
        refusal = await refused(admission)
        assert (refusal.problem.status, refusal.problem.kind) == (503, "queue_full")
        assert "3 requests run or wait already" in refusal.problem.message
        assert "SERVE_MAX_QUEUE" in refusal.problem.message
    assert admission.num_inside == 0
    async with AsyncExitStack() as stack:
        await enter(admission, stack)


async def test_a_place_that_was_free_when_the_call_was_counted_may_be_gone_when_the_body_was_read(
    open_admission: Callable[..., Admission],
) -> None:
    admission = open_admission(max_queue=0)
    for _ in range(SLOTS + 1):
        await admission.count_call("")
    async with AsyncExitStack() as stack:
        for _ in range(SLOTS):
            await stack.enter_async_context(admission.place(Caller(), timeout_s=60))
        with pytest.raises(Refusal):
            await stack.enter_async_context(admission.place(Caller(), timeout_s=60))
    assert admission.num_inside == 0


async def test_with_keys_none_can_take_more_than_half_of_the_places(open_admission: Callable[..., Admission]) -> None:
    admission = open_admission(max_queue=2, has_keys=True)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await enter(admission, stack, "ada")
        refusal = await refused(admission, "ada")
        assert (refusal.problem.status, refusal.problem.kind) == (429, "too_many_at_once")
        assert "2 requests running or waiting" in refusal.problem.message
        assert "SERVE_MAX_CONCURRENT" in refusal.problem.message
        await enter(admission, stack, "bob")
    async with AsyncExitStack() as stack:
        await enter(admission, stack, "ada")


async def test_a_key_has_no_more_places_than_it_may(open_admission: Callable[..., Admission]) -> None:
    admission = open_admission(max_queue=20, max_concurrent=1, has_keys=True)
    async with AsyncExitStack() as stack:
        await enter(admission, stack, "ada")
        assert (await refused(admission, "ada")).problem.kind == "too_many_at_once"
        assert admission.num_inside == 1, "who was refused holds no place"


async def test_who_calls_too_often_is_told_when_to_call_again(open_admission: Callable[..., Admission]) -> None:
    admission = open_admission(rate="2/hour")
    for _ in range(2):
        await admission.count_call("ada")
    refusal = await refused(admission, "ada")
    assert (refusal.problem.status, refusal.problem.kind) == (429, "rate_limited")
    assert "SERVE_RATE_LIMIT" in refusal.problem.message
    assert 1 <= int(refusal.problem.headers["Retry-After"]) <= 3600
    await admission.count_call("bob")


async def test_while_draining_nobody_is_let_in_and_those_inside_finish(
    open_admission: Callable[..., Admission],
) -> None:
    admission = open_admission()
    assert not admission.is_drained
    async with AsyncExitStack() as stack:
        await enter(admission, stack)
        admission.drain(60)
        assert admission.is_draining
        assert not admission.is_drained
        with pytest.raises(ShuttingDown):
            await admission.count_call("")
        with pytest.raises(ShuttingDown):
            await stack.enter_async_context(admission.place(Caller(), timeout_s=60))
    assert admission.is_drained


async def test_nobody_waits_for_a_body_that_was_half_sent_when_the_drain_began(
    open_admission: Callable[..., Admission],
) -> None:
    admission = open_admission()
    caller = Caller()
    async with admission.place(caller, timeout_s=60):
        admission.drain(60)
        assert admission.is_drained
        assert (admission.num_inside, admission.num_working) == (1, 0)
        with pytest.raises(ShuttingDown):
            admission.start(caller)


async def test_when_the_time_is_up_those_inside_are_told_so(
    open_admission: Callable[..., Admission], engine: ScriptedEngine
) -> None:
    admission = open_admission()
    async with AsyncExitStack() as stack:
        caller = await enter(admission, stack)
        generation = engine.generate(Request(prompt=(65,), sampling=Sampling(max_tokens=1000)))
        caller.adopt(generation)
        await anext(generation)
        admission.drain(0)
        assert admission.is_drained
        admission.end_all()
        with pytest.raises(ShuttingDown, match="was told to stop"):
            await generation.awhole()


async def test_who_leaves_ends_what_it_still_runs(
    open_admission: Callable[..., Admission], engine: ScriptedEngine
) -> None:
    async with AsyncExitStack() as stack:
        caller = await enter(open_admission(), stack)
        generation = engine.generate(Request(prompt=(65,), sampling=Sampling(max_tokens=1000)))
        caller.adopt(generation)
    assert generation.is_ended


async def test_a_place_is_given_back_though_its_request_is_cancelled(open_admission: Callable[..., Admission]) -> None:
    admission = open_admission(max_concurrent=1)
    is_in = asyncio.Event()

    @asynccontextmanager
    async def inside() -> AsyncIterator[None]:
        async with admission.place(Caller(owner="ada"), timeout_s=60):
            yield

    async def stay() -> None:
        async with inside():
            is_in.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(stay())
    await is_in.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert admission.num_inside == 0
    async with AsyncExitStack() as stack:
        await enter(admission, stack, "ada")


async def test_while_the_model_loads_nobody_is_let_in() -> None:
    admission = Admission(
        ScriptedEngine(load_delay_s=60), LocalQuota(None), max_queue=1, max_concurrent=None, has_keys=False
    )
    with pytest.raises(EngineLoading):
        await admission.count_call("")


async def test_retry_after_grows_with_how_slowly_places_become_free(
    open_admission: Callable[..., Admission], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("service.entry.admission.time.monotonic", lambda: now)

    async def retry_after(each_s: float) -> int:
        nonlocal now
        admission = open_admission(max_queue=4, max_concurrent=1)
        for _ in range(10):
            now += each_s
            async with AsyncExitStack() as stack:
                await enter(admission, stack)
        async with AsyncExitStack() as stack:
            await enter(admission, stack)
            return int((await refused(admission)).problem.headers["Retry-After"])

    assert await retry_after(0.01) == 1
    assert 3 <= await retry_after(1.0) <= 5
    assert await retry_after(1000.0) == 4, "who left long ago says nothing: a second each is assumed"
