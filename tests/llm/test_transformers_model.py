"""The real model against transformers' own `generate`."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm.engine import Request
from llm.generation import Chunk, FinishReason, Generation
from llm.local_engine import LocalEngine
from llm.prompt import encode
from llm.references import ModelFiles
from llm.sampling import Sampling

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
    "Explain recursion. " * 40,  # longer than one prefill chunk
]


@pytest.fixture(scope="module", params=["tiny Llama 3", "embedded"])
def directory(request: pytest.FixtureRequest) -> Path:
    if request.param == "embedded":
        files: ModelFiles = request.getfixturevalue("embedded")
        return files.directory
    path: Path = request.getfixturevalue("tiny_llama3")
    return path


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(str(directory), dtype="float32", device="cpu")
    engine.wait_until_ready(100)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


def prompt(engine: LocalEngine, question: str) -> tuple[int, ...]:
    return tuple(encode(engine.checkpoint.tokenizer, [HumanMessage(question)]))


def generated(model: PreTrainedModel, ids: tuple[int, ...], **options: Any) -> list[int]:
    output = model.generate(torch.tensor([ids]), do_sample=False, temperature=None, top_p=None, top_k=None, **options)  # type: ignore[operator]
    new: list[int] = output[0, len(ids) :].tolist()
    return new


def answer(engine: LocalEngine, ids: tuple[int, ...], **sampling: Any) -> Chunk:
    return sum(engine.generate(Request(prompt=ids, sampling=Sampling(**sampling))), Chunk())


@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_greedy_equals_generate_token_for_token(engine: LocalEngine, reference: PreTrainedModel, question: str) -> None:
    ids = prompt(engine, question)

    ours = answer(engine, ids, temperature=0, max_tokens=24)

    expected = generated(reference, ids, max_new_tokens=24, repetition_penalty=1.0)
    assert list(ours.token_ids) == expected
    ended = expected[-1] in engine.checkpoint.stop_ids
    assert ours.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)


@pytest.mark.parametrize("question", QUESTIONS[:4], ids=range(4))
def test_the_repetition_penalty_equals_that_of_generate(
    engine: LocalEngine, reference: PreTrainedModel, question: str
) -> None:
    ids = prompt(engine, question)

    ours = answer(engine, ids, temperature=0, repetition_penalty=1.3, max_tokens=24)

    assert list(ours.token_ids) == generated(reference, ids, max_new_tokens=24, repetition_penalty=1.3)


def test_a_seed_repeats(engine: LocalEngine) -> None:
    ids = prompt(engine, QUESTIONS[2])

    first, second, other = (answer(engine, ids, seed=seed, max_tokens=16).token_ids for seed in (1, 1, 2))

    assert first == second != other


def test_logprobs_are_those_of_the_model(engine: LocalEngine, reference: PreTrainedModel) -> None:
    ids = prompt(engine, QUESTIONS[0])

    ours = answer(engine, ids, temperature=0, logprobs=3, max_tokens=4)

    with torch.inference_mode():
        logits = reference(torch.tensor([[*ids, *ours.token_ids]])).logits[0, len(ids) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    for position, item in enumerate(ours.logprobs):
        assert item.logprob == pytest.approx(float(expected[position, item.token_id]), abs=1e-3)
        assert [token_id for token_id, _ in item.top] == expected[position].topk(3).indices.tolist()


def test_text_is_what_the_tokens_decode_to(engine: LocalEngine) -> None:
    ours = answer(engine, prompt(engine, QUESTIONS[0]), temperature=0, max_tokens=24)

    decoded = engine.checkpoint.tokenizer.decode(list(ours.token_ids), skip_special_tokens=True)
    assert ours.text == str(decoded).rstrip("\N{REPLACEMENT CHARACTER}")


def test_cancelling_while_a_long_prompt_is_read_frees_the_engine_at_once(engine: LocalEngine) -> None:
    long = Request(prompt=(100,) * 6000, sampling=Sampling(max_tokens=1))
    generation: Generation = engine.generate(long)
    wait_until(lambda: engine.health().running == 1)

    generation.cancel()

    started = time.monotonic()
    wait_until(lambda: engine.health().running == 0)
    assert generation.timings.first_token is None
    assert time.monotonic() - started < 5  # one chunk of the prompt, not all of it: that takes tens of seconds


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_program_that_ends_in_the_middle_of_an_answer_ends_cleanly(tiny_llama3: Path) -> None:
    """The engine's thread was inside torch when the interpreter went away, and the process ended with SIGABRT."""
    program = f"from llm import LLaMA3_LLM; next(LLaMA3_LLM({str(tiny_llama3)!r}).stream('Hi'))"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)

    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_greedy_on_a_gpu_equals_generate_on_it(tiny_llama3: Path) -> None:
    engine = LocalEngine(str(tiny_llama3), dtype="float32", device="cuda")
    engine.wait_until_ready(100)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama3, dtype=torch.float32, device_map="cuda")

    for question in QUESTIONS:
        ids = prompt(engine, question)
        output = model.generate(torch.tensor([ids], device="cuda"), do_sample=False, max_new_tokens=24)
        assert list(answer(engine, ids, temperature=0, max_tokens=24).token_ids) == output[0, len(ids) :].tolist()
    engine.close()
