"""The engine's loop, over a runner that records what it is told to do, and refuses what it must never be told."""

import asyncio
import gc
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llm.batching_engine import MAX_RESTARTS, BatchingEngine
from llm.checkpoint import Checkpoint
from llm.engine import EngineState, Request
from llm.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineRestarted,
    GenerationFailed,
    LLMError,
    OutOfDeviceMemory,
)
from llm.generation import Chunk, FinishReason, Generation, Token
from llm.job import Job
from llm.sampling import Sampling
from llm.schedule import Schedule
from llm.scripted_engine import byte_tokenizer

CHUNK = 2
"""Prompt tokens that the fake reads in one step."""

CHECKPOINT = Checkpoint("fake", byte_tokenizer(), context=1000, vocab_size=256, stop_ids=frozenset({255}), defaults={})


class FakeSequence:
    """The first token of its prompt is its name; what it says depends on that, and on how much it has said."""

    def __init__(self, request: Request) -> None:
        self.name = request.prompt[0]
        self.num_prompt = len(request.prompt)
        self.num_cached = 0
        self.num_read = 0
        self.num_made = 0
        self.room = 0

    @property
    def num_to_read(self) -> int:
        return max(0, min(CHUNK, self.num_prompt - 1 - self.num_read))


def answer(name: int, num_tokens: int) -> tuple[int, ...]:
    return tuple((name * 7 + index * 3) % 200 for index in range(num_tokens))


class FakeRunner:
    def __init__(self, *, slots: int = 4, memory: float = math.inf, step_s: float = 0) -> None:
        self.checkpoint = CHECKPOINT
        self.slots = slots
        self.memory = self.free = memory
        self.step_s = step_s
        self.acts: list[str] = []
        """What it was told, in order."""
        self.on: dict[str, Callable[[], object]] = {}
        """What happens when it is told something the first time: a neighbour comes or goes, or an error."""
        self.rows: dict[int, LLMError] = {}
        """Errors of single rows, by name."""
        self.num_admitted = 0
        self.num_resumed = 0
        self.budget = CHUNK

    def _act(self, what: str, *sequences: FakeSequence) -> None:
        assert threading.current_thread().name == "engine fake", "torch is used in one thread"
        act = " ".join([what, *(chr(sequence.name) for sequence in sequences)])
        self.acts.append(act)
        for trigger in (act, what):
            if trigger in self.on:
                self.on.pop(trigger)()

    def open(self, request: Request) -> FakeSequence:
        self._act("open")
        return FakeSequence(request)

    @property
    def prefill_budget(self) -> int:
        """Asked for once between two steps."""
        self.budget = CHUNK
        return CHUNK

    @property
    def memory_use(self) -> float:
        return 0.0 if math.isinf(self.memory) else 1 - self.free / self.memory

    def admit(self, sequence: FakeSequence) -> bool:
        assert sequence.room == 0
        needed = sequence.num_prompt + sequence.num_made
        self._act("admit" if needed <= self.free else "refuse", sequence)
        if needed > self.free:
            return False
        sequence.room = needed
        self.free -= needed
        self.num_admitted += 1
        self.num_resumed += sequence.num_made > 0
        assert self.num_admitted <= self.slots
        return True

    def prefill(self, sequence: FakeSequence) -> None:
        assert sequence.room
        assert 0 < sequence.num_to_read <= self.budget
        self.budget -= sequence.num_to_read
        self._act("prefill", sequence)
        sequence.num_read = min(sequence.num_read + CHUNK, sequence.num_prompt - 1)

    def grow(self, sequence: FakeSequence) -> bool:
        assert sequence.num_to_read == 0
        assert sequence.room == sequence.num_prompt + sequence.num_made
        if self.free < 1:
            self._act("full", sequence)
            return False
        sequence.room += 1
        self.free -= 1
        return True

    def decode(self, sequences: list[FakeSequence]) -> list[Token | LLMError]:
        assert all(sequence.room == sequence.num_prompt + sequence.num_made + 1 for sequence in sequences)
        self._act("decode", *sequences)
        if self.step_s:
            time.sleep(self.step_s)
        made: list[Token | LLMError] = []
        for sequence in sequences:
            sequence.num_made += 1
            token = Token(answer(sequence.name, sequence.num_made)[-1])
            made.append(self.rows.get(sequence.name, token))
        return made

    def release(self, sequence: FakeSequence) -> None:
        assert sequence.room
        self._act("release", sequence)
        self.free += sequence.room
        sequence.room = 0
        self.num_admitted -= 1

    def reset(self) -> None:
        self._act("reset")
        self.num_admitted = 0
        self.free = self.memory

    def close(self) -> None:
        self._act("close")

    @property
    def steps(self) -> list[str]:
        """What it was told to compute."""
        return [act for act in self.acts if act.startswith(("prefill", "decode"))]


