from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm.llama.matrix import GROUP, PANEL, Format, pack

WHOLE = (Format.FLOAT32, Format.BFLOAT16)
QUANTISED = (Format.INT8, Format.INT4)


def random_matrix(outputs: int, inputs: int, *, scale: float = 0.05) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)) * scale


def in_groups(matrix: Tensor) -> Tensor:
    return matrix.reshape(len(matrix), -1, GROUP)


def bound(matrix: Tensor, format: Format) -> Tensor:  # noqa: A002
    """How far off each group may come back: half a step, a float16 rounding of scale and minimum, and its smallest
    steps."""
    groups = in_groups(matrix)
    greatest = groups.abs().amax(-1, keepdim=True)
    spread = 2 * greatest if format is Format.INT8 else groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    half_step = spread / 2 / (254 if format is Format.INT8 else 15)
    return half_step * 1.001 + greatest * 2**-10 + (127 if format is Format.INT8 else 16) * 2**-25


def error(matrix: Tensor, format: Format) -> Tensor:  # noqa: A002
    return in_groups((pack(matrix, format).unpack() - matrix).abs())


def on_q4_1_grid(weights: Tensor) -> Tensor:
    """What a Q4_1 file makes of weights: llama.cpp's `quantize_row_q4_1_ref`, and back, in float32."""
    groups = in_groups(weights)
    minimum = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - minimum) / 15
    q = ((groups - minimum) / scale + 0.5).floor().clamp(0, 15)
    return (q * scale.half().float() + minimum.half().float()).flatten(1)


def on_q8_0_grid(weights: Tensor) -> Tensor:
    """The same for Q8_0."""
    groups = in_groups(weights)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale.half().float()).flatten(1)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 32, 33, 104])
@pytest.mark.parametrize("format", WHOLE)
def test_whole_weights_come_back_as_they_were(format: Format, outputs: int) -> None:  # noqa: A002
    matrix = random_matrix(outputs, 64).bfloat16()

    assert torch.equal(pack(matrix, format).unpack(), matrix.float())


def test_float32_takes_any_number_of_inputs() -> None:
    matrix = random_matrix(20, 37)

    assert torch.equal(pack(matrix, Format.FLOAT32).unpack(), matrix)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 32, 33, 104])
@pytest.mark.parametrize("format", QUANTISED)
def test_quantised_weights_come_back_within_half_a_step(format: Format, outputs: int) -> None:  # noqa: A002
    matrix = random_matrix(outputs, 96)

    assert (error(matrix, format) <= bound(matrix, format)).all()


