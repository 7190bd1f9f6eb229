import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm.errors import DeadlineExceeded, GenerationFailed, ShuttingDown
from llm.generation import Chunk, FinishReason, Generation, Usage, deliver


def new_generation() -> Generation:
    return Generation(on_cancel=lambda generation: None, prompt_tokens=3)


def last(text: str = "") -> Chunk:
    return Chunk(text, (2,), finish_reason=FinishReason.STOP, usage=Usage(3, 2))


def test_what_is_ready_at_once_leaves_as_one_chunk() -> None:
    generation = new_generation()
    generation.deliver(Chunk("a", (1,)))
    generation.deliver(last("b"))

    assert list(generation) == [Chunk("ab", (1, 2), finish_reason=FinishReason.STOP, usage=Usage(3, 2))]


def test_a_reader_waits_for_what_comes_from_another_thread() -> None:
    generation = new_generation()
    threading.Timer(0.05, generation.deliver, [Chunk("a", (1,))]).start()
    threading.Timer(0.1, generation.deliver, [last("b")]).start()

    assert [chunk.text for chunk in generation] == ["a", "b"]


async def test_an_async_reader_waits_for_what_comes_from_another_thread() -> None:
    generation = new_generation()
    threading.Timer(0.05, generation.deliver, [Chunk("a", (1,))]).start()
    threading.Timer(0.1, generation.deliver, [last("b")]).start()

    assert [chunk.text async for chunk in generation] == ["a", "b"]


def test_text_that_came_before_an_error_is_read_before_it_is_raised() -> None:
    generation = new_generation()
    generation.deliver(Chunk("a", (1,)))
    generation.fail(GenerationFailed("broken"))

    assert next(generation).text == "a"
    with pytest.raises(GenerationFailed, match="broken"):
        next(generation)


def test_cancelling_ends_a_waiting_reader_and_tells_the_engine_once() -> None:
    told: list[Generation] = []
    generation = Generation(on_cancel=told.append)
    threading.Timer(0.05, generation.cancel).start()

    chunks = list(generation)
    generation.cancel()

    assert [chunk.finish_reason for chunk in chunks] == [FinishReason.CANCELLED]
    assert told == [generation]


def test_who_is_aborted_reads_what_has_come_and_then_the_error_and_the_engine_is_told_once() -> None:
    told: list[Generation] = []
    generation = Generation(on_cancel=told.append)
    generation.deliver(Chunk("a", (1,)))

    generation.abort(ShuttingDown("now"))
    generation.abort(GenerationFailed("late"))
    generation.cancel()

    assert next(generation).text == "a"
    with pytest.raises(ShuttingDown, match="now"):
        next(generation)
    assert told == [generation]


async def test_aborting_ends_a_waiting_async_reader() -> None:
    generation = new_generation()
    threading.Timer(0.05, generation.abort, [ShuttingDown("now")]).start()

    with pytest.raises(ShuttingDown):
        await generation.awhole()


def test_what_became_of_it_is_told_though_nobody_reads_it() -> None:
    finished, cancelled, failed, waiting = (new_generation() for _ in range(4))
    for generation in (finished, cancelled, failed):
        generation.deliver(Chunk("abc", (1, 2, 3)))
        generation.deliver(Chunk("", (4,)))
        assert not generation.is_ended
    error = GenerationFailed("broken")

    finished.deliver(Chunk("d", (5,), finish_reason=FinishReason.LENGTH, usage=Usage(3, 5, cached_tokens=2)))
    cancelled.cancel()
    failed.fail(error)

    assert [(each.finish_reason, each.usage, each.error) for each in (finished, cancelled, failed, waiting)] == [
        (FinishReason.LENGTH, Usage(3, 5, cached_tokens=2), None),
        (FinishReason.CANCELLED, Usage(3, 4), None),
        (None, Usage(3, 4), error),
        (None, None, None),
    ]


def test_nothing_is_added_once_it_has_ended() -> None:
    generation = new_generation()
    generation.cancel()
    generation.deliver(Chunk("late", (1,)))
    generation.fail(GenerationFailed("late"))

    assert "".join(chunk.text for chunk in generation) == ""
    assert (generation.finish_reason, generation.error) == (FinishReason.CANCELLED, None)
    assert generation.usage == Usage(3, 0)
    assert generation.timings.tokens == []


async def test_a_cancelled_async_reader_can_be_followed_by_another() -> None:
    generation = new_generation()
    reader = asyncio.create_task(anext(generation))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    generation.deliver(last("a"))

    assert [chunk.text async for chunk in generation] == ["a"]


