"""How many requests, and how much context, a device has memory for. Knows sizes; knows no requests.

The rule: keys and values get what is free once the weights are there, less a tenth, on a GPU, and an eighth of it on a
CPU, whose memory is everybody's; but no more than all slots could use. They are shared by all requests, so that many
short ones and few long ones both fit. A CPU's memory is not taken before it is used.
"""

from dataclasses import dataclass

import torch

from llm.errors import InvalidOption, NotEnoughMemory
from llm.llama.blocks import BLOCK
from llm.llama.weights import Weights
from llm.loading import available_memory

MAX_SLOTS = 64
"""Requests that run at once, unless it is said otherwise. More only make each other wait: a CPU is busy with 16."""
GPU_SHARE = 0.9
CPU_SHARE = 1 / 8
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided."""

    slots: int
    """Requests that can run at once."""
    context: int
    """Tokens of one request, at most."""
    num_blocks: int
    """Blocks of keys and values, for all together."""


def plan_memory(weights: Weights, *, context: int, max_slots: int | None, is_fixed: bool) -> Plan:
    """Divide up what is free.

    Args:
        weights: In memory already.
        context: Tokens of one request that are wanted.
        max_slots: Requests that are to run at once; None: as many as make sense.
        is_fixed: The context is to be as it is. Else it may be less, if there is no room for more.

    Raises:
        InvalidOption: `max_slots` is none.
        NotEnoughMemory: There is no room for one request.
    """
    if max_slots is not None and max_slots < 1:
        raise InvalidOption("max_slots", "at least 1", max_slots)
    slots = max_slots or MAX_SLOTS
    affordable = _affordable_blocks(weights)
    needed = -(-context // BLOCK)
    if affordable < (needed if is_fixed else 1):
        raise NotEnoughMemory(
            f"one request of {context} tokens needs {needed * _block_bytes(weights) / _MIB:.0f} MiB for keys and "
            f"values, and there are {max(0, affordable) * _block_bytes(weights) / _MIB:.0f} MiB for them: set a lower "
            "SERVE_MAX_CONTEXT",
            needed=needed * _block_bytes(weights),
            available=affordable * _block_bytes(weights),
        )
    num_blocks = min(affordable, slots * needed)
    return Plan(slots=min(slots, num_blocks), context=min(context, num_blocks * BLOCK), num_blocks=num_blocks)


def _affordable_blocks(weights: Weights) -> int:
    """Blocks that every device has room for, each for the layers that lie on it."""
    num_layers: dict[torch.device, int] = {}
    for layer in weights.layers:
        num_layers[layer.device] = num_layers.get(layer.device, 0) + 1
    shares = {device: GPU_SHARE if device.type == "cuda" else CPU_SHARE for device in num_layers}
    per_layer = _block_bytes(weights) // len(weights.layers)
    return min(
        int(available_memory(device) * shares[device] / (count * per_layer)) for device, count in num_layers.items()
    )


def _block_bytes(weights: Weights) -> int:
    """Keys and values of one block, in all layers."""
    return 2 * len(weights.layers) * BLOCK * weights.kv_heads * weights.head_dim * weights.dtype.itemsize
