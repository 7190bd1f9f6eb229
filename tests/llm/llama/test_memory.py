from dataclasses import replace

import pytest
import torch

from llm.errors import InvalidOption, NotEnoughMemory
from llm.llama import memory
from llm.llama.memory import MAX_SLOTS, plan_memory
from llm.llama.weights import Weights
from tests.llm.llama.tiny_models import take, tiny

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
LAYER = 2 * 16 * 2 * 16 * 4
"""Bytes that a block takes in one layer: keys and values of 16 tokens, two heads of 16, float32."""


def weights(*devices: torch.device) -> Weights:
    """Of a model with one layer on each."""
    taken = take(tiny(num_hidden_layers=len(devices)))
    layers = tuple(replace(layer, device=device) for layer, device in zip(taken.layers, devices, strict=True))
    return replace(taken, layers=layers)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, int]:
    """Bytes that devices have free."""
    sizes: dict[torch.device, int] = {}
    monkeypatch.setattr(memory, "available_memory", sizes.__getitem__)
    return sizes


def test_much_memory_holds_the_whole_context_of_every_slot_and_no_more(free: dict[torch.device, int]) -> None:
    free[CPU] = 2**40

    plan = plan_memory(weights(CPU), context=1000, max_slots=None, is_fixed=False)

    assert (plan.slots, plan.context, plan.num_blocks) == (MAX_SLOTS, 1000, MAX_SLOTS * 63)


def test_a_cpu_gives_an_eighth_of_what_is_free(free: dict[torch.device, int]) -> None:
    free[CPU] = 8 * 100 * LAYER

    plan = plan_memory(weights(CPU), context=1000, max_slots=None, is_fixed=False)

    assert (plan.slots, plan.context, plan.num_blocks) == (MAX_SLOTS, 1000, 100)


def test_a_gpu_gives_all_but_a_tenth(free: dict[torch.device, int]) -> None:
    free[FIRST] = 100 * LAYER

    assert plan_memory(weights(FIRST), context=1000, max_slots=None, is_fixed=False).num_blocks == 90


def test_a_block_takes_memory_in_every_layer(free: dict[torch.device, int]) -> None:
    free[CPU] = 8 * 100 * LAYER

    assert plan_memory(weights(CPU, CPU, CPU, CPU), context=1000, max_slots=None, is_fixed=False).num_blocks == 25


def test_narrow_keys_and_values_take_half(free: dict[torch.device, int]) -> None:
    free[CPU] = 8 * 100 * LAYER
    narrow = replace(weights(CPU), dtype=torch.bfloat16)

    assert plan_memory(narrow, context=8000, max_slots=None, is_fixed=False).num_blocks == 200


@pytest.mark.parametrize(("first", "second", "expected"), [(100, 1000, 45), (1000, 100, 90), (1000, 1000, 450)])
def test_of_several_devices_the_fullest_decides(
    free: dict[torch.device, int], first: int, second: int, expected: int
) -> None:
    """Two layers lie on the first one, one on the second."""
    free |= {FIRST: first * LAYER, SECOND: second * LAYER}

    plan = plan_memory(weights(FIRST, FIRST, SECOND), context=8000, max_slots=None, is_fixed=False)

    assert plan.num_blocks == expected


def test_little_memory_lowers_the_context(free: dict[torch.device, int]) -> None:
    free[CPU] = 8 * 10 * LAYER

    plan = plan_memory(weights(CPU), context=1000, max_slots=None, is_fixed=False)

    assert (plan.context, plan.num_blocks) == (160, 10)
    assert plan.slots == 10  # a request takes a block at least


def test_a_context_that_somebody_asked_for_is_kept(free: dict[torch.device, int]) -> None:
    free[CPU] = 8 * 63 * LAYER

    plan = plan_memory(weights(CPU), context=1000, max_slots=None, is_fixed=True)

    assert (plan.context, plan.num_blocks) == (1000, 63)


def test_a_context_that_somebody_asked_for_and_that_does_not_fit_is_refused_with_the_numbers(
    free: dict[torch.device, int],
) -> None:
    free[CPU] = 8 * 512 * LAYER  # 2 MiB

    with pytest.raises(
        NotEnoughMemory, match=r"16384 tokens needs 4 MiB .* 2 MiB for them.*SERVE_MAX_CONTEXT"
    ) as error:
        plan_memory(weights(CPU), context=16_384, max_slots=None, is_fixed=True)

    assert (error.value.needed, error.value.available) == (2**22, 2**21)


@pytest.mark.parametrize("is_fixed", [True, False])
def test_no_memory_is_refused(free: dict[torch.device, int], is_fixed: bool) -> None:
    free[CPU] = 7 * LAYER

    with pytest.raises(NotEnoughMemory, match="there are 0 MiB"):
        plan_memory(weights(CPU), context=1000, max_slots=None, is_fixed=is_fixed)


@pytest.mark.parametrize("max_slots", [1, 3, 200])
def test_as_many_slots_as_somebody_asked_for(free: dict[torch.device, int], max_slots: int) -> None:
    free[CPU] = 2**40

    plan = plan_memory(weights(CPU), context=160, max_slots=max_slots, is_fixed=False)

    assert (plan.slots, plan.num_blocks) == (max_slots, max_slots * 10)


@pytest.mark.parametrize("max_slots", [0, -1])
def test_no_slots_are_refused(free: dict[torch.device, int], max_slots: int) -> None:
    """None was taken for 64, and less than none for memory of a negative size."""
    free[CPU] = 2**40

    with pytest.raises(InvalidOption, match=f"max_slots must be at least 1, got {max_slots}"):
        plan_memory(weights(CPU), context=160, max_slots=max_slots, is_fixed=False)
