"""Random models of Llama's architecture that run in milliseconds, and what becomes of them in our hands."""

import copy
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from llm.llama import weights
from llm.llama.blocks import BLOCK
from llm.llama.matrix import Format, pack
from llm.llama.model import Llama
from llm.llama.weights import Weights, take_weights

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
"""Of what `tiny` builds; weights are large enough that a wrong one shows."""


def tiny(config: PretrainedConfig | None = None, *, seed: int = 1, **changes: Any) -> PreTrainedModel:
    """A random model in float32, biases and norms random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config or LlamaConfig(**{**SIZES, **changes})
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def take(model: PreTrainedModel, quantize: str = "none", *, context: int = 2048) -> Weights:
    """The weights of a model that stays whole."""
    return take_weights(copy.deepcopy(model), context=context, quantize=quantize)


def take_for_torch(model: PreTrainedModel, *, context: int = 2048) -> Weights:
    """The same where there is no kernel."""
    with patch.object(weights, "kernel_runs", return_value=False):
        return take(model, context=context)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model as it is loaded in another dtype: its parameters alone, not the frequencies of its positions."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def rounded(model: PreTrainedModel, formats: Format, head: Format) -> PreTrainedModel:
    """The same model, with the weights that its formats make of them."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            format = head if name == "lm_head" else formats  # noqa: A001
            module.weight = torch.nn.Parameter(pack(module.weight, format).unpack(), requires_grad=False)
    return model


def random_ids(num_tokens: int, *, seed: int = 1, vocabulary: int = 96) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return cast("list[int]", torch.randint(0, vocabulary, (num_tokens,), generator=generator).tolist())


def expected_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """What transformers' own forward gives for each token: (tokens, vocabulary)."""
    with torch.inference_mode():
        return cast("Tensor", model(torch.tensor([ids], device=model.device)).logits[0].float().cpu())


def fill_with(llama: Llama, value: float) -> None:
    """Whatever memory holds before anything was computed."""
    for tensor in (*llama._keys, *llama._values):
        tensor.fill_(value)


def table(num_tokens: int, *, first: int = 0) -> list[int]:
    """Blocks for so many tokens, in an order of no order."""
    numbers = list(range(first, first - (-num_tokens // BLOCK)))
    return numbers[1::2] + numbers[::2]


def read(llama: Llama, ids: list[int], blocks: list[int], *, start: int = 0, chunk: int = 256) -> None:
    """Read a prompt from `start` on, as an engine does."""
    for at in range(start, len(ids), chunk):
        llama.prefill(ids[at : at + chunk], at, blocks)