def test_a_reader_whose_event_loop_is_gone_does_not_trouble_the_engine() -> None:
    generation = new_generation()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.01)

    asyncio.run(give_up())

    generation.deliver(last("a"))
    assert next(generation).text == "a"


def test_timings_are_taken_in_order() -> None:
    generation = new_generation()
    timings = generation.timings
    assert (timings.first_token, timings.tokens) == (None, [])

    generation.deliver(Chunk("", (1,)))
    generation.deliver(Chunk("text that was held back"))
    generation.deliver(last())

    assert timings.ended is not None
    assert timings.first_token is not None
    assert len(timings.tokens) == 2
    moments = [timings.queued, timings.first_token, *timings.tokens, timings.ended]
    assert moments == sorted(moments)


def past(seconds: float = 0.05) -> float:
    return time.monotonic() + seconds


def test_a_reader_does_not_hang_when_the_engine_does() -> None:
    told: list[Generation] = []
    generation = Generation(told.append, deadline=past())

    with pytest.raises(DeadlineExceeded, match="not finished in time"):
        next(generation)
    assert told == [generation]


async def test_an_async_reader_does_not_hang_when_the_engine_does() -> None:
    generation = Generation(on_cancel=lambda generation: None, deadline=past())
    generation.deliver(Chunk("a", (1,)))

    assert (await anext(generation)).text == "a"
    with pytest.raises(DeadlineExceeded):
        await anext(generation)


def test_a_piece_costs_the_same_however_many_were_not_read_yet() -> None:
    generation = new_generation()
    started = time.monotonic()

    for index in range(100_000):
        generation.deliver(Chunk("a", (index,)))

    assert len(next(generation).token_ids) == 100_000
    assert time.monotonic() - started < 5


def test_the_whole_answer_is_read_at_once_with_what_ends_it() -> None:
    generation = new_generation()
    threading.Timer(0.02, generation.deliver, [Chunk("a", (1,))]).start()
    threading.Timer(0.04, generation.deliver, [last("b")]).start()

    assert generation.whole() == Chunk("ab", (1, 2), finish_reason=FinishReason.STOP, usage=Usage(3, 2))

    broken = new_generation()
    broken.deliver(Chunk("a", (1,)))
    broken.fail(GenerationFailed("broken"))
    with pytest.raises(GenerationFailed, match="broken"):
        broken.whole()


async def test_who_awaits_the_whole_answer_is_woken_for_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = new_generation()
    wakes = count_wakes(monkeypatch)
    reader = asyncio.create_task(generation.awhole())
    await asyncio.sleep(0)

    for index in range(10):
        generation.deliver(Chunk("a", (index,)))
    assert wakes == []
    generation.deliver(last("b"))

    assert (await reader).text == "aaaaaaaaaab"
    assert len(wakes) == 1


async def test_the_whole_answer_is_not_awaited_longer_than_its_deadline() -> None:
    generation = Generation(on_cancel=lambda generation: None, deadline=past())

    with pytest.raises(DeadlineExceeded):
        await generation.awhole()


async def test_an_event_loop_is_woken_once_for_all_that_a_step_made(monkeypatch: pytest.MonkeyPatch) -> None:
    generations = [new_generation() for _ in range(16)]
    wakes = count_wakes(monkeypatch)
    readers = [asyncio.create_task(anext(generation)) for generation in generations]
    await asyncio.sleep(0)

    for index in range(3):
        deliver((generation, Chunk("a", (index,))) for generation in generations)

    assert {chunk.text for chunk in await asyncio.gather(*readers)} == {"aaa"}
    assert len(wakes) == 1


def test_every_event_loop_is_woken_whose_readers_have_news() -> None:
    generations = [new_generation() for _ in range(4)]
    read: list[str] = []

    async def read_two(first: int) -> None:
        chunks = await asyncio.gather(*(anext(generation) for generation in generations[first : first + 2]))
        read.extend(chunk.text for chunk in chunks)

    threads = [threading.Thread(target=asyncio.run, args=[read_two(first)]) for first in (0, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    deliver((generation, Chunk("a", (1,))) for generation in generations)
    for thread in threads:
        thread.join(5)

    assert read == ["a"] * 4


def count_wakes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is done to wake the running event loop from now on."""
    loop, wakes = asyncio.get_running_loop(), list[object]()
    wake = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        wakes.append(callback)
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    return wakes
