"""The engine that people run against transformers' own `generate`, and against itself without company.

Where a token differs, the reference must find both about equally likely: their logits less than 0.001 apart. From there
on the texts are different ones, and the comparison ends; nearly all tokens have to come before that.
"""

import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from langchain_core.messages import HumanMessage
from transformers import AutoModelForCausalLM

from llm.engine import EngineState, Request
from llm.errors import EngineDead, NotEnoughMemory, UnsupportedModel
from llm.generation import Chunk, FinishReason, Generation
from llm.llama import kernel, runner
from llm.llama.model import Llama
from llm.llama.runner import LlamaRunner
from llm.llama.weights import Weights
from llm.local_engine import LocalEngine
from llm.prompt import encode
from llm.references import ModelFiles
from llm.sampling import Sampling

TIE = 1e-3
NUM_TOKENS = 16
QUESTIONS = [
    "What is the capital of France?",
    "你是谁？",
    "Write a haiku about rain.",
    "Count from one to ten.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "مرحبا، كيف حالك؟",
    "List three fruits.",
    "def fibonacci(n):",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What is 12 times 12?",
    "Tell me a joke.",
    "🙂🙃",
    "Summarize: the cat sat on the mat.",
    "Name a colour.",
    "How do airplanes fly?",
    "Say nothing.",
    "What day comes after Monday?",
    "Explain recursion. " * 100,  # longer than one prefill chunk
]


class Reference:
    """transformers' model, in float32, one request at a time."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map=device)
        self.generate = cache(self._generate)

    def _generate(self, ids: tuple[int, ...], **options: Any) -> list[int]:
        prompt = torch.tensor([ids], device=self._model.device)
        output = self._model.generate(prompt, do_sample=False, max_new_tokens=NUM_TOKENS, **options)
        return cast("list[int]", output[0, len(ids) :].tolist())

    def logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Of all tokens, float32 (tokens, vocabulary)."""
        with torch.inference_mode():
            return cast("torch.Tensor", self._model(torch.tensor([ids], device=self._model.device)).logits[0])

    def compare(self, ids: tuple[int, ...], ours: tuple[int, ...], **options: Any) -> int:
        """Hold an answer, or the beginning of one, against `generate`'s; count the tokens that are the same."""
        theirs = self.generate(ids, **options)
        assert len(ours) <= len(theirs)
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            if one != other:
                logits = self.logits((*ids, *theirs[:index]))[-1]
                assert abs(logits[one] - logits[other]) < TIE, f"token {index} is {one}, and {other} in transformers"
                return index
        return len(ours)


@pytest.fixture(scope="module", params=["tiny Llama 3", "embedded"])
def directory(request: pytest.FixtureRequest) -> Path:
    if request.param == "embedded":
        files: ModelFiles = request.getfixturevalue("embedded")
        return files.directory
    path: Path = request.getfixturevalue("tiny_llama3")
    return path


def started(directory: Path, **options: Any) -> LocalEngine:
    engine = LocalEngine(str(directory), **options)
    engine.wait_until_ready(100)
    return engine


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[LocalEngine]:
    engine = started(directory, dtype="float32", device="cpu", quantize="none")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def four_bits(embedded: ModelFiles) -> Iterator[LocalEngine]:
    if kernel.library() is None:
        pytest.skip("needs a C compiler")
    engine = started(embedded.directory, device="cpu", quantize="int4")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference(directory)


def prompt(engine: LocalEngine, question: str) -> tuple[int, ...]:
    return tuple(encode(engine.checkpoint.tokenizer, [HumanMessage(question)]))


def ask(engine: LocalEngine, ids: tuple[int, ...], *, owner: str = "", **sampling: Any) -> Generation:
    options = {"temperature": 0, "max_tokens": NUM_TOKENS, **sampling}
    return engine.generate(Request(prompt=ids, sampling=Sampling(**options), owner=owner))


def answer(engine: LocalEngine, ids: tuple[int, ...], **options: Any) -> Chunk:
    return ask(engine, ids, **options).whole()


# Alone.


@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_greedy_equals_generate_token_for_token(engine: LocalEngine, reference: Reference, question: str) -> None:
    ids = prompt(engine, question)

    ours = answer(engine, ids)

    same = reference.compare(ids, ours.token_ids)
    assert same >= NUM_TOKENS // 2 or same == len(ours.token_ids)
    ended = ours.token_ids[-1] in engine.checkpoint.stop_ids
    assert ours.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
    assert ended or len(ours.token_ids) == NUM_TOKENS


