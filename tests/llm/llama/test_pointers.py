"""What is passed to compiled code is checked first."""

import pytest
import torch
from torch import Tensor

from llm.llama.pointers import KernelArgumentError, equal, number, pointer


def test_a_tensor_as_expected_gives_its_address() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.float32)

    assert pointer("x", tensor, torch.float32, (2, 3)) == tensor.data_ptr()


UNFIT = {
    "another dtype": torch.zeros(2, 3, dtype=torch.bfloat16),
    "a wider dtype": torch.zeros(2, 3, dtype=torch.float64),
    "too small": torch.zeros(2, 2),
    "another shape of the same size": torch.zeros(3, 2),
    "fewer dimensions": torch.zeros(6),
    "transposed": torch.zeros(3, 2).T,
    "every other column": torch.zeros(2, 6)[:, ::2],
    "expanded": torch.zeros(1, 3).expand(2, 3),
    "on another device": torch.zeros(2, 3, device="meta"),
    "sparse": torch.zeros(2, 3).to_sparse(),
    "negated on reading": torch.zeros(2, 3, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("tensor", UNFIT.values(), ids=UNFIT)
def test_any_other_tensor_is_refused_with_what_was_expected_and_what_it_is(tensor: Tensor) -> None:
    with pytest.raises(KernelArgumentError, match=r"mlp: expected .* torch.float32 \(2, 3\) on cpu, got torch"):
        pointer("mlp", tensor, torch.float32, (2, 3))


def test_a_tensor_at_an_odd_address_is_refused() -> None:
    buffer = bytearray(29)
    odd = torch.frombuffer(buffer, dtype=torch.float32, count=6, offset=1).view(2, 3)

    with pytest.raises(KernelArgumentError, match="x: expected a contiguous and aligned tensor"):
        pointer("x", odd, torch.float32, (2, 3))


@pytest.mark.parametrize("value", [-1, 8])
def test_a_number_outside_its_limits_is_refused(value: int) -> None:
    assert number("block", 0, 0, 7) == 0
    assert number("block", 7, 0, 7) == 7
    with pytest.raises(KernelArgumentError, match=f"block: must be from 0 to 7, got {value}"):
        number("block", value, 0, 7)


def test_a_number_that_must_follow_from_others_is_checked() -> None:
    assert equal("rows", 3, 3) == 3
    with pytest.raises(KernelArgumentError, match="rows: must be 3, got 4"):
        equal("rows", 4, 3)
