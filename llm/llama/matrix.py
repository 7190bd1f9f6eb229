"""Weight matrices as the CPU's kernel reads them: in panels of 16 outputs, as they are or in groups of few bits.

Knows number formats and layouts; knows no layers and no models. The layouts are those of `native/products.h`.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 16
"""Outputs that are stored side by side."""
GROUP = 32
"""Inputs that share a scale in quantised formats."""


class Format(IntEnum):
    """How a weight is stored; the numbers are those of `native/vectors.h`."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    """Symmetric: weight = scale * q, q from -127 to 127. The grid of GGUF's Q8_0."""
    INT4 = 3
    """Between a group's least and greatest weight: weight = scale * q + minimum, q from 0 to 15. The grid of GGUF's
    Q4_1, whose weights come through unchanged."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix of (outputs, inputs), packed."""

    format: Format
    outputs: int
    inputs: int
    weights: Tensor
    """FLOAT32: (panels, inputs, 16). Else 32-bit words of (panels, inputs / inputs per word, 16); a word holds inputs
    that follow one another, from its low end up. The kernel reads panels two at a time, so their number is even."""
    is_interleaved: bool
    """The panels of the first half of the outputs and those of the second half take turns."""
    scales: Tensor | None
    """float16. INT8: (panels, groups, 1, 16). INT4: (panels, groups, 2, 16), scale and minimum."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def unpack(self) -> Tensor:
        """The matrix, float32 (outputs, inputs)."""
        if self.format is Format.FLOAT32:
            panels = self.weights
        elif self.format is Format.BFLOAT16:
            panels = _from_words(self.weights, 16).to(torch.int16).view(torch.bfloat16).float()
        else:
            assert self.scales is not None
            q = _from_words(self.weights, _BITS[self.format])
            groups = torch.unflatten(q, 1, (self.inputs // GROUP, GROUP))
            scales = self.scales.float()[:, :, :, None]
            if self.format is Format.INT8:
                groups = torch.where(groups > 127, groups - 256, groups) * scales[:, :, 0]
            else:
                groups = groups * scales[:, :, 0] + scales[:, :, 1]
            panels = groups.flatten(1, 2)
        if self.is_interleaved:
            panels = torch.unflatten(panels, 0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        return panels.transpose(1, 2).reshape(-1, self.inputs)[: self.outputs]


def pack(matrix: Tensor, format: Format, *, interleave: bool = False) -> PackedMatrix:  # noqa: A002
    """Pack a matrix of (outputs, inputs). Quantised formats need inputs in groups of 32, bfloat16 in pairs.

    `interleave` lets the panels of the two halves of the outputs take turns, which must be whole panels then.
    """
    outputs, inputs = matrix.shape
    if inputs % (GROUP if format in _BITS else 2 if format is Format.BFLOAT16 else 1):
        raise ValueError(f"{inputs} inputs are no whole number of groups for {format.name}")
    if interleave and outputs % (2 * PANEL):
        raise ValueError(f"{outputs} outputs are no two halves of whole panels")
    panels = pad(matrix, (0, 0, 0, -outputs % (2 * PANEL))).view(-1, PANEL, inputs).transpose(1, 2)
    if interleave:
        panels = torch.unflatten(panels, 0, (2, -1)).transpose(0, 1).flatten(0, 1)
    if format is Format.FLOAT32:
        return PackedMatrix(format, outputs, inputs, panels.float().contiguous(), interleave, None)
    if format is Format.BFLOAT16:
        words = _to_words(panels.bfloat16().contiguous().view(torch.int16), 16)
        return PackedMatrix(format, outputs, inputs, words, interleave, None)
    groups = torch.unflatten(panels.float(), 1, (inputs // GROUP, GROUP))
    if format is Format.INT8:
        scale = (groups.abs().amax(2) / 127).half()
        q = (groups / _divisor(scale)).round().clamp(-127, 127)
        scales = scale[:, :, None]
    else:
        minimum = groups.amin(2).half()
        scale = ((groups.amax(2) - minimum.float()) / 15).half()
        q = ((groups - minimum.float()[:, :, None]) / _divisor(scale)).round().clamp(0, 15)
        scales = torch.stack([scale, minimum], dim=2)
    words = _to_words(q.flatten(1, 2), _BITS[format])
    return PackedMatrix(format, outputs, inputs, words, interleave, scales.contiguous())


_BITS = {Format.INT8: 8, Format.INT4: 4}


def _to_words(panels: Tensor, bits: int) -> Tensor:
    """(panels, inputs, 16) of whole numbers into int32 (panels, inputs / inputs per word, 16)."""
    in_word = 32 // bits
    inputs = torch.unflatten(panels, 1, (-1, in_word)).to(torch.int32) & (1 << bits) - 1
    words = inputs[:, :, 0].clone(memory_format=torch.contiguous_format)
    for number in range(1, in_word):
        words |= inputs[:, :, number] << bits * number
    return words


def _from_words(words: Tensor, bits: int) -> Tensor:
    """What `_to_words` was given, as numbers without a sign."""
    inputs = [words >> bits * number & (1 << bits) - 1 for number in range(32 // bits)]
    return torch.stack(inputs, dim=2).flatten(1, 2)


def _divisor(scale: Tensor) -> Tensor:
    """A scale to divide a group by: one of equal weights has none."""
    scale = scale.float()[:, :, None]
    return torch.where(scale == 0, 1, scale)
