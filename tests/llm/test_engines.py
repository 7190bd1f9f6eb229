"""What every engine does, the scripted one and the real one alike."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.engine import Engine, EngineState, Request
from llm.errors import ContextOverflow, DeadlineExceeded, EngineDead, EngineLoading, InvalidOption, ShuttingDown
from llm.generation import Chunk, FinishReason, Generation
from llm.local_engine import LocalEngine
from llm.sampling import Sampling
from llm.scripted_engine import ScriptedEngine

SLOTS = 4


@pytest.fixture(scope="module")
def scripted() -> Iterator[Engine]:
    engine = ScriptedEngine("abcdefgh" * 1000, token_delay_s=0.002, max_slots=SLOTS)
    engine.wait_until_ready(60)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def local(tiny_llama3: Path) -> Iterator[Engine]:
    engine = LocalEngine(str(tiny_llama3), max_slots=SLOTS)
    engine.wait_until_ready(60)
    yield engine
    engine.close()


@pytest.fixture(params=["scripted", "local"])
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.getfixturevalue(request.param)
    return chosen


def ask(
    max_tokens: int | None = None,
    *,
    deadline: float | None = None,
    prompt: int = 10,
    max_output_tokens: int | None = None,
    **sampling: Any,
) -> Request:
    return Request(
        prompt=tuple(range(65, 65 + prompt)),
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        deadline=deadline,
        max_output_tokens=max_output_tokens,
    )


def whole(generation: Generation) -> Chunk:
    return sum(generation, Chunk())


def eventually(is_true: Callable[[], bool], within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def fill(engine: Engine) -> list[Generation]:
    """Take all slots, each with a long answer for a caller of its own."""
    generations = []
    for index in range(engine.health().slots):
        generations.append(engine.generate(ask()))
        eventually(lambda expected=index + 1: engine.health().running == expected)  # type: ignore[misc]
    return generations


def is_idle(engine: Engine) -> bool:
    health = engine.health()
    return (health.running, health.waiting) == (0, 0)


def test_a_request_is_answered_with_its_usage(engine: Engine) -> None:
    answer = whole(engine.generate(ask(5, temperature=0)))

    assert len(answer.token_ids) == 5
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 5)


def test_the_least_of_all_limits_ends_an_answer(engine: Engine) -> None:
    asked = [(None, 7), (9, 7), (5, 7), (5, None)]

    answers = [whole(engine.generate(ask(most, max_output_tokens=limit))) for most, limit in asked]

    assert [len(answer.token_ids) for answer in answers] == [7, 7, 5, 5]
    assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
    with pytest.raises(InvalidOption, match="max_output_tokens must be at least 1, got 0"):
        engine.generate(ask(max_output_tokens=0))


async def test_sync_and_async_readers_get_the_same(engine: Engine) -> None:
    request = ask(20, temperature=0)

    chunks = [chunk async for chunk in engine.generate(request)]

    assert sum(chunks, Chunk()) == whole(engine.generate(request))


def test_tokens_stream(engine: Engine) -> None:
    assert len(list(engine.generate(ask(30)))) > 1


def test_requests_are_generated_together(engine: Engine) -> None:
    generations = [engine.generate(ask(100)) for _ in range(3)]
    answers = [whole(generation) for generation in generations]

    assert [len(answer.token_ids) for answer in answers] == [100] * 3
    first_end = min(generation.timings.ended or 0 for generation in generations)
    assert all((generation.timings.first_token or first_end) < first_end for generation in generations)


def test_what_is_generated_does_not_depend_on_who_shares_the_batch(engine: Engine) -> None:
    requests = [ask(10 + 3 * index, prompt=5 + 11 * index, temperature=0) for index in range(SLOTS)]
    alone = [whole(engine.generate(request)).token_ids for request in requests]

    generations = [engine.generate(request) for request in requests]

    assert [whole(generation).token_ids for generation in generations] == alone


def test_prompts_are_counted(engine: Engine) -> None:
    before = engine.health()

    whole(engine.generate(ask(1, prompt=10)))

    after = engine.health()
    assert after.prompt_tokens - before.prompt_tokens == 10
    assert 0 <= after.cached_tokens - before.cached_tokens < 10


def test_requests_are_served_in_order(engine: Engine) -> None:
    generations = [engine.generate(ask(10)) for _ in range(SLOTS + 4)]

    for generation in generations:
        whole(generation)

    admitted = [generation.timings.admitted for generation in generations]
    assert admitted == sorted(admitted, key=lambda moment: moment or 0)


def test_a_waiting_request_leaves_the_queue_at_once_when_cancelled(engine: Engine) -> None:
    running = fill(engine)
    waiting = engine.generate(ask())
    assert engine.health().waiting == 1

    waiting.cancel()

    assert engine.health().waiting == 0
    assert whole(waiting).finish_reason is FinishReason.CANCELLED
    for generation in running:
        generation.cancel()
    eventually(lambda: is_idle(engine))


def test_a_running_request_ends_within_a_step_when_cancelled(engine: Engine) -> None:
    running = engine.generate(ask())
    next(running)

    running.cancel()

    eventually(lambda: is_idle(engine), within_s=1)
    assert whole(engine.generate(ask(1))).finish_reason is not None


def test_a_running_request_that_is_aborted_makes_room_for_one_that_waits(engine: Engine) -> None:
    first, *others = fill(engine)
    waiting = engine.generate(ask(1))

    first.abort(ShuttingDown("now"))

    assert whole(waiting).finish_reason is FinishReason.LENGTH
    assert first.usage is not None
    assert first.usage.prompt_tokens == 10
    for generation in others:
        generation.cancel()
    eventually(lambda: is_idle(engine))
    assert engine.health().memory_use == 0.0


def test_a_deadline_ends_a_running_request(engine: Engine) -> None:
    started = time.monotonic()

    with pytest.raises(DeadlineExceeded, match="not finished in time"):
        whole(engine.generate(ask(deadline=started + 0.2)))

    assert time.monotonic() - started < 2
    eventually(lambda: is_idle(engine))


def test_a_deadline_ends_a_waiting_request_while_others_run(engine: Engine) -> None:
    running = fill(engine)

    with pytest.raises(DeadlineExceeded):
        whole(engine.generate(ask(deadline=time.monotonic() + 0.1)))

    assert not any(generation.is_ended for generation in running)
    for generation in running:
        generation.cancel()
    eventually(lambda: is_idle(engine))


def test_a_prompt_and_answer_beyond_the_context_are_refused_with_the_numbers(engine: Engine) -> None:
    context = engine.checkpoint.context

    with pytest.raises(ContextOverflow, match=f"the prompt has {context} tokens; the context holds {context}"):
        engine.generate(Request(prompt=(65,) * context, sampling=Sampling()))
    with pytest.raises(ContextOverflow, match="max_tokens asks for 8190 more"):
        engine.generate(ask(8190))


def test_options_beyond_the_model_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidOption, match="top_k must be at most"):
        engine.generate(ask(top_k=engine.checkpoint.vocab_size + 1))
    with pytest.raises(InvalidOption, match="prompt must be at least one token"):
        engine.generate(ask(prompt=0))
    with pytest.raises(InvalidOption, match="prompt must be token ids from 0 to"):
        engine.generate(Request(prompt=(65, engine.checkpoint.vocab_size, 65), sampling=Sampling()))


def test_logprobs_come_with_every_token(engine: Engine) -> None:
    answer = whole(engine.generate(ask(4, logprobs=2)))

    assert [item.token_id for item in answer.logprobs] == list(answer.token_ids)


def test_a_stop_string_ends_the_answer_before_it(engine: Engine) -> None:
    unstopped = whole(engine.generate(ask(40, temperature=0)))
    stop = unstopped.text[3:5]

    answer = whole(engine.generate(ask(40, temperature=0, stop=(stop,))))

    assert answer.text == unstopped.text[: unstopped.text.index(stop)]
    assert answer.finish_reason is FinishReason.STOP


def test_callers_in_many_threads_all_get_their_answers(engine: Engine) -> None:
    answers: list[Chunk] = []

    def call() -> None:
        answers.append(whole(engine.generate(ask(3))))

    threads = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(answers) == 20


async def test_an_abandoned_async_reader_leaves_nothing_behind(engine: Engine) -> None:
    generation = engine.generate(ask())

    async def read() -> None:
        try:
            async for _ in generation:
                pass
        finally:
            generation.cancel()

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)

    await asyncio.to_thread(eventually, lambda: is_idle(engine), 1)


def test_health_tells_the_phases_of_a_life() -> None:
    engine = ScriptedEngine(load_delay_s=0.2, name="a model")
    assert engine.health().state is EngineState.LOADING
    with pytest.raises(EngineLoading, match="a model is still loading"):
        engine.generate(ask(1))

    engine.wait_until_ready(30)
    health = engine.health()
    assert (health.state, health.model, health.slots, health.context) == (EngineState.READY, "a model", 16, 8192)

    engine.close()
    assert engine.health().state is EngineState.DEAD
    with pytest.raises(EngineDead):
        engine.generate(ask(1))


def test_closing_ends_what_runs_and_what_waits() -> None:
    engine = ScriptedEngine("a" * 5000, token_delay_s=0.01, max_slots=1)
    engine.wait_until_ready(30)
    running, waiting = engine.generate(ask()), engine.generate(ask())
    next(running)

    engine.close()

    for generation in (running, waiting):
        with pytest.raises(EngineDead):
            whole(generation)


def test_a_model_that_cannot_be_had_says_why_in_health_and_to_who_waits(tmp_path: Path) -> None:
    from llm.errors import ModelError

    engine = LocalEngine(str(tmp_path / "nothing here"))

    with pytest.raises(ModelError):
        engine.wait_until_ready(60)
    assert engine.health().state is EngineState.DEAD
    assert "nothing here" in str(engine.health().error)
