from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from tests.bench.limits import Cost, Limits, weight_bytes


def test_the_cost_of_a_token_counts_the_checkpoint_s_parameters(tiny_llama3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters() if tensor.ndim == 2}

    cost = Cost.of(tiny_llama3, weight_bytes=1)

    assert cost.layer_parameters == sum(size for name, size in sizes.items() if ".layers." in name)
    assert cost.head_parameters == sizes["lm_head.weight"]


def test_a_step_reads_all_weights_but_the_embedding(tiny_llama3: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    stored = sum(weight.nbytes for weight in linear)

    assert stored <= weight_bytes(str(tiny_llama3)) < 1.1 * stored  # outputs are filled up to whole panels


def test_what_limits_decode_is_reading_for_few_rows_and_arithmetic_for_many() -> None:
    cost = Cost(
        layer_parameters=900, head_parameters=100, weight_bytes=2000, kv_bytes=0, attention_flops=0
    )  # fmt: skip
    limits = Limits(device="cpu", read_bytes_per_s=2000, copy_bytes_per_s=1, bfloat16_flops=8000, float32_flops=1)

    assert cost.decode_limit(limits, rows=1, context=0) == pytest.approx(1)
    assert cost.decode_limit(limits, rows=4, context=0) == pytest.approx(4)
    assert cost.decode_limit(limits, rows=64, context=0) == pytest.approx(4)
