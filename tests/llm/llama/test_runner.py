"""A real engine over little memory: what is computed once, what is given back, and that answers stay what they were."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from transformers import AutoModelForCausalLM

from llm.batching_engine import BatchingEngine
from llm.checkpoint import Checkpoint, load_checkpoint
from llm.engine import EngineState, Request
from llm.errors import EngineDead, EngineRestarted, GenerationFailed, LLMError, ModelError, OutOfDeviceMemory
from llm.generation import Chunk, Generation
from llm.llama import runner
from llm.llama.blocks import BLOCK
from llm.llama.matrix import PackedMatrix
from llm.llama.model import Llama
from llm.llama.runner import PREFILL_CHUNK, LlamaRunner, LlamaSequence
from llm.llama.weights import Weights, take_weights
from llm.loading import load_weights
from llm.prompt import count, encode_text
from llm.references import ModelFiles
from llm.sampling import Sampling
from tests.llm.llama.tiny_models import random_ids

Engine = BatchingEngine[LlamaSequence]
Generate = Callable[[Sequence[int], int], tuple[int, ...]]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def loaded(tiny_llama3: Path) -> tuple[Checkpoint, Weights]:
    files = ModelFiles("tiny", tiny_llama3)
    checkpoint = load_checkpoint(files)
    return checkpoint, take_weights(load_weights(files, device="cpu"), context=checkpoint.context, quantize="none")


@pytest.fixture(scope="module")
def generate(tiny_llama3: Path) -> Generate:
    """What transformers generates, without company, cache or anything else."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama3, dtype=torch.float32)

    @cache
    def whole(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens)
        return tuple(output[0, len(prompt) :].tolist())

    def generated(prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        return whole(tuple(prompt), max_tokens)

    return generated


class Small:
    """An engine whose memory is counted."""

    def __init__(self, loaded: tuple[Checkpoint, Weights], num_blocks: int, slots: int) -> None:
        checkpoint, weights = loaded
        self.num_blocks = num_blocks
        self.model = Llama(weights, num_blocks)
        self.runner = LlamaRunner(checkpoint, self.model, slots=slots)
        self.engine: Engine = BatchingEngine("small", lambda: self.runner)
        self.engine.wait_until_ready(60)

    def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int = NUM_TOKENS,
        *,
        owner: str = "anna",
        num_shared: int = 0,
        **sampling: Any,
    ) -> Generation:
        options = Sampling(**{"temperature": 0, "max_tokens": max_tokens, **sampling})
        return self.engine.generate(Request(prompt=tuple(prompt), sampling=options, owner=owner, num_shared=num_shared))

    def answer(self, prompt: Sequence[int], max_tokens: int = NUM_TOKENS, **options: Any) -> Chunk:
        return self.ask(prompt, max_tokens, **options).whole()

    def assert_idle(self) -> None:
        """Nobody runs, nobody waits, and all memory can be had."""
        eventually(lambda: (self.engine.health().running, self.engine.health().waiting) == (0, 0))
        eventually(lambda: self.engine.health().memory_use == 0.0)
        assert self.runner._pool.num_free == self.num_blocks
        assert not self.runner._pool._tables


Start = Callable[..., Small]


@pytest.fixture
def start(loaded: tuple[Checkpoint, Weights]) -> Iterator[Start]:
    started: list[Small] = []

    def begin(num_blocks: int = 200, *, slots: int = 8) -> Small:
        started.append(Small(loaded, num_blocks, slots))
        return started[-1]

    yield begin
    for small in started:
        small.engine.close()


