"""What the machine could do at most: bytes and operations per second, measured, and what a model needs of them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_BYTES = 512 * 2**20
_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Best of several tries, with all of torch's threads."""

    device: str
    read_bytes_per_s: float
    """Of memory that no cache holds, read once."""
    copy_bytes_per_s: float
    """Read and written together."""
    bfloat16_flops: float
    """Operations per second of a large matrix product; a multiplication with its addition counts as two."""
    float32_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one token costs, from a checkpoint's configuration."""

    layer_parameters: int
    head_parameters: int
    """Of the product that makes logits."""
    weight_bytes: int
    """All that a step must read."""
    kv_bytes: int
    """Keys and values of one token, in bfloat16."""
    attention_flops: int
    """Per token and token of context."""

    @classmethod
    def of(cls, directory: Path, weight_bytes: int) -> "Cost":
        """Read the rest from a checkpoint directory of the Llama architecture."""
        config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = hidden * size * (2 * heads + 2 * kv_heads)
        layer_parameters = layers * (attention + 3 * hidden * config["intermediate_size"])
        head_parameters = hidden * config["vocab_size"]
        return cls(
            layer_parameters=layer_parameters,
            head_parameters=head_parameters,
            weight_bytes=weight_bytes,
            kv_bytes=2 * 2 * layers * kv_heads * size,
            attention_flops=4 * layers * heads * size,
        )

    def decode_limit(self, limits: Limits, rows: int, context: int) -> float:
        """Tokens per second of all rows: a step reads all weights once and each row's keys and values."""
        read_s = (self.weight_bytes + rows * context * self.kv_bytes) / limits.read_bytes_per_s
        flops = rows * (2 * (self.layer_parameters + self.head_parameters) + context * self.attention_flops)
        return rows / max(read_s, flops / limits.bfloat16_flops)

    def prefill_limit(self, limits: Limits, context: int) -> float:
        """Tokens per second of prompts of that length; only the last token of each needs logits."""
        flops = 2 * self.layer_parameters * context + 2 * self.head_parameters + self.attention_flops * context**2 // 2
        return context / max(flops / limits.bfloat16_flops, self.weight_bytes / limits.read_bytes_per_s)


def weight_bytes(reference: str) -> int:
    """Bytes of the weights that our engine reads in a step, in the format that it takes by default."""
    from llm.llama.matrix import PackedMatrix
    from llm.llama.weights import take_weights
    from llm.loading import load_weights, prepare

    weights = take_weights(load_weights(prepare(reference)), context=1)
    layers = [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in weights.layers]
    matrices = [projection.matrix for layer in layers for projection in layer] + [weights.head.matrix]
    return sum(matrix.num_bytes if isinstance(matrix, PackedMatrix) else matrix.nbytes for matrix in matrices)


def device() -> str:
    """Where our engine runs unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(device: str) -> Limits:
    """Measure. Call it in a process of its own: torch keeps a team of threads per thread that has used it."""
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    side = 16_384 if device == "cuda" else 2_048
    wide, narrow = (torch.randn(side, side, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    return Limits(
        device=device,
        read_bytes_per_s=_BYTES / _best(source.sum, device),
        copy_bytes_per_s=2 * _BYTES / _best(lambda: target.copy_(source), device),
        bfloat16_flops=2 * side**3 / _best(lambda: narrow @ narrow, device),
        float32_flops=2 * side**3 / _best(lambda: wide @ wide, device),
    )


def _best(work: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(_TRIES + 1):
        started_s = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return min(times[1:])
