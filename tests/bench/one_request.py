"""How fast one request is answered: by transformers' `generate`, by the engine, and over HTTP; in one run, in turns.

    python -m tests.bench [--runs 5] [--tokens 64] [--model embedded]

Prints tokens per second and time to first token as medians with their range, and ratios to `generate`. Run nothing
beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import torch
from langchain_core.messages import HumanMessage

from llm.engine import Request
from llm.loading import prepare
from llm.local_engine import LocalEngine
from llm.prompt import encode
from llm.sampling import Sampling
from tests.server import Server

QUESTION = "Tell me a long story about a lighthouse keeper and the sea."


@dataclass(frozen=True, slots=True)
class Run:
    """One answer. Times are seconds."""

    num_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default="embedded")
    options = parser.parse_args()
    ways = {"generate": by_generate, "engine": by_engine, "HTTP /stream": by_http}
    runs: dict[str, list[Run]] = {}
    for name, measure in ways.items():
        # Each in a process of its own: torch keeps a team of CPU threads per thread that has used it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            runs[name] = process.submit(measure, options.model, options.tokens, options.runs).result()
    print(f"{options.model}, {options.tokens} tokens, medians of {options.runs} (least to most)")
    print(f"{'':14}{'tokens/s':>24}{'first token, ms':>24}{'of generate':>14}")
    baseline = statistics.median(run.tokens_per_s for run in runs["generate"])
    for name, taken in runs.items():
        speed = [run.tokens_per_s for run in taken]
        first = [1000 * run.first_token_s for run in taken]
        ratio = statistics.median(speed) / baseline
        print(f"{name:14}{spread(speed):>24}{spread(first):>24}{ratio:>13.2f}x")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def timed(answer: Callable[[], tuple[int, float]], runs: int) -> list[Run]:
    """Run `answer` once to warm up, then `runs` times. It returns how many tokens came, and when the first did."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        num_tokens, first = answer()
        taken.append(Run(num_tokens, first - started, time.perf_counter() - started))
    return taken[1:]


def by_generate(reference: str, tokens: int, runs: int) -> list[Run]:
    """The baseline: transformers' own loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    directory = prepare(reference).directory
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    prompt = torch.tensor([encode(AutoTokenizer.from_pretrained(directory), [HumanMessage(QUESTION)])])

    class Arrivals(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer() -> tuple[int, float]:
        arrivals = Arrivals()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            streamer=arrivals,
        )
        return len(arrivals.times) - 1, arrivals.times[1]  # transformers puts the prompt first

    return timed(answer, runs)


def by_engine(reference: str, tokens: int, runs: int) -> list[Run]:
    """The engine, called directly."""
    engine = LocalEngine(reference)
    checkpoint = engine.wait_until_ready()
    ids = tuple(encode(checkpoint.tokenizer, [HumanMessage(QUESTION)]))
    request = Request(prompt=ids, sampling=Sampling(temperature=0, max_tokens=tokens))

    def answer() -> tuple[int, float]:
        chunks = engine.generate(request)
        num_tokens, first = len(next(chunks).token_ids), time.perf_counter()
        return num_tokens + sum(len(chunk.token_ids) for chunk in chunks), first

    try:
        return timed(answer, runs)
    finally:
        engine.close()


def by_http(reference: str, tokens: int, runs: int) -> list[Run]:
    """The service, through /chat/stream."""
    options = {"temperature": 0, "max_tokens": tokens, "repetition_penalty": 1}
    body = {"input": {"messages": [["user", QUESTION]]}, "config": {"configurable": options}}

    with tempfile.TemporaryDirectory() as scratch, Server(Path(scratch) / "log", model=reference) as server:

        def answer() -> tuple[int, float]:
            num_tokens, first = 0, 0.0
            with httpx.stream("POST", f"{server.url}/chat/stream", json=body, timeout=600) as response:
                for line in response.iter_lines():
                    if line.startswith('data: {"content"'):
                        first = first or time.perf_counter()
                        usage = json.loads(line.removeprefix("data: "))["usage_metadata"]
                        num_tokens += usage["output_tokens"] if usage else 0
            return num_tokens, first

        return timed(answer, runs)
