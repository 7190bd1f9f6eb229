"""transformers' own `generate` on the same weights: the baseline for the engine alone."""

import time
from typing import Any

import torch

from llm.loading import prepare
from llm.prompt import encode_text
from llm.quiet import quiet
from tests.bench.alone import TOKENS, Measurement, Size
from tests.bench.prose import prose


def measure(reference: str, size: Size, device: str) -> list[Measurement]:
    """Decode with a static batch, and prefill of one prompt. Call it in a process of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = prepare(reference).directory
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.to(device)

    def seconds(rows: int, context: int, new_tokens: int) -> float:
        texts = [encode_text(tokenizer, prose(number, context + 16))[:context] for number in range(rows)]
        prompts = torch.tensor(texts, device=device)
        started_s = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - started_s

    def decode(rows: int) -> float:
        return rows * TOKENS / (seconds(rows, 128, TOKENS + 1) - seconds(rows, 128, 1))

    seconds(1, 128, 2)
    measured = []
    for rows in size.batches:
        values = tuple(decode(rows) for _ in range(size.repeats))
        measured.append(Measurement("decode by generate", rows, 128, "tokens/s", values))
    for context in size.prompts:
        values = tuple(context / seconds(1, context, 1) for _ in range(size.repeats))
        measured.append(Measurement("prefill by generate", 1, context, "tokens/s", values))
    return measured