@pytest.mark.parametrize("format", Format)
def test_weights_packed_again_stay_what_they_are(format: Format) -> None:  # noqa: A002
    once = pack(random_matrix(48, 64).bfloat16(), format).unpack()

    again = pack(once, format).unpack()

    torch.testing.assert_close(again, once, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("format", Format)
def test_interleaving_changes_where_panels_are_and_nothing_else(format: Format) -> None:  # noqa: A002
    matrix = random_matrix(96, 64)

    plain, interleaved = pack(matrix, format), pack(matrix, format, interleave=True)

    assert torch.equal(interleaved.unpack(), plain.unpack())
    assert torch.equal(interleaved.weights[0::2], plain.weights[:3])
    assert torch.equal(interleaved.weights[1::2], plain.weights[3:])


@pytest.mark.parametrize("outputs", [8, 16, 24, 48])
def test_halves_that_are_no_whole_panels_are_not_interleaved(outputs: int) -> None:
    """24 outputs went through as one panel and a half, and came out of the kernel in the wrong places."""
    with pytest.raises(ValueError, match=f"{outputs} outputs"):
        pack(random_matrix(outputs, 32), Format.FLOAT32, interleave=True)


@pytest.mark.parametrize(
    ("format", "inputs"), [(Format.INT4, 48), (Format.INT8, 31), (Format.INT8, 16), (Format.BFLOAT16, 33)]
)
def test_inputs_that_are_no_whole_groups_are_refused(format: Format, inputs: int) -> None:  # noqa: A002
    with pytest.raises(ValueError, match=f"{inputs} inputs .* {format.name}"):
        pack(random_matrix(16, inputs), format)


@pytest.mark.parametrize("outputs", [1, 16, 33, 80])
@pytest.mark.parametrize("format", Format)
def test_the_number_of_panels_is_even(format: Format, outputs: int) -> None:  # noqa: A002
    """The kernel takes them two at a time: with 97 words in the vocabulary it read beyond the last one."""
    packed = pack(random_matrix(outputs, 32), format)

    assert len(packed.weights) % 2 == 0
    assert len(packed.weights) * PANEL >= outputs
    assert packed.scales is None or len(packed.scales) == len(packed.weights)


@pytest.mark.parametrize(("format", "bits"), [(Format.FLOAT32, 32), (Format.BFLOAT16, 16), (Format.INT8, 8.5)])
def test_a_matrix_takes_the_memory_of_its_format(format: Format, bits: float) -> None:  # noqa: A002
    packed = pack(random_matrix(64, 128), format)

    assert packed.num_bytes == 64 * 128 * bits / 8


def test_a_matrix_of_4_bits_takes_5_with_its_scales() -> None:
    assert pack(random_matrix(64, 128), Format.INT4).num_bytes == 64 * 128 * 5 / 8


def test_a_q4_1_file_made_from_bfloat16_is_recovered_exactly() -> None:
    """Whatever bfloat16 has lost in between: the least weight of a group was bfloat16 before, and so is no other."""
    exact = on_q4_1_grid(random_matrix(256, 256).bfloat16().float())
    stored = exact.bfloat16()

    packed = pack(stored, Format.INT4).unpack()

    torch.testing.assert_close(packed, exact, rtol=0, atol=1e-6)
    assert (stored - exact).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("format", "grid"), [(Format.INT4, on_q4_1_grid), (Format.INT8, on_q8_0_grid)], ids=["Q4_1", "Q8_0"]
)
def test_weights_that_were_on_the_grid_come_through_about_as_well_as_bfloat16_holds_them(
    format: Format,  # noqa: A002
    grid: Callable[[Tensor], Tensor],
) -> None:
    """GGUF files are converted to bfloat16 first: what is recovered from there is not much further off than that."""
    exact = grid(random_matrix(256, 256))
    stored = exact.bfloat16().float()
    greatest = in_groups(exact).abs().amax(-1, keepdim=True)

    packed = pack(stored, format).unpack()

    assert (in_groups(packed - stored).abs() <= greatest * 2**-7).all()
    assert (packed - exact).square().mean() <= 2**2 * (stored - exact).square().mean()


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5, 3.140625, -1e-3])
@pytest.mark.parametrize("format", QUANTISED)
def test_a_group_of_equal_weights_has_no_scale_to_divide_by(format: Format, value: float) -> None:  # noqa: A002
    matrix = torch.full((16, GROUP), value)

    torch.testing.assert_close(pack(matrix, format).unpack(), matrix, rtol=2**-10, atol=0)


@pytest.mark.parametrize("value", [1e-9, 1e-6, 1e-3, 1e3, 3e4])
@pytest.mark.parametrize("format", QUANTISED)
def test_tiny_and_huge_weights_stay_within_the_bound(format: Format, value: float) -> None:  # noqa: A002
    """Below float16's smallest numbers they become zeros, which is within the bound, too; never NaN."""
    matrix = random_matrix(16, 64, scale=value / 4)

    assert (error(matrix, format) <= bound(matrix, format)).all()


@pytest.mark.parametrize("format", QUANTISED)
def test_one_huge_weight_costs_its_own_group_only(format: Format) -> None:  # noqa: A002
    matrix = random_matrix(16, 128)
    matrix[3, 40] = 6e4

    off = error(matrix, format)

    assert (off <= bound(matrix, format)).all()
    assert (off[3, [0, 2, 3]] < 0.01).all()
