"""A Llama's weights, taken out of the transformers model that loaded them: fused, and packed for the CPU's kernel.

Knows transformers' modules and their names; knows no cache and no requests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.errors import InvalidOption, UnsupportedModel
from llm.llama import kernel
from llm.llama.matrix import GROUP, PANEL, Format, PackedMatrix, pack

ARCHITECTURES = ("llama", "mistral", "qwen2")
"""Values of `model_type` whose layers are Llama's; Qwen 2 adds biases."""
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not change with the length of a text."""
QUANTIZE = ("auto", "none", "int8", "int4")
ROUNDING = 2**-7
"""How far apart a weight of bfloat16 and what its group makes of it are, relative to the greatest in the group: it was
rounded, and so were the least and the greatest, which the group is made from."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer: a matrix of (outputs, inputs), and a bias of (outputs,)."""

    matrix: Tensor | PackedMatrix
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norms are (hidden,), float32 where the kernel runs."""

    device: torch.device
    attention_norm: Tensor
    qkv: Projection
    """Queries, keys and values of all heads, in this order."""
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    """Gate, then up; the panels of a packed one take turns."""
    down: Projection


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model, with the sizes that its forward needs."""

    dtype: torch.dtype
    """Of activations, keys and values."""
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    embedding: Tensor
    """(vocabulary, hidden)"""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Projection
    cosines: Tensor
    """float32 (context, head_dim / 2): of each position, for the dimensions i and i + head_dim / 2."""
    sines: Tensor

    @property
    def hidden(self) -> int:
        """Size of what layers hand on."""
        return self.embedding.shape[1]

    @property
    def is_packed(self) -> bool:
        """True if they are for the CPU's kernel."""
        return isinstance(self.head.matrix, PackedMatrix)


def take_weights(model: PreTrainedModel, *, context: int, quantize: str = "auto") -> Weights:
    """Take a loaded model apart; it is of no use afterwards.

    Args:
        model: A causal language model of Llama's architecture.
        context: Tokens that positions are made for.
        quantize: `none`, `int8`, `int4`, or `auto`: `int4` where the kernel runs and the weights had been rounded to
            such groups before (a Q4_1 GGUF), so that nothing is lost; else `none`. The output head of a quantised
            model keeps 8 bits, as is usual: the choice between likely tokens hangs on it.

    Raises:
        UnsupportedModel: It is of another architecture, or its sizes cannot be quantised.
        InvalidOption: `quantize` is none of these.
    """
    if quantize not in QUANTIZE:
        raise InvalidOption("quantize", ", ".join(QUANTIZE), quantize)
    config: Any = model.config
    _refuse_others(config, context)
    parts: Any = model
    on_kernel = kernel_runs(model)
    if quantize == "auto":
        linears = (module for module in parts.model.layers.modules() if isinstance(module, nn.Linear))
        quantize = "int4" if on_kernel and all(_is_on_grid(module.weight) for module in linears) else "none"
    if quantize != "none" and not on_kernel:
        raise UnsupportedModel(
            f"{quantize} weights need the CPU's kernel (a CPU, a C compiler, bfloat16 or float32, and layers whose "
            f"sizes are multiples of {GROUP}): set SERVE_QUANTIZE=none"
        )
    plain = Format.FLOAT32 if model.dtype == torch.float32 else Format.BFLOAT16
    packer = _Packer(on_kernel, {"none": plain, "int8": Format.INT8, "int4": Format.INT4}[quantize])
    head_packer = _Packer(on_kernel, plain if quantize == "none" else Format.INT8)
    embedding = parts.model.embed_tokens.weight.detach()
    head = head_packer.projection(parts.lm_head)
    layers = tuple(_layer(layer, packer) for layer in parts.model.layers)
    cosines, sines = _rotary(parts.model.rotary_emb, context, embedding.device)
    return Weights(
        dtype=model.dtype,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        epsilon=config.rms_norm_eps,
        embedding=embedding,
        layers=layers,
        norm=packer.norm(parts.model.norm),
        head=head,
        cosines=cosines,
        sines=sines,
    )


def kernel_runs(model: PreTrainedModel) -> bool:
    """True if the kernel can be had, and knows this model's sizes and number formats."""
    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = (config.hidden_size, config.intermediate_size, heads * _head_dim(config))
    return (
        model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and _head_dim(config) % PANEL == 0
        and _head_dim(config) <= kernel.MAX_HEAD_DIM
        and heads % kv_heads == 0
        and all(size % GROUP == 0 and size <= kernel.MAX_INPUTS for size in sizes)
        and kernel.library() is not None
    )


def _is_on_grid(matrix: Tensor) -> bool:
    """True if a matrix has groups of no more than 16 evenly spaced weights: it comes from such a format."""
    if matrix.shape[1] % GROUP:
        return False
    groups = torch.unflatten(matrix.detach().float(), 1, (-1, GROUP))
    difference = (pack(matrix.detach(), Format.INT4).unpack().view_as(groups) - groups).abs()
    return bool((difference <= ROUNDING * groups.abs().amax(-1, keepdim=True)).all())


@dataclass(frozen=True, slots=True)
class _Packer:
    """Takes tensors out of modules, and leaves nothing behind: a layer is never in memory twice for long."""

    is_packing: bool
    format: Format

    def projection(self, *modules: nn.Linear, interleave: bool = False) -> Projection:
        """Linear layers with the same inputs, as one."""
        matrices = [module.weight.detach() for module in modules]
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        assert len(biases) in (0, len(modules))
        for module in modules:
            module.weight = None  # type: ignore[assignment]
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        packed = pack(matrix, self.format, interleave=interleave) if self.is_packing else matrix
        return Projection(packed, torch.cat(biases) if biases else None)

    def norm(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.detach()
        return weight.float() if self.is_packing else weight


def _layer(layer: Any, packer: _Packer) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        device=layer.input_layernorm.weight.device,
        attention_norm=packer.norm(layer.input_layernorm),
        qkv=packer.projection(attention.q_proj, attention.k_proj, attention.v_proj),
        out=packer.projection(attention.o_proj),
        mlp_norm=packer.norm(layer.post_attention_layernorm),
        gate_up=packer.projection(mlp.gate_proj, mlp.up_proj, interleave=True),
        down=packer.projection(mlp.down_proj),
    )


def _rotary(module: Any, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines as transformers' rotary embedding computes them, scaled as it scales them."""
    frequencies = module.inv_freq.to(device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(context, device=device, dtype=torch.float32), frequencies)
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse_others(config: Any, context: int) -> None:
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"models of type {config.model_type} are not of Llama's architecture (known: {known})")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in ROTARY_TYPES:
        raise UnsupportedModel(f"rotary embeddings of type {rotary} are not supported ({', '.join(ROTARY_TYPES)} are)")
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"the activation {config.hidden_act} is not Llama's (silu)")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < context:
        raise UnsupportedModel(
            f"the model attends to the last {window} tokens only, which is not supported beyond them: set "
            f"SERVE_MAX_CONTEXT={window}"
        )