@pytest.mark.parametrize("question", QUESTIONS[:4], ids=range(4))
def test_the_repetition_penalty_equals_that_of_generate(
    engine: LocalEngine, reference: Reference, question: str
) -> None:
    ids = prompt(engine, question)

    ours = answer(engine, ids, repetition_penalty=1.3)

    assert list(ours.token_ids) == reference.generate(ids, repetition_penalty=1.3)


def test_a_seed_repeats(engine: LocalEngine) -> None:
    ids = prompt(engine, QUESTIONS[2])

    first, second, other = (
        answer(engine, ids, temperature=1, seed=seed, owner=str(index)).token_ids
        for index, seed in enumerate((1, 1, 2))
    )

    assert first == second != other


def test_logprobs_are_those_of_the_model(engine: LocalEngine, reference: Reference) -> None:
    ids = prompt(engine, QUESTIONS[0])

    ours = answer(engine, ids, logprobs=3, max_tokens=4)

    expected = reference.logits((*ids, *ours.token_ids))[len(ids) - 1 : -1].log_softmax(-1)
    for position, item in enumerate(ours.logprobs):
        assert item.logprob == pytest.approx(float(expected[position, item.token_id]), abs=1e-3)
        assert [token_id for token_id, _ in item.top] == expected[position].topk(3).indices.tolist()


def test_text_is_what_the_tokens_decode_to(engine: LocalEngine) -> None:
    ours = answer(engine, prompt(engine, QUESTIONS[0]))

    decoded = engine.checkpoint.tokenizer.decode(list(ours.token_ids), skip_special_tokens=True)
    assert ours.text == str(decoded).rstrip("\N{REPLACEMENT CHARACTER}")


def test_cancelling_while_a_long_prompt_is_read_frees_the_engine_at_once(engine: LocalEngine) -> None:
    generation = ask(engine, (100,) * 6000, max_tokens=1)
    wait_until(lambda: engine.health().running == 1)

    generation.cancel()

    started = time.monotonic()
    wait_until(lambda: engine.health().running == 0)
    assert generation.timings.first_token is None
    assert time.monotonic() - started < 5  # one chunk of the prompt, not all of it


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# In company.


@dataclass
class Run:
    """A request that somebody reads, and perhaps not to its end."""

    ids: tuple[int, ...]
    generation: Generation
    num_wanted: int
    read: tuple[int, ...] = ()

    def read_on(self) -> None:
        """Take what has come, at least one token, and stop when that is enough."""
        self.read += next(self.generation, Chunk()).token_ids
        if len(self.read) >= self.num_wanted:
            self.generation.cancel()

    def finish(self) -> tuple[int, ...]:
        while not self.generation.is_ended and len(self.read) < self.num_wanted:
            self.read_on()
        return self.read + self.generation.whole().token_ids


def join_and_leave(engine: LocalEngine, owners: str, num_owners: int) -> list[tuple[Run, tuple[int, ...]]]:
    """Sixteen requests of different lengths, and what they got. Each comes some steps after the one before; every
    fourth is cancelled after a few tokens."""
    runs: list[Run] = []
    for number, question in enumerate(QUESTIONS[4:]):
        ids = prompt(engine, question)
        max_tokens = NUM_TOKENS - number % 5
        generation = ask(engine, ids, max_tokens=max_tokens, owner=f"{owners} {number % num_owners}")
        runs.append(Run(ids, generation, 3 + number // 2 if number % 4 == 2 else max_tokens))
        runs[-1].read_on()
    answers = [run.finish() for run in runs]
    assert len(runs) == 16
    assert num_together(runs) >= 4
    assert all(
        len(answer) >= run.num_wanted or answer[-1] in engine.checkpoint.stop_ids
        for run, answer in zip(runs, answers, strict=True)
    )
    return list(zip(runs, answers, strict=True))


@pytest.mark.parametrize("num_owners", [1, 16], ids=["of one owner", "of sixteen owners"])
def test_sixteen_that_join_and_leave_at_different_steps_get_what_each_would_get_alone(
    engine: LocalEngine, reference: Reference, num_owners: int
) -> None:
    """What those got that were cancelled is right, too."""
    answers = join_and_leave(engine, f"sixteen of {num_owners}", num_owners)

    same = [reference.compare(run.ids, answer) for run, answer in answers]
    assert sum(same) >= 0.9 * sum(len(answer) for _, answer in answers)
    assert sum(same) > 100


@pytest.mark.parametrize("num_owners", [1, 16], ids=["of one owner", "of sixteen owners"])
def test_sixteen_that_join_and_leave_get_from_4_bits_exactly_what_each_gets_alone(
    four_bits: LocalEngine, num_owners: int
) -> None:
    answers = join_and_leave(four_bits, f"sixteen of {num_owners}", num_owners)

    for number, (run, together) in enumerate(answers):
        alone = answer(four_bits, run.ids, owner=f"alone {num_owners} {number}").token_ids
        assert together == alone[: len(together)]


def num_together(runs: list[Run]) -> int:
    """The most that were running at one moment."""
    spans = [(run.generation.timings.first_token or 0, run.generation.timings.ended or 0) for run in runs]
    return max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)


MANNERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 1.2, "top_k": 30, "min_p": 0.01, "seed": 3},
    {"temperature": 0.9, "repetition_penalty": 1.2, "seed": 4},
    {"repetition_penalty": 1.2},
]