def eventually(is_true: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def cached(chunk: Chunk) -> int:
    assert chunk.usage is not None
    return chunk.usage.cached_tokens


def counted(monkeypatch: pytest.MonkeyPatch, thing: object, name: str) -> list[tuple[Any, ...]]:
    """The calls of a method, as they come."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(thing, name)

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return method(*arguments)

    monkeypatch.setattr(thing, name, call)
    return calls


# What memory is held.


def test_health_tells_what_part_of_the_memory_is_held_and_leaves_out_what_is_kept_for_reuse(start: Start) -> None:
    small = start(40)
    running = small.ask(random_ids(10 * BLOCK), 10 * BLOCK)

    next(running)
    assert 0.25 <= small.engine.health().memory_use <= 0.5
    running.cancel()

    small.assert_idle()
    assert small.runner._pool.num_cached_blocks >= 10


# What somebody has computed already.


def test_the_second_turn_of_a_chat_starts_where_the_first_one_ended(start: Start, generate: Generate) -> None:
    small, question = start(), random_ids(150)
    answer = small.answer(question)
    follow_up = [*question, *answer.token_ids, *random_ids(12, seed=2)]

    second = small.answer(follow_up)

    assert cached(answer) == 0
    assert cached(second) == (150 + NUM_TOKENS - 1) // 16 * 16  # nobody has computed the last token yet
    assert answer.token_ids == generate(question, NUM_TOKENS)
    assert second.token_ids == generate(follow_up, NUM_TOKENS)


def test_a_long_system_prompt_is_read_once(start: Start, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    small, system = start(), random_ids(600)
    prompts = [[*system, *random_ids(10 + seed, seed=seed)] for seed in range(2, 7)]
    reads = counted(monkeypatch, small.model, "prefill")

    first, *others = [small.answer(prompt) for prompt in prompts]

    assert cached(first) == 0
    assert [cached(other) for other in others] == [592] * 4
    assert sum(len(ids) for ids, _, _ in reads) == sum(map(len, prompts)) - 5 - 4 * 592
    for prompt, answer in zip(prompts, [first, *others], strict=True):
        assert answer.token_ids == generate(prompt, NUM_TOKENS)


def test_a_batch_that_comes_at_once_reads_its_shared_head_once(
    start: Start, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, head = start(), random_ids(520)
    prompts = [[*head, *random_ids(10, seed=seed)] for seed in range(2, 8)]
    reads = counted(monkeypatch, small.model, "prefill")

    batch = [small.ask(prompt) for prompt in prompts]
    answers = [generation.whole() for generation in batch]

    assert [answer.token_ids for answer in answers] == [generate(prompt, NUM_TOKENS) for prompt in prompts]
    assert sum(map(cached, answers)) == 5 * 512
    assert sum(len(ids) for ids, _, _ in reads) == 6 * 529 - 5 * 512


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 32, 33, 300])
def test_what_is_reused_is_whole_blocks_and_never_the_last_token(
    start: Start, generate: Generate, num_tokens: int
) -> None:
    small, prompt = start(), random_ids(num_tokens)
    once = small.answer(prompt, 5)

    again = small.answer(prompt, 5)

    assert cached(again) == (num_tokens - 1) // 16 * 16
    assert again.token_ids == once.token_ids == generate(prompt, 5)
    health = small.engine.health()
    assert (health.prompt_tokens, health.cached_tokens) == (2 * num_tokens, cached(again))


def test_owners_do_not_see_each_others_prompts(start: Start, generate: Generate) -> None:
    small, prompt = start(), random_ids(200)
    small.answer(prompt, owner="anna")

    other = small.answer(prompt, owner="bert")

    assert cached(other) == 0
    assert other.token_ids == generate(prompt, NUM_TOKENS)
    assert cached(small.answer(prompt, owner="anna")) == 192


@pytest.mark.parametrize("num_shared", [0, 15, 16, 50, 199, 200])
def test_all_owners_share_what_is_nobodys_secret_and_no_token_more(
    start: Start, generate: Generate, num_shared: int
) -> None:
    small, prompt = start(), random_ids(200)
    small.answer(prompt, owner="anna", num_shared=num_shared)

    other = small.answer(prompt, owner="bert", num_shared=num_shared)

    assert cached(other) == min(num_shared, 199) // 16 * 16
    assert other.token_ids == generate(prompt, NUM_TOKENS)


def test_what_one_owner_calls_shared_does_not_open_what_another_does_not(start: Start) -> None:
    """Somebody who guesses a secret, and says that it is none, must not find out that he was right."""
    small, secret = start(), random_ids(100)
    small.answer(secret, owner="anna")

    assert cached(small.answer(secret, owner="bert", num_shared=100)) == 0


def test_the_same_words_elsewhere_are_computed_again(start: Start, generate: Generate) -> None:
    small, words, heads = start(), random_ids(48), [random_ids(16, seed=seed) for seed in (2, 3)]
    small.answer([*heads[0], *words])
    small.answer(heads[1])

    earlier, after_others = small.answer([*words, 7]), small.answer([*heads[1], *words])

    assert [cached(earlier), cached(after_others)] == [0, 16]
    assert earlier.token_ids == generate([*words, 7], NUM_TOKENS)
    assert after_others.token_ids == generate([*heads[1], *words], NUM_TOKENS)


# Little memory.


def test_answers_stay_right_while_memory_is_used_again_and_again(start: Start, generate: Generate) -> None:
    """Conversations with common heads, four at a time, that need many times the memory there is."""
    small = start(40, slots=4)
    pick = random.Random(1)
    heads = [random_ids(length, seed=length) for length in (40, 100, 170)]
    prompts = [[*pick.choice(heads)[: pick.randrange(16, 170)], *random_ids(9, seed=seed)] for seed in range(40)]

    batch = [small.ask(prompt, 8, owner=pick.choice(["anna", "bert"])) for prompt in prompts]
    answers = [generation.whole() for generation in batch]

    assert [answer.token_ids for answer in answers] == [generate(prompt, 8) for prompt in prompts]
    assert sum(map(cached, answers)) > 300
    assert sum(map(len, prompts)) - sum(map(cached, answers)) > 2 * 40 * 16  # so blocks were used twice at least
    small.assert_idle()


def test_who_has_to_wait_for_memory_goes_on_where_it_was(
    start: Start, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four that need 5 blocks each in the end, and 2 for what they share, and there are 17."""
    small, head = start(17), random_ids(32)
    small.answer([*head, 1], 1, num_shared=32)
    admissions = counted(monkeypatch, small.runner, "admit")
    prompts = [[*head, *random_ids(8, seed=seed)] for seed in range(2, 6)]

    batch = [small.ask(prompt, 64, owner=str(index), num_shared=32) for index, prompt in enumerate(prompts)]
    answers = [generation.whole() for generation in batch]

    assert len({id(sequence) for (sequence,) in admissions}) == 4
    assert len(admissions) > 4
    assert [answer.token_ids for answer in answers] == [generate(prompt, 64) for prompt in prompts]
    assert [cached(answer) for answer in answers] == [32] * 4  # what one reads again, or finds again, does not count
    small.assert_idle()


def test_a_sampled_answer_is_the_same_after_a_pause(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decoded is read again in one piece, so rounding differs: not among all 128,256, which this model finds
    about equally likely."""
    roomy, small = start(200), start(17)
    admissions = counted(monkeypatch, small.runner, "admit")
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    prompts = [random_ids(40, seed=seed) for seed in range(4)]
    expected = [roomy.answer(prompt, 64, seed=index, **options) for index, prompt in enumerate(prompts)]

    batch = [small.ask(p, 64, owner=str(index), seed=index, **options) for index, p in enumerate(prompts)]

    assert [generation.whole().token_ids for generation in batch] == [answer.token_ids for answer in expected]
    assert len(admissions) > 4


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(100, 1), (60, 20)], ids=["its prompt", "its answer"])
def test_who_can_never_fit_is_told_so_and_nobody_else_notices(
    start: Start, generate: Generate, num_prompt: int, max_tokens: int
) -> None:
    small = start(4)

    with pytest.raises(OutOfDeviceMemory, match=f"no room for the {max(num_prompt, 65)} tokens"):
        small.answer(random_ids(num_prompt), max_tokens)

    assert small.answer(random_ids(30), 20).token_ids == generate(random_ids(30), 20)
    small.assert_idle()


def test_who_is_cancelled_in_the_middle_of_a_long_prompt_reads_no_other_chunk(
    start: Start, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, prompt = start(400), random_ids(6000)
    generations: list[Generation] = []
    prefill = small.model.prefill

    def cancelled_in_the_third_chunk(ids: list[int], begin: int, blocks: list[int]) -> None:
        if begin == 2 * PREFILL_CHUNK and not generations[0].is_ended:
            generations[0].cancel()
        prefill(ids, begin, blocks)

    monkeypatch.setattr(small.model, "prefill", cancelled_in_the_third_chunk)
    reads = counted(monkeypatch, small.model, "prefill")

    generations.append(small.ask(prompt))
    generations[0].whole()
    small.assert_idle()

    assert len(reads) == 3
    head = prompt[:900]
    again = small.answer(head, 8)
    assert cached(again) == 3 * PREFILL_CHUNK  # what was read is not lost
    assert again.token_ids == generate(head, 8)


def test_a_chunk_ends_where_it_would_have_ended_without_company_or_cache(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, prompt = start(), random_ids(700)
    reads = counted(monkeypatch, small.model, "prefill")

    small.answer(prompt, 1)
    small.answer([*prompt[:100], *random_ids(500, seed=2)], 1)

    assert [(begin, begin + len(ids)) for ids, begin, _ in reads] == [
        (0, 256),
        (256, 512),
        (512, 699),
        (96, 256),
        (256, 512),
        (512, 599),
    ]


def test_who_finds_that_others_have_read_on_reads_no_more_than_was_said(
    loaded: tuple[Checkpoint, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on with the chunk behind the one that others had read: more than the others' next token can wait for."""
    checkpoint, weights = loaded
    runner = LlamaRunner(checkpoint, Llama(weights, 200), slots=3)
    ids = tuple(random_ids(600))

    def admitted(num_tokens: int) -> LlamaSequence:
        sequence = runner.open(Request(prompt=ids[:num_tokens], sampling=Sampling(max_tokens=1), owner="anna"))
        assert runner.admit(sequence)
        return sequence

    runner.prefill(admitted(200))
    ahead, behind = admitted(600), admitted(600)
    runner.prefill(ahead)
    runner.prefill(ahead)
    assert 0 < behind.num_to_read < PREFILL_CHUNK
    computed = counted(monkeypatch, runner._model, "prefill")

    runner.prefill(behind)

    assert not computed
    assert behind.num_to_read == ahead.num_to_read


def test_many_requests_that_end_in_all_ways_leave_nothing_behind(start: Start, generate: Generate) -> None:
    small = start(60, slots=6)
    pick = random.Random(3)
    for number in range(60):
        prompts = [random_ids(pick.randrange(1, 60), seed=pick.randrange(20)) for _ in range(4)]
        batch = [small.ask(prompt, pick.randrange(1, 8), owner=pick.choice("ab")) for prompt in prompts]
        for generation in batch:
            if pick.random() < 0.3:
                generation.cancel()
        answers = [generation.whole() for generation in batch]
        for prompt, answer in zip(prompts, answers, strict=True):
            if number % 20 == 0:
                assert answer.token_ids == generate(prompt, 8)[: len(answer.token_ids)]

    small.assert_idle()
    assert small.engine.health().state is EngineState.READY


# Failures.


def out_of_cpu_memory() -> None:
    torch.empty(2**46)


def out_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def other_error() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def dead_device() -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


FAILURES: list[tuple[Callable[[], None], type[LLMError], str]] = [
    (out_of_cpu_memory, OutOfDeviceMemory, "ran out of memory in a step"),
    (out_of_gpu_memory, OutOfDeviceMemory, "ran out of memory in a step: CUDA out of memory"),
    (other_error, GenerationFailed, "RuntimeError"),
]


def failing_once(monkeypatch: pytest.MonkeyPatch, thing: object, name: str, failure: Callable[[], None]) -> list[bool]:
    """Let the next call of a method fail; the list tells whether it has."""
    method, failed = getattr(thing, name), list[bool]()

    def call(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            failure()
        return method(*arguments)

    monkeypatch.setattr(thing, name, call)
    return failed


@pytest.mark.parametrize(("failure", "error", "said"), FAILURES)
def test_a_step_that_fails_ends_the_requests_in_it_and_no_other(
    start: Start,
    generate: Generate,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[], None],
    error: type[LLMError],
    said: str,
) -> None:
    small = start(slots=2)
    running = [small.ask(random_ids(20, seed=seed), 2000, owner=str(seed)) for seed in range(2)]
    waiting = small.ask(random_ids(20, seed=9))
    eventually(lambda: all(generation.timings.first_token is not None for generation in running))

    failed = failing_once(monkeypatch, small.model, "decode", failure)

    for generation in running:
        with pytest.raises(error, match=said):
            generation.whole()
    assert failed
    assert waiting.whole().token_ids == generate(random_ids(20, seed=9), NUM_TOKENS)
    assert small.answer(random_ids(20)).token_ids == generate(random_ids(20), NUM_TOKENS)
    assert (small.engine.health().restarts, small.engine.health().state) == (0, EngineState.READY)
    small.assert_idle()


@pytest.mark.parametrize(("failure", "error", "said"), FAILURES)
def test_a_chunk_that_fails_ends_its_own_request_and_no_other(
    start: Start,
    generate: Generate,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[], None],
    error: type[LLMError],
    said: str,
) -> None:
    small, prompt = start(), random_ids(600, seed=5)
    running = small.ask(random_ids(20), 400)
    eventually(lambda: running.timings.first_token is not None)
    failing_once(monkeypatch, small.model, "prefill", failure)

    with pytest.raises(error, match=said):
        small.answer(prompt)

    assert small.engine.health().state is EngineState.DEGRADED
    assert running.whole().token_ids == generate(random_ids(20), 400)
    assert small.answer(prompt).token_ids == generate(prompt, NUM_TOKENS)  # half-written memory is not reused
    small.assert_idle()


def test_a_row_without_valid_numbers_fails_alone_and_leaves_no_trace_in_memory(
    start: Start, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where float16 overflows: its keys and values are NaN too."""
    small = start(8)
    decode = small.model.decode

    @torch.inference_mode()
    def with_nan(ids: list[int], positions: list[int], tables: list[list[int]]) -> torch.Tensor:
        logits = decode(ids, positions, tables)
        for row, position in enumerate(positions):
            if position == 42:
                logits[row, 7] = torch.nan
                for tensor in (*small.model._keys, *small.model._values):
                    tensor[tables[row]] = torch.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(small.model, "decode", with_nan)
        sick, well = small.ask(random_ids(43, seed=9), owner="sick"), small.ask(random_ids(10))
        with pytest.raises(GenerationFailed, match="no valid numbers"):
            sick.whole()
        assert well.whole().token_ids == generate(random_ids(10), NUM_TOKENS)

    for seed in range(4):  # in all blocks
        assert small.answer(random_ids(100, seed=seed)).token_ids == generate(random_ids(100, seed=seed), NUM_TOKENS)
    small.assert_idle()


def test_a_device_that_has_failed_is_the_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    small = start()
    failing_once(monkeypatch, small.model, "decode", dead_device)

    with pytest.raises(EngineDead, match="the device has failed"):
        small.answer(random_ids(20))

    eventually(lambda: small.engine.health().state is EngineState.DEAD)


def test_after_a_failure_of_the_loop_memory_is_empty_and_the_engine_goes_on(
    start: Start, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, prompt = start(), random_ids(100)
    small.answer(prompt)
    running = small.ask(random_ids(20, seed=2), 2000)
    eventually(lambda: running.timings.first_token is not None)
    failing_once(monkeypatch, small.runner, "grow", other_error)

    with pytest.raises(EngineRestarted):
        running.whole()

    again = small.answer(prompt)
    assert cached(again) == 0
    assert again.token_ids == generate(prompt, NUM_TOKENS)
    assert small.engine.health().restarts == 1
    small.assert_idle()


# Loading while others load.


def in_bfloat16(change: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Another thread sets torch's default dtype in the first loads, as many as `change`. Counts all loads."""
    loads: list[int] = []

    def load(files: ModelFiles, **options: Any) -> Any:
        model: Any = load_weights(files, **options)
        loads.append(1)
        if len(loads) <= change:
            model.model.layers[0].mlp.down_proj.to(torch.bfloat16)
        return model

    monkeypatch.setattr(runner, "load_weights", load)
    return loads


def test_a_model_that_loaded_in_another_threads_dtype_is_loaded_again(
    tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = in_bfloat16(2, monkeypatch)

    made = LlamaRunner.load(ModelFiles("tiny", tiny_llama3), device="cpu", dtype="float32", quantize="none")

    assert len(loads) == 3
    assert made._model.weights.dtype == torch.float32
    made.close()


def test_a_model_that_never_loads_in_its_own_dtype_is_refused(
    tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bfloat16(99, monkeypatch)

    with pytest.raises(ModelError, match="default dtype was changed in each of 3 attempts"):
        LlamaRunner.load(ModelFiles("tiny", tiny_llama3), device="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_at_load_does_not_show(tiny_llama3: Path, dtype: torch.dtype) -> None:
    def loaded_weights() -> list[torch.Tensor]:
        made = LlamaRunner.load(ModelFiles("tiny", tiny_llama3), device="cpu", quantize="none", max_context=64)
        weights = made._model.weights
        layer = weights.layers[0]
        matrices = [part.matrix for part in (layer.qkv, layer.down, weights.head)]
        packed = [matrix.weights if isinstance(matrix, PackedMatrix) else matrix for matrix in matrices]
        return [weights.embedding, weights.cosines, weights.sines, weights.norm, layer.mlp_norm, *packed]

    expected = loaded_weights()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = loaded_weights()
    finally:
        torch.set_default_dtype(usual)

    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_the_first_count_after_the_load_builds_no_encoder(tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by the first count, it stopped all threads for more than a second, when /ready had said yes already."""
    made = LlamaRunner.load(ModelFiles("tiny", tiny_llama3), device="cpu", quantize="none", max_context=64)
    monkeypatch.delattr("llm.prompt._Encoder")

    assert encode_text(made.checkpoint.tokenizer, "Hi")
    assert count(made.checkpoint.tokenizer, [HumanMessage("Hi")])
    made.close()