Engine = BatchingEngine[FakeSequence]
Start = Callable[[FakeRunner], Engine]


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def start(runner: FakeRunner) -> Engine:
        engine: Engine = BatchingEngine("fake", lambda: runner)
        engine.wait_until_ready(10)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


def ask(
    name: str, *, prompt: int = 1, max_tokens: int = 4, caller: str = "", deadline_s: float | None = None
) -> Request:
    return Request(
        prompt=(ord(name),) * prompt,
        sampling=Sampling(max_tokens=max_tokens),
        caller=caller,
        deadline=None if deadline_s is None else time.monotonic() + deadline_s,
    )


def submit(engine: Engine, *requests: Request) -> list[Generation]:
    """Submit all before the engine can look at the first."""
    with engine._changed:
        return [engine.generate(request) for request in requests]


def eventually(is_true: Callable[[], bool], within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def load_of(engine: Engine) -> tuple[int, int]:
    health = engine.health()
    return health.running, health.waiting


def raiser(error: BaseException) -> Callable[[], None]:
    def throw() -> None:
        raise error

    return throw


# Joining, leaving, and whose step it is.


def test_requests_join_and_leave_at_every_step(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    late: list[Generation] = []
    runner.on["decode a b"] = lambda: late.append(engine.generate(ask("c", max_tokens=2)))

    a, b = submit(engine, ask("a", max_tokens=4), ask("b", max_tokens=2))

    assert a.whole().token_ids == answer(ord("a"), 4)
    assert b.whole().token_ids == answer(ord("b"), 2)
    assert late[0].whole().token_ids == answer(ord("c"), 2)
    assert runner.steps == ["decode a b", "decode a b c", "decode a c", "decode a"]


def test_prompts_are_read_in_turns_between_the_steps_of_those_that_decode(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)

    generations = submit(engine, ask("l", prompt=9, max_tokens=1), ask("s", prompt=3, max_tokens=3))
    for generation in generations:
        generation.whole()

    assert runner.steps == [
        "prefill l",
        "prefill s",
        "decode s",
        "prefill l",
        "decode s",
        "prefill l",
        "decode s",
        "prefill l",
        "decode l",
    ]


def test_a_newcomer_with_a_short_prompt_waits_for_one_piece_of_each_long_one_at_most(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    late: list[Generation] = []
    runner.on["prefill y"] = lambda: late.append(engine.generate(ask("s", prompt=2, max_tokens=1)))

    long = submit(engine, ask("x", prompt=40, max_tokens=1), ask("y", prompt=40, max_tokens=1))
    for generation in long:
        generation.whole()

    assert late[0].whole().finish_reason is FinishReason.LENGTH
    assert runner.steps[:5] == ["prefill x", "prefill y", "prefill x", "prefill y", "prefill s"]


def test_however_many_prompts_a_caller_has_it_reads_no_more_than_another_with_one(start: Start) -> None:
    runner = FakeRunner(slots=4)
    engine = start(runner)
    asked = [("a", "book"), ("b", "book"), ("c", "book"), ("x", "chat")]

    for generation in submit(engine, *(ask(name, prompt=9, max_tokens=1, caller=caller) for name, caller in asked)):
        generation.whole()

    pieces = [act for act in runner.acts if act.startswith("prefill")]
    assert pieces == ["prefill x", "prefill a"] * 4 + ["prefill b"] * 4 + ["prefill c"] * 4


def test_between_two_steps_as_much_is_read_of_short_prompts_as_of_a_long_one(start: Start) -> None:
    """A long one that does not fit beside them keeps its turn."""
    runner = FakeRunner(slots=5)
    engine = start(runner)
    prompts = {"a": 2, "b": 2, "l": 3, "c": 2, "d": 2}

    for generation in submit(engine, *(ask(name, prompt=size, max_tokens=1) for name, size in prompts.items())):
        generation.whole()

    assert runner.steps == [
        *("prefill a", "prefill b", "decode a b"),
        *("prefill l", "decode l"),
        *("prefill c", "prefill d", "decode c d"),
    ]


def test_a_prompt_of_one_token_needs_no_prefill(start: Start) -> None:
    runner = FakeRunner()
    start(runner).generate(ask("a", max_tokens=1)).whole()

    assert runner.acts[:4] == ["open", "admit a", "decode a", "release a"]


def test_callers_take_turns_and_come_first_within_each_as_they_came(start: Start) -> None:
    runner = FakeRunner(slots=1)
    engine = start(runner)
    asked = [("a", "book"), ("b", "book"), ("c", "book"), ("d", "chat"), ("e", ""), ("f", "")]

    for generation in submit(engine, *(ask(name, caller=caller) for name, caller in asked)):
        generation.whole()

    admitted = [act for act in runner.acts if act.startswith("admit")]
    assert admitted == ["admit a", "admit d", "admit e", "admit f", "admit b", "admit c"]


# Slots: a fan-out does not hold up somebody's chat.


def test_a_caller_without_a_slot_gets_one_of_the_caller_that_has_the_most(start: Start) -> None:
    runner = FakeRunner(slots=3)
    engine = start(runner)
    chat: list[Generation] = []
    runner.on["decode a b c"] = lambda: chat.append(engine.generate(ask("x", max_tokens=2, caller="chat")))

    book = submit(engine, *(ask(name, max_tokens=6, caller="book") for name in "abcd"))

    assert [generation.whole().token_ids for generation in book] == [answer(ord(name), 6) for name in "abcd"]
    assert chat[0].whole().token_ids == answer(ord("x"), 2)
    assert runner.steps[:4] == ["decode a b c", "decode a b x", "decode a b x", "decode a b c"], "c goes on before d"
    assert (engine.health().preemptions, engine.health().restarts) == (1, 0)


def test_a_caller_with_one_slot_keeps_it(start: Start) -> None:
    runner = FakeRunner(slots=2)
    engine = start(runner)

    generations = submit(engine, *(ask(name, caller=name) for name in "abcd"), ask("e", caller="a"))
    for generation in generations:
        generation.whole()

    assert [act for act in runner.acts if act.startswith("release")] == [f"release {name}" for name in "abcde"]


def test_each_newcomer_costs_at_most_one_pause(start: Start) -> None:
    runner = FakeRunner(slots=4, step_s=0.001)
    engine = start(runner)

    book = submit(engine, *(ask(chr(100 + index), max_tokens=20, caller="book") for index in range(20)))
    chats = []
    for index in range(40):
        chats.append(engine.generate(ask(chr(40 + index), max_tokens=3, caller=f"chat {index}")))
        time.sleep(0.002)

    for generation in [*book, *chats]:
        assert generation.whole().finish_reason is FinishReason.LENGTH
    assert 0 < sum(act.startswith("admit") for act in runner.acts) - 60 <= 40


# Memory.


def test_when_memory_runs_out_the_youngest_waits_and_then_goes_on_exactly_where_it_was(start: Start) -> None:
    runner = FakeRunner(memory=12)
    engine = start(runner)

    a, b = submit(engine, ask("a", prompt=2, max_tokens=9), ask("b", prompt=2, max_tokens=9))

    assert a.whole().token_ids == answer(ord("a"), 9)
    assert b.whole().token_ids == answer(ord("b"), 9)
    assert runner.acts.count("admit b") == 2, "it was paused once, and not tried before another had left"
    assert runner.acts.index("release a") < len(runner.acts) - runner.acts[::-1].index("admit b")
    assert engine.health().preemptions == 1
    assert runner.free == 12


def test_health_tells_what_part_of_the_memory_is_held(start: Start) -> None:
    runner = FakeRunner(memory=40)
    engine = start(runner)
    seen: list[float] = []
    for step in ("prefill a", "decode a b", "decode b"):
        runner.on[step] = lambda: seen.append(engine.health().memory_use)

    a, b = submit(engine, ask("a", prompt=5, max_tokens=2), ask("b", prompt=5, max_tokens=4))
    a.whole()
    b.whole()

    assert seen == pytest.approx([10 / 40, 11 / 40, 6 / 40]), "as each of these steps began"
    assert engine.health().memory_use == 0.0


def test_after_the_loop_has_broken_and_after_the_end_nobody_holds_memory(start: Start) -> None:
    runner = FakeRunner(memory=20)
    engine = start(runner)
    runner.on["full"] = raiser(RuntimeError("broken"))
    runner.on["prefill b"] = raiser(EngineDead("over"))

    with pytest.raises(EngineRestarted):
        engine.generate(ask("a", max_tokens=30)).whole()
    assert engine.health().memory_use == 0.0

    with pytest.raises(EngineDead):
        engine.generate(ask("b", prompt=3)).whole()
    assert engine.health().memory_use == 0.0


def test_who_waits_for_memory_is_of_the_caller_that_has_the_most(start: Start) -> None:
    runner = FakeRunner(memory=16)
    engine = start(runner)

    callers = {"a": "book", "b": "book", "x": "chat"}

    for generation in submit(engine, *(ask(name, max_tokens=7, caller=caller) for name, caller in callers.items())):
        assert len(generation.whole().token_ids) == 7
    assert [runner.acts.count(f"admit {name}") for name in "abx"] == [1, 2, 1]


def test_a_request_that_outgrows_the_whole_memory_fails_alone(start: Start) -> None:
    runner = FakeRunner(memory=6)
    engine = start(runner)
    generation = engine.generate(ask("a", prompt=3, max_tokens=9))

    with pytest.raises(OutOfDeviceMemory, match="no room for the 6 tokens of this request"):
        generation.whole()

    assert engine.generate(ask("b")).whole().token_ids == answer(ord("b"), 4)


def test_a_prompt_larger_than_the_whole_memory_fails_and_does_not_block_the_queue(start: Start) -> None:
    engine = start(FakeRunner(memory=6))
    large, small = submit(engine, ask("a", prompt=7), ask("b"))

    with pytest.raises(OutOfDeviceMemory, match="7 tokens"):
        large.whole()
    assert small.whole().token_ids == answer(ord("b"), 4)


def test_a_request_that_does_not_fit_now_is_not_overtaken(start: Start) -> None:
    runner = FakeRunner(memory=14)
    engine = start(runner)

    generations = submit(
        engine, ask("a", prompt=4), ask("l", prompt=11, max_tokens=1), ask("s", prompt=1, max_tokens=1)
    )
    for generation in generations:
        generation.whole()

    tried = [act for act in runner.acts if act.startswith(("admit", "refuse"))]
    assert tried == ["admit a", "refuse l", "admit l", "admit s"]


def test_when_who_did_not_fit_is_cancelled_the_next_is_tried_at_once(start: Start) -> None:
    runner = FakeRunner(memory=40, step_s=0.001)
    engine = start(runner)
    running, large, small = submit(
        engine, ask("a", prompt=4, max_tokens=30), ask("l", prompt=38), ask("s", max_tokens=2)
    )
    eventually(lambda: "refuse l" in runner.acts)

    large.cancel()

    assert small.whole().token_ids == answer(ord("s"), 2)
    assert not running.is_ended
    assert runner.acts.count("refuse l") == 1, "it was not tried at every step"


def test_a_caller_without_a_slot_gets_memory_of_the_caller_that_has_the_most(start: Start) -> None:
    runner = FakeRunner(memory=30)
    engine = start(runner)
    chat: list[Generation] = []
    runner.on["decode a"] = lambda: chat.append(engine.generate(ask("x", prompt=9, max_tokens=2, caller="chat")))

    book = submit(engine, *(ask(name, prompt=11, max_tokens=4, caller="book") for name in "ab"))

    assert [generation.whole().token_ids for generation in book] == [answer(ord(name), 4) for name in "ab"]
    assert chat[0].whole().token_ids == answer(ord("x"), 2)
    assert runner.acts.index("release b") < runner.acts.index("admit x") < runner.acts.index("release a")


# Cancelling and deadlines.


def test_who_is_cancelled_while_its_prompt_is_read_is_not_computed_any_more(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)

    with engine._changed:
        generation = engine.generate(ask("a", prompt=50))
        runner.on["prefill a"] = generation.cancel
    eventually(lambda: load_of(engine) == (0, 0))

    assert runner.acts == ["open", "admit a", "prefill a", "release a"]


def test_who_is_cancelled_by_the_step_before_is_in_no_other(start: Start) -> None:
    """After a prompt's step comes a decode step, which must not have those that were cancelled meanwhile."""
    runner = FakeRunner()
    engine = start(runner)

    def leave() -> None:
        a.cancel()
        long.cancel()

    with engine._changed:
        a, b = engine.generate(ask("a", max_tokens=2)), engine.generate(ask("b", max_tokens=2))
        long = engine.generate(ask("l", prompt=3))
        runner.on["prefill l"] = leave
    b.whole()
    eventually(lambda: load_of(engine) == (0, 0))

    assert runner.steps == ["prefill l", "decode b", "decode b"]
    assert runner.acts.index("release a") < runner.acts.index("decode b")


def test_who_is_cancelled_while_it_decodes_makes_no_other_token(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)

    with engine._changed:
        generation = engine.generate(ask("a", max_tokens=900))
        runner.on["decode a"] = generation.cancel
    eventually(lambda: load_of(engine) == (0, 0))

    assert runner.steps == ["decode a"]
    assert runner.acts[-1] == "release a"


def test_who_is_cancelled_while_it_is_admitted_is_released(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)

    with engine._changed:
        generation = engine.generate(ask("a"))
        runner.on["admit a"] = generation.cancel
    eventually(lambda: "release a" in runner.acts)

    assert runner.steps == []
    assert load_of(engine) == (0, 0)


def test_who_is_cancelled_while_it_is_paused_does_not_wait_for_ever(start: Start) -> None:
    runner = FakeRunner(slots=2)
    engine = start(runner)
    runner.on["decode a b"] = lambda: engine.generate(ask("x", max_tokens=1, caller="chat"))

    with engine._changed:
        a, b = (engine.generate(ask(name, max_tokens=5, caller="book")) for name in "ab")
        runner.on["release b"] = b.cancel
    a.whole()
    eventually(lambda: load_of(engine) == (0, 0))

    assert runner.acts.count("admit b") == 1


def test_who_waits_leaves_the_queue_at_once_when_cancelled(start: Start) -> None:
    engine = start(FakeRunner(slots=1))
    running = engine.generate(ask("a", max_tokens=900))
    next(running)
    waiting = [engine.generate(ask("b", caller="book")) for _ in range(3)]

    waiting[1].cancel()

    assert engine.health().waiting == 2
    for generation in (running, *waiting):
        generation.cancel()


@pytest.mark.parametrize("phase", ["queued", "prefill a", "decode a"])
def test_a_deadline_ends_a_request_in_every_phase_though_nobody_reads_it(start: Start, phase: str) -> None:
    runner = FakeRunner(slots=1)
    engine = start(runner)
    other = None
    if phase == "queued":
        other = engine.generate(ask("o", max_tokens=900))
        runner.on["decode"] = lambda: time.sleep(0.1)
    else:
        runner.on[phase] = lambda: time.sleep(0.1)

    generation = engine.generate(ask("a", prompt=100, max_tokens=800, deadline_s=0.05))
    eventually(lambda: generation.is_ended, within_s=1)

    with pytest.raises(DeadlineExceeded, match="not finished in time"):
        generation.whole()
    if other is not None:
        assert not other.is_ended
        other.cancel()
    eventually(lambda: load_of(engine) == (0, 0))
    assert runner.num_admitted == 0


def test_deadlines_are_not_looked_through_at_every_step_when_one_has_passed() -> None:
    schedule: Schedule[FakeSequence] = Schedule()
    for index in range(10_000):
        request = ask("a", deadline_s=-1 if index == 0 else 100)
        schedule.add(Job(request, CHECKPOINT, Generation(schedule.forget, deadline=request.deadline), index))
    (late,) = schedule.late(time.monotonic())
    late.expire()
    started = time.monotonic()

    assert not any(schedule.late(time.monotonic()) for _ in range(10_000))

    assert time.monotonic() - started < 2
    assert schedule.num_waiting == 9_999


# Failures.


def test_a_request_that_cannot_be_opened_fails_alone(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on["open"] = raiser(RuntimeError("secret"))

    a, b = submit(engine, ask("a"), ask("b"))

    with pytest.raises(GenerationFailed, match="generation failed: RuntimeError"):
        a.whole()
    assert b.whole().token_ids == answer(ord("b"), 4)
    assert engine.health().restarts == 0


def test_a_failed_prefill_ends_that_request_only(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on["prefill b"] = raiser(RuntimeError("secret"))

    a, b = submit(engine, ask("a", prompt=3), ask("b", prompt=3))

    with pytest.raises(GenerationFailed, match="generation failed: RuntimeError"):
        b.whole()
    assert a.whole().token_ids == answer(ord("a"), 4)
    assert "release b" in runner.acts


def test_a_failed_decode_ends_exactly_those_that_were_in_it(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on["decode a b"] = raiser(RuntimeError("secret"))

    a, b, late = submit(engine, ask("a"), ask("b"), ask("l", prompt=5))

    for generation in (a, b):
        with pytest.raises(GenerationFailed, match="generation failed: RuntimeError"):
            generation.whole()
    assert late.whole().token_ids == answer(ord("l"), 4)
    assert runner.num_admitted == 0


def test_an_error_with_a_name_is_passed_on_without_the_frames_that_hold_the_steps_tensors(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on["decode a"] = raiser(OutOfDeviceMemory("no memory left for this step"))

    generation = engine.generate(ask("a"))

    with pytest.raises(OutOfDeviceMemory, match="no memory left for this step") as caught:
        generation.whole()
    assert "decode" not in {entry.name for entry in caught.traceback}
    assert engine.generate(ask("b")).whole().token_ids == answer(ord("b"), 4)


def test_an_error_of_one_row_ends_that_request_only(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.rows[ord("b")] = GenerationFailed("the numbers went out of range")

    a, b = submit(engine, ask("a"), ask("b"))

    with pytest.raises(GenerationFailed, match="out of range"):
        b.whole()
    assert a.whole().token_ids == answer(ord("a"), 4)


def test_a_token_that_the_tokenizer_fails_on_ends_that_request_only(start: Start) -> None:
    """A checkpoint's decoder whose pattern backtracks panics; in the engine's thread that ended the engine."""
    broken = answer(ord("b"), 2)[-1]
    vocabulary = {"x" * 60 if token_id == broken else f"w{token_id}": token_id for token_id in range(256)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.decoder = decoders.Replace(Regex(r"(?:x+x+)+y"), " ")
    runner = FakeRunner()
    runner.checkpoint = replace(CHECKPOINT, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))  # type: ignore[no-untyped-call]
    engine = start(runner)

    a, b = submit(engine, ask("a"), ask("b"))

    with pytest.raises(GenerationFailed, match="tokenizer fails on the tokens of this answer"):
        b.whole()
    assert a.whole().token_ids == answer(ord("a"), 4)
    assert (engine.health().restarts, engine.health().running) == (0, 0)


def test_health_is_degraded_from_a_failure_until_a_request_is_finished(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on["decode a"] = raiser(RuntimeError("secret"))
    seen = []

    with suppress(GenerationFailed):
        engine.generate(ask("a")).whole()
    seen.append(engine.health())
    cancelled = engine.generate(ask("b", max_tokens=900))
    next(cancelled)
    cancelled.cancel()
    seen.append(engine.health())
    engine.generate(ask("c")).whole()
    seen.append(engine.health())

    assert [health.state for health in seen] == [EngineState.DEGRADED, EngineState.DEGRADED, EngineState.READY]
    assert [health.error for health in seen] == ["generation failed: RuntimeError"] * 2 + [None]
    assert seen[0].running == 0


@pytest.mark.parametrize("place", ["admit a", "release a"])
def test_a_failure_outside_of_a_step_ends_all_and_the_engine_starts_again_with_its_weights(
    start: Start, place: str
) -> None:
    runner = FakeRunner(slots=1)
    engine = start(runner)
    runner.on[place] = raiser(RuntimeError("secret"))
    at_reset: list[EngineState] = []
    runner.on["reset"] = lambda: at_reset.append(engine.health().state)

    a, b, c = submit(engine, ask("a"), ask("b"), ask("c"))

    if place == "release a":
        assert a.whole().token_ids == answer(ord("a"), 4), "it had got all by then"
    for generation in (b, c) if place == "release a" else (a, b, c):
        with pytest.raises(EngineRestarted, match="the engine failed and starts again: RuntimeError"):
            generation.whole()
    assert engine.generate(ask("d")).whole().token_ids == answer(ord("d"), 4)
    assert at_reset == [EngineState.DEGRADED]
    health = engine.health()
    assert (health.state, health.restarts, health.error) == (EngineState.READY, 1, None)
    assert "close" not in runner.acts


def test_what_was_made_is_delivered_though_the_engine_fails_over_it(start: Start) -> None:
    """Both end in one step, and giving back the second's room fails: the first had left, and was never told."""
    runner = FakeRunner()
    engine = start(runner)
    runner.on["release b"] = raiser(RuntimeError("secret"))

    for name, generation in zip("ab", submit(engine, ask("a"), ask("b")), strict=True):
        assert generation.whole().token_ids == answer(ord(name), 4)

    eventually(lambda: engine.health().restarts == 1)
    assert engine.generate(ask("c")).whole().token_ids == answer(ord("c"), 4)


def test_a_runner_that_makes_too_few_tokens_is_a_failure_of_the_loop(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner()
    monkeypatch.setattr(runner, "decode", lambda sequences: [])

    with pytest.raises(EngineRestarted):
        start(runner).generate(ask("a")).whole()


def test_an_engine_that_fails_again_and_again_is_dead(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)

    for restarts in range(MAX_RESTARTS):
        runner.on["admit"] = raiser(RuntimeError("broken"))
        with pytest.raises(EngineRestarted):
            engine.generate(ask("a")).whole()
        assert engine.health().restarts == restarts + 1
    runner.on["admit"] = raiser(RuntimeError("broken"))
    with pytest.raises(EngineDead, match=r"the engine has stopped: RuntimeError$"):
        engine.generate(ask("a")).whole()

    assert engine.health().state is EngineState.DEAD
    assert engine.health().error == "RuntimeError"
    with pytest.raises(EngineDead):
        engine.generate(ask("a"))
    engine.close()
    assert runner.acts[-1] == "close"


def test_restarts_are_forgiven_when_a_request_was_finished(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)

    for _ in range(MAX_RESTARTS + 2):
        runner.on["admit"] = raiser(RuntimeError("broken"))
        with pytest.raises(EngineRestarted):
            engine.generate(ask("a")).whole()
        engine.generate(ask("b")).whole()

    assert engine.health().restarts == MAX_RESTARTS + 2


@pytest.mark.parametrize("place", ["prefill a", "decode", "admit a"])
def test_a_runner_may_say_that_it_is_dead(start: Start, place: str) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on[place] = raiser(EngineDead("the device has failed"))

    for generation in submit(engine, ask("a", prompt=2), ask("b", prompt=2)):
        with pytest.raises(EngineDead, match="the engine has stopped: the device has failed"):
            generation.whole()

    assert (engine.health().state, engine.health().restarts) == (EngineState.DEAD, 0)


def test_an_engine_that_cannot_be_reset_is_dead(start: Start) -> None:
    runner = FakeRunner()
    engine = start(runner)
    runner.on["admit"] = raiser(RuntimeError("broken"))
    runner.on["reset"] = raiser(RuntimeError("cannot"))

    with pytest.raises(EngineRestarted):
        engine.generate(ask("a")).whole()

    eventually(lambda: engine.health().state is EngineState.DEAD)
    assert engine.health().error == "RuntimeError"


def test_when_the_thread_dies_all_are_told_at_once(start: Start) -> None:
    runner = FakeRunner(slots=1)
    engine = start(runner)
    runner.on["decode a"] = raiser(SystemExit("out of everything"))

    for generation in submit(engine, ask("a"), ask("b")):
        with pytest.raises(EngineDead, match="SystemExit"):
            generation.whole()

    health = engine.health()
    assert (health.state, health.running, health.waiting) == (EngineState.DEAD, 0, 0)


def test_closing_ends_all_and_closes_the_runner(start: Start) -> None:
    runner = FakeRunner(slots=1)
    engine = start(runner)
    generations = submit(engine, ask("a", max_tokens=900), ask("b"))
    next(generations[0])

    engine.close()

    for generation in generations:
        with pytest.raises(EngineDead, match="it was closed"):
            generation.whole()
    assert runner.acts[-1] == "close"


# Readers.


def test_a_reader_that_stops_reading_holds_up_nobody_and_finds_all_in_one_chunk(start: Start) -> None:
    engine = start(FakeRunner())
    slow, other = submit(engine, ask("a", max_tokens=300), ask("b", max_tokens=500))

    assert len(other.whole().token_ids) == 500

    (chunk,) = list(slow)
    assert chunk.token_ids == answer(ord("a"), 300)


async def test_async_readers_get_what_sync_readers_get(start: Start) -> None:
    engine = start(FakeRunner())
    generations = submit(engine, *(ask(name, max_tokens=50) for name in "abcd"))

    async def read(generation: Generation) -> Chunk:
        return Chunk.join([chunk async for chunk in generation])

    chunks = await asyncio.gather(*(read(generation) for generation in generations))

    assert [chunk.token_ids for chunk in chunks] == [answer(ord(name), 50) for name in "abcd"]


def test_prompts_are_counted_and_what_of_them_was_cached(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner()
    engine = start(runner)

    def admit(sequence: FakeSequence) -> bool:
        sequence.num_cached = sequence.num_read = 4
        return FakeRunner.admit(runner, sequence)

    monkeypatch.setattr(runner, "admit", admit)
    usage = engine.generate(ask("a", prompt=10)).whole().usage

    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (10, 4, 4)
    assert (engine.health().prompt_tokens, engine.health().cached_tokens) == (10, 4)


def test_what_has_ended_is_not_held_on_to(start: Start) -> None:
    engine = start(FakeRunner())
    gc.disable()
    try:
        finished, cancelled = submit(engine, ask("a"), ask("b", max_tokens=900))
        finished.whole()
        next(cancelled)
        cancelled.cancel()
        eventually(lambda: load_of(engine) == (0, 0))
        seen = [weakref.ref(finished), weakref.ref(cancelled)]
        del finished, cancelled
        eventually(lambda: [each() for each in seen] == [None, None])
    finally:
        gc.enable()


def test_two_thousand_requests_of_which_a_third_is_cancelled_leave_nothing_behind(start: Start) -> None:
    """Slots and memory are short, so that there are pauses of both kinds all the time."""
    chance = random.Random(5)
    runner = FakeRunner(slots=8, memory=180)
    engine = start(runner)
    num_threads = threading.active_count()
    answered = threading.Semaphore(0)
    wrong: list[str] = []

    def read(generation: Generation, request: Request) -> None:
        chunk = generation.whole()
        expected = answer(request.prompt[0], request.sampling.max_tokens or 0)
        if chunk.finish_reason is FinishReason.CANCELLED:
            expected = expected[: len(chunk.token_ids)]
        if chunk.token_ids != expected:
            wrong.append(f"{chunk.token_ids} is not {expected}")
        answered.release()

    def call(caller: int) -> None:
        for burst in range(20):
            asked = [
                ask(chr(chance.randrange(33, 120)), prompt=chance.randrange(1, 40), max_tokens=chance.randrange(1, 40))
                for _ in range(10)
            ]
            generations = [
                engine.generate(Request(prompt=each.prompt, sampling=each.sampling, caller=f"{caller} {burst}"))
                for each in asked
            ]
            for generation in chance.sample(generations, 3):
                time.sleep(chance.random() / 500)
                generation.cancel()
            for generation, request in zip(generations, asked, strict=True):
                read(generation, request)

    threads = [threading.Thread(target=call, args=[index]) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    eventually(lambda: load_of(engine) == (0, 0))
    eventually(lambda: engine.health().memory_use == 0.0)

    assert wrong == []
    assert sum(answered.acquire(blocking=False) for _ in range(3000)) == 2000
    assert (runner.num_admitted, runner.free) == (0, 180)
    assert engine._schedule._jobs == {}
    assert len(engine._schedule._waiting) == 0
    assert threading.active_count() == num_threads
    health = engine.health()
    assert (health.state, health.restarts) == (EngineState.READY, 0)
    assert health.preemptions > 0
    assert any(act.startswith("full") for act in runner.acts)
    assert runner.num_resumed > 0
