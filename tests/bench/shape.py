"""Random weights of a well-known shape, for measuring what no public registry has: they compute as the real ones do.

Built on the GPU, layer by layer, in bfloat16, with the tokenizer of the tests' tiny Llama 3. What such a model says
means nothing, and it hardly ever ends a turn.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from llm.quiet import quiet
from tests.tiny_llama3 import build_tiny_llama3

_GIB = 2**30
_STD = 0.02


class ShapeRefused(Exception):
    """This machine cannot run it; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama 3, and what it takes to build and run one."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    needs_gpu: bool

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=128_256,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            rms_norm_eps=1e-5,
            bos_token_id=128_000,
            eos_token_id=[128_001, 128_009],
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )

    @property
    def bytes(self) -> int:
        size = self.hidden // self.heads
        layer = self.hidden * (2 * self.hidden + 2 * self.kv_heads * size + 3 * self.intermediate)
        return 2 * (self.layers * layer + 2 * 128_256 * self.hidden)


SHAPES = {
    "llama3-8b": Shape(hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, needs_gpu=True),
    "llama3-tiny": Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, needs_gpu=False),
}
"""The tiny one is for trying this out where there is no GPU."""


def build(shape: Shape, directory: Path) -> Path:
    """Write a checkpoint into `directory`, in a shard per layer; raises `ShapeRefused` before anything is written."""
    _refuse(shape, directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        build_tiny_llama3(directory)  # for its tokenizer
    (directory / "model.safetensors").unlink()
    shape.config.save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(3)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return (drawn * _STD).cpu()

    norm = torch.ones(shape.hidden, dtype=torch.bfloat16)
    index: dict[str, str] = {}
    names = [f"model-{number:05}-of-{shape.layers + 1:05}.safetensors" for number in range(1, shape.layers + 2)]
    for layer, name in enumerate(names):
        if layer < shape.layers:
            tensors = _layer(shape, f"model.layers.{layer}.", matrix, norm)
        else:
            tensors = {
                "model.embed_tokens.weight": matrix(128_256, shape.hidden),
                "model.norm.weight": norm,
                "lm_head.weight": matrix(128_256, shape.hidden),
            }
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    total = {"metadata": {"total_size": shape.bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(total))
    return directory


def _layer(
    shape: Shape, prefix: str, matrix: Callable[[int, int], torch.Tensor], norm: torch.Tensor
) -> dict[str, torch.Tensor]:
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden),
        "mlp.down_proj": (hidden, shape.intermediate),
    }
    norms = {f"{prefix}{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
    return norms | {f"{prefix}{name}.weight": matrix(*size) for name, size in sizes.items()}


def _refuse(shape: Shape, directory: Path) -> None:
    if shape.needs_gpu:
        if not torch.cuda.is_available():
            raise ShapeRefused("this shape wants a GPU, and torch sees none here")
        free = torch.cuda.mem_get_info()[0]
        if free < shape.bytes * 1.25:
            raise ShapeRefused(f"too little memory on the GPU: {_said(shape.bytes * 1.25, free)}")
    free = shutil.disk_usage(directory).free
    if free < shape.bytes * 1.05:
        raise ShapeRefused(f"too little room in {directory} (TMPDIR names another): {_said(shape.bytes * 1.05, free)}")


def _said(wanted: float, free: float) -> str:
    return f"{wanted / _GIB:.1f} GiB are wanted, {free / _GIB:.1f} are free"