def assert_company_changes_nothing(engine: LocalEngine) -> None:
    """Token for token and logprob for logprob. Owners are all different, so that everything is computed anew."""
    asked = [(prompt(engine, question), manner) for question, manner in zip(QUESTIONS[-12:], MANNERS * 2, strict=True)]
    owners = count()

    def ask_all(numbers: Iterable[int]) -> dict[int, Generation]:
        return {
            number: ask(engine, asked[number][0], logprobs=3, owner=f"number {next(owners)}", **asked[number][1])
            for number in numbers
        }

    alone = {number: ask_all([number])[number].whole() for number in range(12)}
    for order in (range(12), range(11, -1, -1)):
        for number, generation in ask_all(order).items():
            together = generation.whole()
            assert together.token_ids == alone[number].token_ids
            assert together.logprobs == alone[number].logprobs


def test_what_a_request_gets_is_the_same_to_the_last_bit_alone_and_in_company(engine: LocalEngine) -> None:
    assert_company_changes_nothing(engine)


def test_what_a_request_gets_from_4_bits_is_the_same_to_the_last_bit_alone_and_in_company(
    four_bits: LocalEngine,
) -> None:
    assert_company_changes_nothing(four_bits)


# Where things are different.


def test_without_a_compiler_answers_are_the_same_and_few_bits_are_refused(
    tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    kernel.library.cache_clear()
    try:
        engine, refused = started(tiny_llama3, device="cpu"), LocalEngine(str(tiny_llama3), quantize="int4")
        with pytest.raises(UnsupportedModel, match="SERVE_QUANTIZE=none"):
            refused.wait_until_ready(60)
    finally:
        kernel.library.cache_clear()
    reference = Reference(tiny_llama3)
    prompts = [prompt(engine, question) for question in QUESTIONS]

    generations = [ask(engine, ids) for ids in prompts]

    same = [reference.compare(ids, one.whole().token_ids) for ids, one in zip(prompts, generations, strict=True)]
    assert sum(same) >= 0.9 * len(prompts) * NUM_TOKENS
    engine.close()


def test_slots_and_context_are_what_somebody_asked_for(tiny_llama3: Path) -> None:
    engine = started(tiny_llama3, device="cpu", max_slots=3, max_context=500)

    assert (engine.health().slots, engine.health().context, engine.checkpoint.context) == (3, 500, 500)
    engine.close()


def test_a_program_that_ends_in_the_middle_of_an_answer_ends_cleanly(tiny_llama3: Path) -> None:
    """The engine's thread was inside torch when the interpreter went away, and the process ended with SIGABRT."""
    program = f"from llm import LLaMA3_LLM; next(LLaMA3_LLM({str(tiny_llama3)!r}).stream('Hi'))"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)

    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_on_a_gpu_equals_generate_on_it(tiny_llama3: Path, dtype: str) -> None:
    """All at once. In bfloat16 ties are wider, and more of them: it is enough that most tokens come before one."""
    engine, reference = started(tiny_llama3, dtype=dtype, device="cuda"), Reference(tiny_llama3, "cuda")
    prompts = [prompt(engine, question) for question in QUESTIONS]

    answers = [generation.whole().token_ids for generation in [ask(engine, ids) for ids in prompts]]

    if dtype == "float32":
        same = [reference.compare(ids, ours) for ids, ours in zip(prompts, answers, strict=True)]
    else:
        same = [
            next((i for i, (a, b) in enumerate(zip(ours, reference.generate(ids), strict=False)) if a != b), NUM_TOKENS)
            for ids, ours in zip(prompts, answers, strict=True)
        ]
    assert sum(same) >= (0.9 if dtype == "float32" else 0.2) * len(prompts) * NUM_TOKENS
    engine.close()


