"""Prompts in chunks and steps for many, on both paths, against transformers' own forward over the whole text."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from llm.llama import kernel
from llm.llama.model import NARROW, Llama, groups_of_similar_length
from llm.llama.weights import Weights
from llm.references import ModelFiles
from tests.llm.llama.tiny_models import (
    SIZES,
    expected_logits,
    fill_with,
    in_dtype,
    random_ids,
    read,
    table,
    take,
    take_for_torch,
    tiny,
)


def llama(rope: dict[str, float | str | int] | None = None, **changes: object) -> LlamaConfig:
    rotary = {"rope_parameters": {"rope_theta": 10_000.0, **rope}} if rope else {}
    return LlamaConfig(**{**SIZES, **rotary, **changes})


CONFIGS: dict[str, PretrainedConfig] = {
    "Llama": llama(),
    "tied head": llama(tie_word_embeddings=True),
    "biases": llama(attention_bias=True, mlp_bias=True),
    "wide heads": llama(head_dim=48, num_attention_heads=2, num_key_value_heads=1, vocab_size=77),
    "Llama 3.1's rotary embedding": llama(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "linear rotary embedding": llama({"rope_type": "linear", "factor": 4.0}),
    "yarn": llama({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128}),
    "Mistral": MistralConfig(**{**SIZES, "sliding_window": None}),
    "Mistral with a window as long as the context": MistralConfig(**{**SIZES, "sliding_window": 2048}),
    "Qwen 2": Qwen2Config(**{**SIZES, "tie_word_embeddings": True}),
    "Qwen 2, untied": Qwen2Config(**SIZES),
}
PATHS = {"kernel": take, "torch": take_for_torch}


@pytest.fixture(params=PATHS)
def take_weights(request: pytest.FixtureRequest) -> Callable[[PreTrainedModel], Weights]:
    if request.param == "kernel" and kernel.library() is None:
        pytest.skip("needs a C compiler")
    return PATHS[request.param]


@cache
def reference(name: str) -> PreTrainedModel:
    model = tiny(CONFIGS[name])
    assert (model.config.tie_word_embeddings is True) == (name in ("tied head", "Qwen 2"))
    return model


def in_garbage(weights: Weights, num_blocks: int) -> Llama:
    """A model whose memory holds NaN to begin with."""
    model = Llama(weights, num_blocks)
    fill_with(model, float("nan"))
    return model


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_in_chunks_and_the_steps_after_it_equal_transformers_forward(
    name: str, take_weights: Callable[[PreTrainedModel], Weights]
) -> None:
    ids, blocks = random_ids(300, vocabulary=77), table(300)
    expected = expected_logits(reference(name), ids)
    ours = in_garbage(take_weights(reference(name)), len(blocks))

    for start, end in pairwise([0, 1, 16, 40, 230, 290]):  # whole blocks and parts, short and long
        ours.prefill(ids[start:end], start, blocks)
    logits = torch.cat([ours.decode([ids[at]], [at], [blocks]) for at in range(290, 300)])

    assert expected.std() > 0.5  # else everything would be close
    assert_close(logits, expected[290:])


@pytest.mark.parametrize("name", ["Llama", "Qwen 2"])
def test_sequences_of_very_different_lengths_share_a_step(
    name: str, take_weights: Callable[[PreTrainedModel], Weights]
) -> None:
    lengths = (1, 2, 16, 17, 33, 150, 160, 600, 1100)
    texts = [random_ids(length, seed=length) for length in lengths]
    tables: list[list[int]] = []
    for length in lengths:
        tables.append(table(length, first=sum(map(len, tables))))
    ours = in_garbage(take_weights(reference(name)), sum(map(len, tables)))
    for ids, blocks in zip(texts, tables, strict=True):
        read(ours, ids[:-1], blocks)

    logits = ours.decode([ids[-1] for ids in texts], [length - 1 for length in lengths], tables)

    assert_close(logits, torch.stack([expected_logits(reference(name), ids)[-1] for ids in texts]))


def test_what_another_left_in_a_block_does_not_reach_a_sequence(
    take_weights: Callable[[PreTrainedModel], Weights],
) -> None:
    """In torch, a weight of zero times NaN was NaN: one request that overflowed spoiled the next one in its block."""
    ids, weights = random_ids(20), take_weights(reference("Llama"))
    steps = []
    for garbage in (0.0, float("nan"), float("inf"), -1e30):
        ours = Llama(weights, 6)
        fill_with(ours, garbage)
        for blocks in ([0, 1], [2, 3, 4]):
            read(ours, ids[:-1], blocks)
        # A short one beside a longer one, which it is padded to.
        steps.append(ours.decode([ids[-1], ids[-1], ids[0]], [19, 35, 0], [[0, 1], [2, 3, 4], [5]])[[0, 2]])

    assert steps[0].isfinite().all()
    assert all(torch.equal(step, steps[0]) for step in steps)


def test_keys_and_values_of_a_shared_block_are_read_by_all_and_changed_by_none(
    take_weights: Callable[[PreTrainedModel], Weights],
) -> None:
    ours = in_garbage(take_weights(reference("Llama")), 8)
    head, tails = random_ids(32), [random_ids(10, seed=seed) for seed in (2, 3)]
    read(ours, head, [3, 1])
    before = [tensor[[3, 1]].clone() for tensor in (*ours._keys, *ours._values)]

    for tail, own in zip(tails, (5, 6), strict=True):
        read(ours, [*head, *tail[:-1]], [3, 1, own], start=32)
    logits = ours.decode([tail[-1] for tail in tails], [41, 41], [[3, 1, 5], [3, 1, 6]])

    assert_close(logits, torch.stack([expected_logits(reference("Llama"), [*head, *tail])[-1] for tail in tails]))
    after = [tensor[[3, 1]] for tensor in (*ours._keys, *ours._values)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_text_read_again_in_the_same_chunks_is_the_same_to_the_last_bit(
    take_weights: Callable[[PreTrainedModel], Weights],
) -> None:
    ids, ours = random_ids(300), in_garbage(take_weights(reference("Llama")), 40)
    tables = [table(300), table(300, first=20)]
    for blocks in tables:
        read(ours, ids[:-1], blocks)

    alone, beside = (ours.decode([ids[-1]], [299], [blocks])[0] for blocks in tables)

    assert torch.equal(alone, beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_close(dtype: torch.dtype, take_weights: Callable[[PreTrainedModel], Weights]) -> None:
    model, ids, blocks = in_dtype(reference("Llama"), dtype), random_ids(60), table(60)
    ours = in_garbage(take_weights(model), len(blocks))
    read(ours, ids[:-1], blocks)

    logits = ours.decode([ids[-1]], [59], [blocks])

    expected = expected_logits(in_dtype(model, torch.float32), ids)[-1:]
    assert ours.weights.is_packed == (dtype == torch.bfloat16 and take_weights is take)
    assert_close(logits, expected, 0.1 if dtype == torch.bfloat16 else 0.01)


@pytest.fixture(scope="module")
def embedded_model(embedded: ModelFiles) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded.directory, dtype=torch.float32)
    return model.requires_grad_(False)


def test_the_embedded_model_equals_transformers_forward(
    embedded_model: PreTrainedModel, take_weights: Callable[[PreTrainedModel], Weights]
) -> None:
    ids, blocks = random_ids(72, vocabulary=49_152), table(72)
    ours = in_garbage(take_weights(embedded_model), len(blocks))

    read(ours, ids[:60], blocks, chunk=40)
    logits = torch.cat([ours.decode([ids[at]], [at], [blocks]) for at in range(60, 72)])

    assert_close(logits, expected_logits(embedded_model, ids)[60:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_a_gpu_computes_the_same(dtype: torch.dtype, tolerance: float) -> None:
    model: Any = in_dtype(reference("Llama"), dtype)
    texts, tables = [random_ids(300), random_ids(20)], [table(300), [19, 20]]
    ours = in_garbage(take(model.to("cuda")), 21)
    for ids, blocks in zip(texts, tables, strict=True):
        read(ours, ids[:-1], blocks)

    logits = ours.decode([ids[-1] for ids in texts], [299, 19], tables)

    exact = in_dtype(model.cpu(), torch.float32)
    assert_close(logits.cpu(), torch.stack([expected_logits(exact, ids)[-1] for ids in texts]), tolerance)


def test_memory_is_not_taken_before_it_is_used() -> None:
    """Zeros were written to all of it: an eighth of the machine's memory, before anybody had asked for anything."""
    weights, process = take(reference("Llama")), psutil.Process()
    num_blocks = 2**29 // (2 * 2 * 16 * 2 * 16 * 4)
    before = process.memory_info().rss

    ours = Llama(weights, num_blocks)

    assert sum(tensor.nbytes for tensor in (*ours._keys, *ours._values)) >= 2**29 - 2**16
    assert process.memory_info().rss - before < 2**26


@pytest.mark.parametrize(
    ("positions", "groups"),
    [
        ([5], [[0]]),
        ([0, 0, 0], [[0, 1, 2]]),
        ([99, 49, 50, 10], [[0, 2, 1], [3]]),
        ([6000, 20, 30, 25], [[0], [2, 3, 1]]),
        ([0, 1, 3, 7, 15], [[4, 3], [2, 1], [0]]),
    ],
)
def test_rows_are_grouped_by_length(positions: list[int], groups: list[list[int]]) -> None:
    assert groups_of_similar_length(positions) == groups


def test_padding_at_most_doubles_the_work() -> None:
    positions = random_ids(64, vocabulary=8192)

    groups = groups_of_similar_length(positions)

    assert sorted(row for group in groups for row in group) == list(range(64))
    lengths = [[positions[row] + 1 for row in group] for group in groups]
    assert all(min(group) >= NARROW * max(group) for group in lengths)
    assert sum(len(group) * max(group) for group in lengths) <= sum(map(sum, lengths)) / NARROW
