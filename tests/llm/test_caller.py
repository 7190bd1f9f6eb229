import threading
from collections.abc import Iterator

import pytest

from llm import LLaMA3_LLM, ScriptedEngine
from llm.caller import Caller, Report, current_caller
from llm.errors import DeadlineExceeded, GenerationFailed, ShuttingDown
from llm.generation import Chunk, FinishReason, Generation, Usage


def new_generation() -> Generation:
    return Generation(on_cancel=lambda generation: None, prompt_tokens=7)


def finish(generation: Generation) -> None:
    generation.deliver(Chunk("a", (1,), finish_reason=FinishReason.STOP, usage=Usage(7, 1, cached_tokens=4)))


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture
def caller(reports: list[Report]) -> Iterator[Caller]:
    caller = Caller(max_output_tokens=40, on_ended=reports.append)
    token = current_caller.set(caller)
    yield caller
    current_caller.reset(token)


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine("a" * 5000, token_delay_s=0.01)
    engine.wait_until_ready(30)
    yield engine
    engine.close()


def test_generations_end_with_their_caller() -> None:
    caller, generations = Caller(), [new_generation(), new_generation()]
    for generation in generations:
        caller.adopt(generation)

    caller.end()

    assert [generation.is_ended for generation in generations] == [True, True]


def test_what_is_submitted_for_a_caller_that_is_gone_ends_at_once() -> None:
    caller, generation = Caller(), new_generation()
    caller.end()

    caller.adopt(generation)

    assert generation.is_ended


def test_a_caller_does_not_hold_on_to_what_has_ended() -> None:
    caller, ended = Caller(), new_generation()
    caller.adopt(ended)
    ended.cancel()

    caller.adopt(new_generation())

    assert ended not in caller._generations


def test_a_stream_that_nobody_reads_on_ends_with_its_caller(caller: Caller, engine: ScriptedEngine) -> None:
    stream = LLaMA3_LLM(engine=engine).stream("Hi")
    next(stream)

    caller.end()

    assert len("".join(stream)) < 40


def test_a_stream_of_a_caller_that_ends_with_an_error_does_not_look_whole(
    caller: Caller, engine: ScriptedEngine
) -> None:
    stream = LLaMA3_LLM(engine=engine).stream("Hi")
    next(stream)

    caller.end(ShuttingDown("the service is being stopped"))

    with pytest.raises(ShuttingDown, match="being stopped"):
        list(stream)


def test_the_first_end_is_the_one_that_counts() -> None:
    caller, early, late = Caller(), new_generation(), new_generation()
    error = ShuttingDown("now")
    caller.adopt(early)

    caller.end(error)
    caller.end()
    caller.end(DeadlineExceeded("late"))
    caller.adopt(late)

    assert [early.error, late.error] == [error, error]


def test_a_caller_does_not_get_more_tokens_than_the_service_allows(caller: Caller, engine: ScriptedEngine) -> None:
    llm = LLaMA3_LLM(engine=engine)

    assert len(llm.invoke("Hi", max_tokens=1000)) == 40
    assert len(llm.invoke("Hi")) == 40
    assert len(llm.invoke("Hi", max_tokens=3)) == 3


def test_what_became_of_each_generation_is_reported() -> None:
    reports: list[Report] = []
    caller = Caller(on_ended=reports.append)
    finished, failed, running = new_generation(), new_generation(), new_generation()
    for generation in (finished, failed, running):
        caller.adopt(generation)
    error = GenerationFailed("broken")
    failed.fail(error)
    running.deliver(Chunk("ab", (1, 2)))
    finish(finished)
    assert reports == []

    caller.end()

    assert [(each.finish_reason, each.error) for each in reports] == [
        ("stop", None),
        ("error", error),
        ("cancelled", None),
    ]
    assert [(each.prompt_tokens, each.cached_tokens, each.completion_tokens) for each in reports] == [
        (7, 4, 1),
        (7, 0, 0),
        (7, 0, 2),
    ]
    assert all(each.timings.queued <= (each.timings.ended or 0) for each in reports)


def test_what_ends_with_an_error_is_reported_with_it() -> None:
    reports: list[Report] = []
    caller = Caller(on_ended=reports.append)
    error = ShuttingDown("now")
    caller.adopt(new_generation())

    caller.end(error)
    caller.adopt(new_generation())

    assert [(each.finish_reason, each.error) for each in reports] == [("error", error)] * 2


def test_a_document_of_many_generations_is_reported_as_it_proceeds() -> None:
    reports: list[Report] = []
    caller = Caller(on_ended=reports.append)

    for index in range(400):
        generation = new_generation()
        caller.adopt(generation)
        assert len(reports) == index
        finish(generation)

    caller.end()
    assert len(reports) == 400


def test_each_generation_is_reported_once_whoever_submits_and_ends_at_the_same_time() -> None:
    reports: list[Report] = []
    caller = Caller(on_ended=reports.append)
    generations = [new_generation() for _ in range(8 * 200)]
    together = threading.Barrier(8 + 1)

    def submit(first: int) -> None:
        together.wait()
        for generation in generations[first::8]:
            caller.adopt(generation)
            if first % 2:
                finish(generation)

    threads = [threading.Thread(target=submit, args=[first]) for first in range(8)]
    for thread in threads:
        thread.start()
    together.wait()
    caller.end()
    caller.end()
    for thread in threads:
        thread.join(30)

    assert {id(report.timings) for report in reports} == {id(generation.timings) for generation in generations}
    assert len(reports) == len(generations)


def test_when_a_caller_has_ended_no_report_is_still_on_its_way() -> None:
    reports: list[Report] = []
    is_reporting, may_go_on = threading.Event(), threading.Event()

    def take(report: Report) -> None:
        is_reporting.set()
        may_go_on.wait(10)
        reports.append(report)

    caller, ended = Caller(on_ended=take), new_generation()
    finish(ended)
    submitter = threading.Thread(target=caller.adopt, args=[ended])
    submitter.start()
    is_reporting.wait(10)
    threading.Timer(0.1, may_go_on.set).start()

    caller.end()

    assert len(reports) == 1
    submitter.join(10)


def test_an_engine_s_answers_are_reported_with_what_they_took(
    caller: Caller, engine: ScriptedEngine, reports: list[Report]
) -> None:
    llm = LLaMA3_LLM(engine=engine)

    llm.batch(["Hi", "Hello"], max_tokens=5)
    caller.end()

    assert [(each.finish_reason, each.completion_tokens) for each in reports] == [("length", 5)] * 2
    for timings in (report.timings for report in reports):
        assert timings.admitted is not None
        assert timings.first_token is not None
        assert timings.ended is not None
        assert timings.queued <= timings.admitted <= timings.first_token <= timings.ended
        assert len(timings.tokens) == 5


def test_each_caller_has_a_name_of_its_own() -> None:
    assert Caller().id != Caller().id
    first, second = (Caller(trace_id="a") for _ in range(2))
    assert first.trace_id == second.trace_id == "a"
    assert first.id != second.id, "a name that callers choose does not make two of them one"