# What is left of it when it has ended.


class Seen(Llama):
    """Notes that it exists, and its tensors, without keeping them alive."""

    models: ClassVar[list[weakref.ref[Llama]]] = []
    tensors: ClassVar[list[weakref.ref[torch.Tensor]]] = []

    def __init__(self, weights: Weights, num_blocks: int) -> None:
        super().__init__(weights, num_blocks)
        Seen.models += [weakref.ref(self)]
        Seen.tensors += [weakref.ref(tensor) for tensor in (weights.embedding, weights.norm, *self._keys)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> type[Seen]:
    monkeypatch.setattr(Seen, "models", [])
    monkeypatch.setattr(Seen, "tensors", [])
    monkeypatch.setattr(runner, "Llama", Seen)
    return Seen


def closed(engine: LocalEngine) -> None:
    """Close an engine, however long that takes on a busy machine."""
    engine.close()
    engine._thread.join(60)


def num_alive(seen: type[Seen]) -> int:
    assert seen.models
    assert seen.tensors
    return sum(model() is not None for model in seen.models) + sum(tensor() is not None for tensor in seen.tensors)


def test_closing_frees_the_weights_though_the_engine_and_its_answers_are_kept(
    tiny_llama3: Path, seen: type[Seen]
) -> None:
    engine = started(tiny_llama3, device="cpu")
    ids = prompt(engine, QUESTIONS[0])
    finished, running = ask(engine, ids), ask(engine, ids, max_tokens=400)
    answer = finished.whole()
    next(running)
    assert num_alive(seen) == len(seen.models) + len(seen.tensors)

    closed(engine)

    assert num_alive(seen) == 0
    assert engine.health().state is EngineState.DEAD
    assert answer.finish_reason is not None
    with pytest.raises(EngineDead):
        running.whole()
    assert finished is not running, "both are still referenced"


def test_an_engine_that_dies_in_a_step_frees_the_weights(
    tiny_llama3: Path, seen: type[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that it died of is kept, and with it were all variables of the step."""

    def fail(self: Llama, *_: object) -> torch.Tensor:
        try:
            raise RuntimeError("no answer from the device")
        except RuntimeError as error:
            raise EngineDead("the device has failed") from error

    monkeypatch.setattr(Seen, "decode", fail)
    engine = started(tiny_llama3, device="cpu")

    with pytest.raises(EngineDead, match="the device has failed"):
        ask(engine, prompt(engine, QUESTIONS[0])).whole()
    closed(engine)

    assert num_alive(seen) == 0
    with pytest.raises(EngineDead, match="the device has failed"):
        _ = engine.checkpoint


def test_an_engine_that_cannot_load_frees_the_weights(
    tiny_llama3: Path, seen: type[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is kept for whoever asks; it was raised where the weights were at hand."""

    def fail(self: LlamaRunner, checkpoint: object, model: Llama, **_: object) -> None:
        raise NotEnoughMemory("too large", needed=2, available=1)

    monkeypatch.setattr(LlamaRunner, "__init__", fail)
    engine = LocalEngine(str(tiny_llama3), device="cpu")

    with pytest.raises(NotEnoughMemory):
        engine.wait_until_ready(100)
    closed(engine)

    assert num_alive(seen) == 0


class Gpu:
    """In place of `torch.cuda`: counts what is returned, and how much of the model is alive by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seen: type[Seen], *, is_used: bool) -> None:
        self.alive: list[int] = []
        self._seen = seen
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_used)
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty_cache)

    def _empty_cache(self) -> None:
        self.alive.append(num_alive(self._seen))


def test_closing_returns_the_memory_of_a_gpu_once_nothing_uses_it(
    tiny_llama3: Path, seen: type[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(tiny_llama3, device="cpu")
    gpu = Gpu(monkeypatch, seen, is_used=True)

    closed(engine)

    assert gpu.alive == [0]


def test_closing_does_not_initialize_a_gpu_that_was_not_used(
    tiny_llama3: Path, seen: type[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(tiny_llama3, device="cpu")
    gpu = Gpu(monkeypatch, seen, is_used=False)

    closed(engine)

    assert gpu.alive == []
    assert num_alive(seen) == 0
