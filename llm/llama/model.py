"""A Llama's forward over paged keys and values: by the CPU's kernel where there is one, else in torch.

Knows tensors, layers and blocks of memory. Knows no requests: which blocks are whose is said with every call.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llm.llama.blocks import BLOCK
from llm.llama.kernel import Kernel
from llm.llama.matrix import PackedMatrix
from llm.llama.weights import LayerWeights, Projection, Weights

FEW = 16
"""Products of fewer rows are filled up: for few rows torch adds up in another order, and what a token's keys and values
are must not depend on how many tokens were read with it."""
NARROW = 0.5
"""Rows of a torch decode step are padded to one length where the shortest has at least this part of the longest."""


class Llama:
    """Weights, and memory for the keys and values of `num_blocks` blocks of 16 tokens."""

    def __init__(self, weights: Weights, num_blocks: int) -> None:
        self.weights = weights
        self.num_blocks = num_blocks
        shape = (num_blocks, weights.kv_heads, weights.head_dim, BLOCK)
        # Not zeros, which would take all of the memory at once.
        self._keys = [torch.empty(shape, dtype=weights.dtype, device=layer.device) for layer in weights.layers]
        # Values lie the other way round, so that both products of attention read memory in order.
        self._values = [keys.new_empty(*shape[:2], BLOCK, weights.head_dim) for keys in self._keys]
        self._kernel = Kernel(weights, self._keys, self._values) if weights.is_packed else None

    @torch.inference_mode()
    def prefill(self, ids: list[int], start: int, blocks: list[int]) -> None:
        """Compute the keys and values of `ids`, which are at the positions from `start` on.

        Those of all earlier positions are in `blocks` already, where there is room for these too.
        """
        if self._kernel is not None:
            x = self._embed(ids)
            self._kernel.prefill(x, start, blocks)
        else:
            self._prefill(ids, start, blocks)

    def _prefill(self, ids: list[int], start: int, blocks: list[int]) -> None:
        weights, end = self.weights, start + len(ids)
        device = weights.embedding.device
        positions = torch.arange(start, end, device=device)
        table = torch.tensor(blocks[: -(-end // BLOCK)], dtype=torch.int64, device=device)
        turns = _turns(weights, positions)
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=weights.dtype, device=device).triu_(1)
        x = functional.embedding(torch.tensor(ids, dtype=torch.int64, device=device), weights.embedding)
        for number, layer in enumerate(weights.layers):
            x, table, positions, mask = (tensor.to(layer.device) for tensor in (x, table, positions, mask))
            q, k, v = self._qkv(layer, x, turns)
            self._write(number, table[positions // BLOCK], positions % BLOCK, k, v)
            if number == len(weights.layers) - 1:
                return  # nobody asks for what comes after the last keys and values
            keys, values = self._read(number, table, end)
            mixed = _attend_to_prefix(q, keys, values, mask)
            x = self._rest(layer, x, mixed)

    @torch.inference_mode()
    def decode(self, ids: list[int], positions: list[int], tables: list[list[int]]) -> Tensor:
        """One step for many sequences: the token of each, where it is, and the sequence's blocks.

        Returns logits, float32 (rows, vocabulary).
        """
        if self._kernel is not None:
            x = self._embed(ids)
            return self._kernel.decode(x, positions, tables)
        return self._decode(ids, positions, tables)

    def _decode(self, ids: list[int], positions: list[int], tables: list[list[int]]) -> Tensor:
        weights = self.weights
        device = weights.embedding.device
        x = functional.embedding(torch.tensor(ids, dtype=torch.int64, device=device), weights.embedding)
        where = torch.tensor(positions, dtype=torch.int64, device=device)
        turns = _turns(weights, where)
        own_blocks = [table[at // BLOCK] for table, at in zip(tables, positions, strict=True)]
        current = torch.tensor(own_blocks, dtype=torch.int64, device=device)
        groups = [_Group(rows, positions, tables, device) for rows in groups_of_similar_length(positions)]
        for number, layer in enumerate(weights.layers):
            x, current, where = (tensor.to(layer.device) for tensor in (x, current, where))
            q, k, v = self._qkv(layer, x, turns)
            self._write(number, current, where % BLOCK, k, v)
            mixed = torch.empty_like(q)
            for group in groups:
                group.to(layer.device)
                mixed[group.rows] = group.attend(q[group.rows], self._keys[number], self._values[number])
            x = self._rest(layer, x, mixed)
        x = functional.rms_norm(x.to(weights.norm.device), (weights.hidden,), weights.norm, weights.epsilon)
        return self._project(weights.head, x).float()

    def _embed(self, ids: list[int]) -> Tensor:
        """What the kernel begins with: float32 (tokens, hidden), which it may overwrite."""
        embedding = self.weights.embedding
        return functional.embedding(torch.tensor(ids, dtype=torch.int64, device=embedding.device), embedding).float()

    # The parts of a layer. `x` has the shape (tokens, hidden).

    def _qkv(self, layer: LayerWeights, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled), keys and values: (tokens, heads, head_dim)."""
        weights = self.weights
        heads, kv_heads = weights.heads, weights.kv_heads
        qkv = torch.unflatten(self._project(layer.qkv, self._norm(x, layer.attention_norm)), 1, (-1, weights.head_dim))
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        cosines, sines = (turn.to(layer.device) for turn in turns)
        q = _turn(q, cosines, sines) * weights.head_dim**-0.5
        return q.to(x.dtype), _turn(k, cosines, sines).to(x.dtype), v

    def _rest(self, layer: LayerWeights, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention."""
        x = x + self._project(layer.out, mixed.flatten(1))
        gate, up = self._project(layer.gate_up, self._norm(x, layer.mlp_norm)).chunk(2, dim=1)
        return x + self._project(layer.down, functional.silu(gate) * up)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (self.weights.hidden,), weight.to(x.dtype), self.weights.epsilon)

    def _project(self, projection: Projection, x: Tensor) -> Tensor:
        matrix = projection.matrix
        assert not isinstance(matrix, PackedMatrix), "packed weights are the kernel's"
        if len(x) < FEW:
            return functional.linear(functional.pad(x, (0, 0, 0, FEW - len(x))), matrix, projection.bias)[: len(x)]
        return functional.linear(x, matrix, projection.bias)

    def _write(self, layer: int, blocks: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self._keys[layer].permute(0, 3, 1, 2)[blocks, slots] = k
        self._values[layer].transpose(1, 2)[blocks, slots] = v

    def _read(self, layer: int, table: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Keys (kv_heads, head_dim, tokens) and values (kv_heads, tokens, head_dim) of one sequence."""
        keys = self._keys[layer][table].permute(1, 2, 0, 3).flatten(2)
        values = self._values[layer][table].transpose(0, 1).flatten(1, 2)
        return keys[:, :, :end], values[:, :end]


def groups_of_similar_length(positions: list[int]) -> list[list[int]]:
    """Rows in groups, so that padding to a group's longest at most doubles its work."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(positions)), key=lambda row: -positions[row]):
        if not groups or positions[row] + 1 < NARROW * longest:
            groups.append([])
            longest = positions[row] + 1
        groups[-1].append(row)
    return groups


class _Group:
    """Rows of a decode step whose keys are padded to one length."""

    def __init__(self, rows: list[int], positions: list[int], tables: list[list[int]], device: torch.device) -> None:
        num_blocks = max(positions[row] for row in rows) // BLOCK + 1
        padded = [(tables[row] + [tables[row][0]] * num_blocks)[:num_blocks] for row in rows]
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._tables = torch.tensor(padded, dtype=torch.int64, device=device)
        lengths = torch.tensor([positions[row] + 1 for row in rows], dtype=torch.int64, device=device)
        self._is_beyond = torch.arange(num_blocks * BLOCK, device=device) >= lengths[:, None]

    def to(self, device: torch.device) -> None:
        """Follow the layers to their device."""
        self.rows, self._tables, self._is_beyond = (
            tensor.to(device) for tensor in (self.rows, self._tables, self._is_beyond)
        )

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(rows, heads, head_dim) for queries of the same shape."""
        kv_heads = keys.shape[1]
        grouped = torch.unflatten(q, 1, (kv_heads, -1))
        own_keys = keys[self._tables].permute(0, 2, 3, 1, 4).flatten(3)
        own_values = values[self._tables].transpose(1, 2).flatten(2, 3)
        # What is beyond may be anything, and a weight of zero does not take NaN or infinity away.
        own_values.masked_fill_(self._is_beyond[:, None, :, None], 0)
        scores = (grouped @ own_keys).masked_fill_(self._is_beyond[:, None, None], -torch.inf)
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ own_values).flatten(1, 2)


def _attend_to_prefix(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Queries (tokens, heads, head_dim) of the last tokens of a sequence, over all up to themselves.

    `mask`, which is added to the scores among themselves, is -inf above its diagonal.

    The heads that share keys and values are stacked in one plain product: on CPUs that is several times as quick as
    torch's `scaled_dot_product_attention`.
    """
    num_tokens, kv_heads = q.shape[0], keys.shape[0]
    grouped = torch.unflatten(q, 1, (kv_heads, -1)).permute(1, 2, 0, 3)
    scores = torch.unflatten(grouped.flatten(1, 2) @ keys, 1, (-1, num_tokens))
    scores[..., -num_tokens:] += mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    mixed = torch.unflatten(weights.flatten(1, 2) @ values, 1, (-1, num_tokens))
    return mixed.permute(2, 0, 1, 3).flatten(1, 2)


def _turns(weights: Weights, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens at these positions: float32 (tokens, 1, head_dim / 2)."""
    return weights.cosines[positions][:, None], weights.sines[positions][:, None]


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in the layout of transformers: halves, not pairs. float32."""
    a, b = heads.float().chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)
