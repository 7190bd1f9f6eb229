"""What is taken out of a transformers model: which models, in which formats, and how much of them is lost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from llm.errors import InvalidOption, UnsupportedModel
from llm.llama import kernel
from llm.llama.blocks import BLOCK
from llm.llama.matrix import Format, PackedMatrix, pack
from llm.llama.model import Llama
from llm.llama.weights import Weights, take_weights
from llm.loading import load_weights
from llm.references import ModelFiles
from tests.llm.llama.tiny_models import (
    SIZES,
    expected_logits,
    in_dtype,
    read,
    rounded,
    table,
    take,
    take_for_torch,
    tiny,
)

needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="needs a C compiler")
README = Path(__file__).parents[3] / "README.md"


def llama(rope: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    rotary = {"rope_parameters": {"rope_theta": 10_000.0, **rope}} if rope else {}
    return LlamaConfig(**{**SIZES, **rotary, **changes})


# Models that are refused.


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
            "type gpt2 are not of Llama's.*llama, mistral",
        ),
        (llama({"rope_type": "dynamic", "factor": 2.0}), "rotary embeddings of type dynamic .*default, linear"),
        (
            llama(
                {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 1024,
                }
            ),
            "rotary embeddings of type longrope",
        ),
        (llama(hidden_act="gelu"), "activation gelu is not Llama's"),
        (MistralConfig(**{**SIZES, "sliding_window": 512}), "last 512 tokens only.*SERVE_MAX_CONTEXT=512"),
        (
            Qwen2Config(**{**SIZES, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}),
            "last 100 tokens only.*SERVE_MAX_CONTEXT=100",
        ),
    ],
    ids=["architecture", "dynamic", "longrope", "activation", "Mistral's window", "Qwen's window"],
)
def test_what_the_forward_does_not_know_is_refused_by_name(config: PretrainedConfig, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        take(tiny(config), context=1024)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**{**SIZES, "sliding_window": 512}),
        Qwen2Config(**{**SIZES, "use_sliding_window": False, "sliding_window": 100}),
    ],
    ids=["as long as the context", "switched off"],
)
def test_a_window_that_hides_nothing_is_no_reason_to_refuse(config: PretrainedConfig) -> None:
    take(tiny(config), context=512)


def test_a_format_that_is_not_offered_is_named() -> None:
    with pytest.raises(InvalidOption, match=r"quantize must be auto, none, int8, int4, got 'int3'"):
        take(tiny(), "int3")


@pytest.mark.parametrize("changes", [{"intermediate_size": 80}, {"head_dim": 24}, {"hidden_size": 80}])
def test_sizes_that_the_kernel_does_not_know_take_torchs_way_and_few_bits_are_refused(changes: dict[str, Any]) -> None:
    assert not take(tiny(**changes)).is_packed
    with pytest.raises(UnsupportedModel, match=r"int4 weights .* multiples of 32\): set SERVE_QUANTIZE=none"):
        take(tiny(**changes), "int4")


def test_float16_takes_torchs_way_and_few_bits_are_refused() -> None:
    model = in_dtype(tiny(), torch.float16)
    assert not take(model, "auto").is_packed
    with pytest.raises(UnsupportedModel, match="bfloat16 or float32"):
        take(model, "int8")


# Formats.


def formats(weights: Weights) -> tuple[set[Format], Format]:
    """Those of the layers, and the head's."""
    projections = [p for layer in weights.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    assert isinstance(weights.head.matrix, PackedMatrix)
    return {p.matrix.format for p in projections if isinstance(p.matrix, PackedMatrix)}, weights.head.matrix.format


def as_made_from_q4_1(model: PreTrainedModel) -> PreTrainedModel:
    return in_dtype(rounded(model, Format.INT4, Format.INT8), torch.bfloat16)


@needs_kernel
@pytest.mark.parametrize(
    ("quantize", "dtype", "expected"),
    [
        ("none", torch.float32, ({Format.FLOAT32}, Format.FLOAT32)),
        ("none", torch.bfloat16, ({Format.BFLOAT16}, Format.BFLOAT16)),
        ("int8", torch.bfloat16, ({Format.INT8}, Format.INT8)),
        ("int4", torch.float32, ({Format.INT4}, Format.INT8)),
        ("auto", torch.float32, ({Format.FLOAT32}, Format.FLOAT32)),
        ("auto", torch.bfloat16, ({Format.BFLOAT16}, Format.BFLOAT16)),
    ],
)
def test_random_weights_are_stored_as_asked_and_by_default_as_they_are(
    quantize: str, dtype: torch.dtype, expected: tuple[set[Format], Format]
) -> None:
    assert formats(take(in_dtype(tiny(), dtype), quantize)) == expected


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_finds_out_that_weights_have_no_more_than_4_bits(dtype: torch.dtype) -> None:
    model = in_dtype(as_made_from_q4_1(tiny()), dtype)

    assert formats(take(model, "auto")) == ({Format.INT4}, Format.INT8)


@needs_kernel
@pytest.mark.parametrize("outlier", [1.1, 2.0])
def test_one_weight_off_the_grid_is_enough_to_keep_them_as_they_are(outlier: float) -> None:
    model: Any = as_made_from_q4_1(tiny())
    weight = model.model.layers[0].mlp.down_proj.weight
    weight[5, 40] = weight[5, 32:64].abs().max() * outlier

    assert formats(take(model, "auto")) == ({Format.BFLOAT16}, Format.BFLOAT16)


@needs_kernel
def test_a_model_is_taken_apart_for_good_and_its_weights_are_not_kept_twice() -> None:
    model: Any = copy.deepcopy(tiny())

    take_weights(model, context=16, quantize="none")

    assert model.lm_head.weight is None
    assert all(layer.mlp.up_proj.weight is None for layer in model.model.layers)


@needs_kernel
def test_the_embedded_model_runs_on_its_own_4_bits(embedded: ModelFiles) -> None:
    model: Any = load_weights(embedded, device="cpu")
    stored = {
        name: parameter.float() for name, parameter in model.named_parameters() if ".29." in name or ".0." in name
    }

    weights = take_weights(model, context=128)

    assert formats(weights) == ({Format.INT4}, Format.INT8)
    for number in (0, 29):
        down = weights.layers[number].down.matrix
        assert isinstance(down, PackedMatrix)
        plain = stored[f"model.layers.{number}.mlp.down_proj.weight"]
        torch.testing.assert_close(down.unpack(), plain, rtol=2**-7, atol=1e-3)
        assert torch.equal(pack(plain.bfloat16(), Format.INT4).weights, down.weights)


# What is lost, in the likelihoods of the next token over a text.


def log_probabilities(weights: Weights, ids: list[int]) -> Tensor:
    """Of the second half: each of its blocks of tokens is decoded as the end of what comes before, which was read."""
    starts = range(len(ids) // 2, len(ids), BLOCK)
    blocks = table(len(ids))
    model = Llama(weights, len(blocks) + len(starts))
    read(model, ids, blocks)
    tables = [[*blocks[: start // BLOCK], len(blocks) + row] for row, start in enumerate(starts)]
    steps = [
        model.decode([ids[start + step] for start in starts], [start + step for start in starts], tables)
        for step in range(BLOCK)
    ]
    return torch.stack(steps, dim=1).flatten(0, 1).log_softmax(-1)


def divergence(of: Tensor, from_: Tensor) -> float:
    """Kullback and Leibler's, in nats a token."""
    return float((from_.exp() * (from_ - of)).sum(-1).mean())


@needs_kernel
def test_the_grid_that_weights_were_on_loses_a_tenth_of_what_torchs_bfloat16_loses(embedded: ModelFiles) -> None:
    """Measured over the second half of 640 tokens of the README, against the converted checkpoint in float32: int4
    8e-5, the same weights in bfloat16 5e-5, torch's bfloat16 1.1e-3, int8 (not the grid that they were on) 1.2e-3.
    Decoded alone, against the GGUF in float32, whose weights the conversion rounds: 2e-5, 1e-4, 1.1e-3 and 1.2e-3.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded.directory)
    ids: list[int] = tokenizer(README.read_text())["input_ids"][:224]
    stored = load_weights(embedded, device="cpu")
    exact = expected_logits(in_dtype(stored, torch.float32), ids)[112:].log_softmax(-1)

    def lost(weights: Weights) -> float:
        return divergence(log_probabilities(weights, ids), exact)

    int4, int8, bfloat16, torchs = (
        lost(taken)
        for taken in (take(stored, "int4"), take(stored, "int8"), take(stored, "none"), take_for_torch(stored))
    )

    assert 0 <= int4 < 4 * bfloat16
    assert int4 < torchs / 6
    assert int8 < 2 * torchs < 1e-2
