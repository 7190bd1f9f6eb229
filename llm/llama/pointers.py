"""Checks of what is passed to compiled code: tensors as pointers, and whole numbers.

C reads and writes what it is given: a tensor of another dtype, device, layout or size ends the process, or changes
other data. Knows tensors; knows no models.
"""

import torch
from torch import Tensor


class KernelArgumentError(ValueError):
    """An argument of the compiled kernel is not what the C code expects: a fault of the program, not of a user."""


def pointer(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a contiguous tensor in the CPU's memory, of exactly this dtype and shape.

    Raises:
        KernelArgumentError: It is something else. The message names the argument, what was expected, and what it is.
    """
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or not tensor.is_contiguous()
        or tensor.is_neg()
        or (address := tensor.data_ptr()) % dtype.itemsize
    ):
        raise KernelArgumentError(
            f"{name}: expected a contiguous and aligned tensor of {dtype} {shape} on cpu, got {_described(tensor)}"
        )
    return address


def number(name: str, value: int, least: int, most: int) -> int:
    """A whole number within limits, both included. Raises `KernelArgumentError` if it is not."""
    if not least <= value <= most:
        raise KernelArgumentError(f"{name}: must be from {least} to {most}, got {value}")
    return value


def equal(name: str, value: int, expected: int) -> int:
    """A whole number that follows from others. Raises `KernelArgumentError` if it does not."""
    if value != expected:
        raise KernelArgumentError(f"{name}: must be {expected}, got {value}")
    return value


def _described(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided:
        return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, layout {tensor.layout}"
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
