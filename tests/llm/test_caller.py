from collections.abc import Iterator

import pytest

from llm import LLaMA3_LLM, ScriptedEngine
from llm.caller import Caller, current_caller
from llm.generation import Generation


def new_generation() -> Generation:
    return Generation(on_cancel=lambda generation: None)


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller()
    token = current_caller.set(caller)
    yield caller
    current_caller.reset(token)


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


def test_a_stream_that_nobody_reads_on_ends_with_its_caller(caller: Caller) -> None:
    engine = ScriptedEngine("a" * 5000, token_delay_s=0.01)
    engine.wait_until_ready(30)
    stream = LLaMA3_LLM(engine=engine).stream("Hi")
    next(stream)

    caller.end()

    assert len("".join(stream)) < 5000
    engine.close()


def test_each_caller_has_a_name_of_its_own() -> None:
    assert Caller().id != Caller().id
    assert Caller(id="a").id == "a"
