"""The books of a paged KV cache: which blocks are in use, by whom, and which tokens they hold.

Knows token ids, owners and the numbers of blocks. Knows neither the memory that the numbers stand for nor when a
sequence's turn is, and takes no locks: it belongs to the engine's thread.

Computed blocks are found again by what they hold, so that a prompt starts from the longest prefix that somebody has
computed already. Only full blocks are shared, and nobody writes to a full block: a shared one never changes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

BLOCK = 16
"""Tokens per block."""

_ROOT = 0
"""Stands for the registration of the block before the first."""

_Key = tuple[int, str | None, tuple[int, ...]]
"""What a registered block is found by: the registration of the block before it, whose it is (None: everybody's), and
its tokens. A registration's number is never given out twice, so that by induction equal keys mean equal prefixes, and
what followed an evicted block cannot be mistaken for anything else."""


@dataclass(slots=True, eq=False)
class BlockTable:
    """One sequence: its tokens, and the blocks that hold their keys and values. Changed by its pool alone."""

    tokens: list[int]
    """The prompt, then what was generated."""
    owner: str
    num_shared: int
    """Leading tokens that are no secret of the owner's."""
    blocks: list[int] = field(default_factory=list)
    """In order. At least `num_filled` tokens fit; none are left once the table is closed."""
    num_filled: int = 0
    """Leading tokens whose keys and values are in the blocks."""
    num_cached: int = 0
    """Tokens that others had computed; this sequence did not have to."""
    tip: int = _ROOT
    """Registration that the first block that is not yet full will continue."""

    def key(self, index: int, parent: int) -> _Key:
        """What the block at `index` is found by when full, given the registration of the one before it."""
        end = (index + 1) * BLOCK
        scope = None if end <= self.num_shared else self.owner
        return parent, scope, tuple(self.tokens[end - BLOCK : end])


class BlockPool:
    """Hands out a fixed number of blocks, and finds those again that hold what somebody needs.

    A block is never used, freed, held by tables, or idle: computed, held by none, and kept for reuse until its place
    is needed. Every step for one block takes the same time, however large the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_touched = 0  # blocks 0 to here were used before; the system has given no memory yet to those beyond
        self._freed: list[int] = []  # the last one freed is the first one used: its memory is likely still at hand
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first one was left longest ago
        self._tables: set[BlockTable] = set()  # open ones
        self._num_holders = [0] * num_blocks
        self._registered: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * num_blocks  # of registered blocks
        self._registrations = [_ROOT] * num_blocks  # of registered blocks
        self._next_registration = count(_ROOT + 1)

    @property
    def num_free(self) -> int:
        """Blocks that can be had: those that hold nothing, and those that are kept only for reuse."""
        return self.num_blocks - self._num_touched + len(self._freed) + len(self._idle)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, held or idle, that the next sequence with their prefix would start from."""
        return len(self._registered)

    def open(self, tokens: Sequence[int], *, owner: str, num_shared: int) -> BlockTable | None:
        """Start a sequence: from the longest prefix in the cache, with room for all of its tokens.

        At least the last token is left to compute, since the next one comes from its logits.

        Args:
            tokens: At least one. After a preemption: the prompt and what was generated so far.
            owner: Who may find the sequence's blocks.
            num_shared: Leading tokens that everybody may know (a chain's own prompt); blocks wholly within them are
                found by all owners.

        Returns:
            None, and nothing has changed, if there are not enough blocks now.
        """
        assert tokens, "a sequence of no tokens"
        assert 0 <= num_shared <= len(tokens), "generated tokens are never everybody's"
        table = BlockTable(list(tokens), owner, num_shared)
        found = self._find_next(table)
        num_idle = sum(not self._num_holders[block] for block in found)  # can be used or evicted, not both
        if _num_blocks(len(tokens)) - len(found) > self.num_free - num_idle:
            return None
        self._tables.add(table)
        self._continue_with(table, found)
        self.grow(table)
        return table

    def adopt(self, table: BlockTable) -> int:
        """Before computing more of a prompt: use what others have computed of it since. Return tokens gained.

        So a batch whose members share a head computes it once, though all were opened when nothing was there yet.
        The table's own blocks, still empty, give way; no block is needed.
        """
        assert table in self._tables, "a closed table"
        if table.num_filled % BLOCK:
            return 0
        found = self._find_next(table)
        self._continue_with(table, found)
        return len(found) * BLOCK

    def append(self, table: BlockTable, token: int) -> None:
        """Add a generated token. It may need a block: see `grow`."""
        assert table in self._tables, "a closed table"
        table.tokens.append(token)

    def grow(self, table: BlockTable) -> bool:
        """Give the table blocks for all of its tokens. False, and nothing has changed, if there are not enough."""
        assert table in self._tables, "a closed table"
        missing = _num_blocks(len(table.tokens)) - len(table.blocks)
        if missing > self.num_free:
            return False
        table.blocks.extend(self._take() for _ in range(missing))
        return True

    def fill(self, table: BlockTable, num_filled: int) -> None:
        """Note that the first `num_filled` tokens are in memory. Blocks that became full can be found from now on."""
        assert table in self._tables, "a closed table"
        assert table.num_filled <= num_filled <= min(len(table.tokens), len(table.blocks) * BLOCK)
        for index in range(table.num_filled // BLOCK, num_filled // BLOCK):
            key, own = table.key(index, table.tip), table.blocks[index]
            block = self._registered.setdefault(key, own)
            if block == own:
                self._keys[own] = key
                self._registrations[own] = next(self._next_registration)
            # Else somebody computed the same at the same time. This table keeps its own copy, which is freed in the
            # end, but what follows is registered as the first one's continuation: it would not be found otherwise.
            table.tip = self._registrations[block]
        table.num_filled = num_filled

    def close(self, table: BlockTable) -> None:
        """Give all blocks back, at whatever point the sequence is. A closed table, or another pool's, is let be.

        Full blocks stay in the cache until their place is needed. The tail goes first: a head is of use without its
        tail, and to more sequences.
        """
        if table not in self._tables:
            return
        self._tables.remove(table)
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks.clear()
        table.num_filled, table.tip = 0, _ROOT

    def clear(self) -> None:
        """Close all tables and forget what the blocks hold, for when the memory is not to be trusted."""
        for table in tuple(self._tables):
            self.close(table)
        while self._idle:
            self._freed.append(self._evict())

    def _find_next(self, table: BlockTable) -> list[int]:
        """Registered blocks that hold the tokens which come next in the table, up to but not with the last token."""
        found = []
        parent = table.tip
        for index in range(table.num_filled // BLOCK, (len(table.tokens) - 1) // BLOCK):
            block = self._registered.get(table.key(index, parent))
            if block is None:
                break
            found.append(block)
            parent = self._registrations[block]
        return found

    def _continue_with(self, table: BlockTable, found: list[int]) -> None:
        """Put full blocks behind the table's full ones, in place of its own empty ones."""
        if not found:
            return
        for block in found:
            self._hold(block)
        first = table.num_filled // BLOCK
        replaced = table.blocks[first : first + len(found)]
        table.blocks[first : first + len(found)] = found
        for block in reversed(replaced):
            self._release(block)
        table.num_filled += len(found) * BLOCK
        table.num_cached += len(found) * BLOCK
        table.tip = self._registrations[found[-1]]

    def _hold(self, block: int) -> None:
        if not self._num_holders[block]:
            del self._idle[block]
        self._num_holders[block] += 1

    def _release(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        if self._keys[block] is None:
            self._freed.append(block)
        else:
            self._idle[block] = None

    def _take(self) -> int:
        """A block for one table to write to: a freed one, else a new one, else the one left idle longest."""
        if self._freed:
            block = self._freed.pop()
        elif self._num_touched < self.num_blocks:
            block = self._num_touched
            self._num_touched += 1
        else:
            block = self._evict()
        self._num_holders[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._keys[block]
        assert key is not None, "idle blocks are registered"
        del self._registered[key]
        self._keys[block] = None
        return block


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)
