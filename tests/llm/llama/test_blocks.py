from collections import Counter
from collections.abc import Iterator
from itertools import chain

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm.llama.blocks import BLOCK, BlockPool, BlockTable


def open_table(pool: BlockPool, tokens: list[int], *, owner: str = "anna", num_shared: int = 0) -> BlockTable:
    table = pool.open(tokens, owner=owner, num_shared=num_shared)
    assert table is not None
    return table


def compute(pool: BlockPool, tokens: list[int], *, owner: str = "anna", num_shared: int = 0) -> BlockTable:
    """A sequence whose prompt is in memory."""
    table = open_table(pool, tokens, owner=owner, num_shared=num_shared)
    pool.fill(table, len(tokens))
    return table


def decode(pool: BlockPool, table: BlockTable, tokens: list[int]) -> None:
    for token in tokens:
        pool.append(table, token)
        assert pool.grow(table)
        pool.fill(table, len(table.tokens))


def text(num_blocks: int, start: int = 0) -> list[int]:
    """As many whole blocks of tokens, no two the same."""
    return list(range(start, start + num_blocks * BLOCK))


def cached(pool: BlockPool, tokens: list[int], *, owner: str = "anna", num_shared: int = 0) -> int:
    """Tokens that a new sequence would start from."""
    table = open_table(pool, tokens, owner=owner, num_shared=num_shared)
    pool.close(table)
    return table.num_cached


def test_a_second_turn_starts_from_the_first_turn_and_its_answer() -> None:
    pool = BlockPool(16)
    first = compute(pool, text(2))
    decode(pool, first, text(1, start=500))
    pool.close(first)

    second = open_table(pool, [*text(2), *text(1, start=500), 7, 8, 9])

    assert second.num_cached == second.num_filled == 3 * BLOCK
    assert len(second.blocks) == 4


def test_a_running_request_s_prefix_is_found_too() -> None:
    pool = BlockPool(16)
    running = compute(pool, [*text(2), 1])

    other = open_table(pool, [*text(2), 2])

    assert other.blocks[:2] == running.blocks[:2]
    assert other.blocks[2] != running.blocks[2]


def test_a_batch_with_a_shared_head_computes_it_once() -> None:
    pool = BlockPool(64)
    batch = [open_table(pool, [*text(4), 1000 + member]) for member in range(5)]
    num_free = pool.num_free
    assert not any(table.num_cached for table in batch)

    assert pool.adopt(batch[0]) == 0
    pool.fill(batch[0], 2 * BLOCK)
    assert [pool.adopt(table) for table in batch[1:]] == [2 * BLOCK] * 4
    pool.fill(batch[1], 4 * BLOCK)  # whoever has the turn goes on
    assert [pool.adopt(table) for table in batch] == [2 * BLOCK, 0, 2 * BLOCK, 2 * BLOCK, 2 * BLOCK]

    assert all(table.blocks[:4] == batch[0].blocks[:4] for table in batch)
    assert len({table.blocks[4] for table in batch}) == 5
    assert pool.num_free == num_free + 4 * 4


def test_nothing_is_adopted_in_the_middle_of_a_block() -> None:
    pool = BlockPool(16)
    slow, quick = open_table(pool, text(3)), open_table(pool, text(3))
    pool.fill(slow, 1)
    pool.fill(quick, 3 * BLOCK)

    assert pool.adopt(slow) == 0
    pool.fill(slow, BLOCK)
    assert pool.adopt(slow) == BLOCK


def test_owners_do_not_see_each_other_s_blocks() -> None:
    pool = BlockPool(16)
    compute(pool, text(3), owner="anna")

    assert cached(pool, text(3), owner="anna") == 2 * BLOCK
    assert cached(pool, text(3), owner="bert") == 0
    assert cached(pool, text(3), owner="") == 0


def test_owners_share_the_blocks_of_a_chain_s_own_prompt_and_no_others() -> None:
    pool = BlockPool(32)
    num_shared = 2 * BLOCK + 3  # the third block is partly the owner's
    compute(pool, text(5), owner="anna", num_shared=num_shared)

    bert = compute(pool, text(5), owner="bert", num_shared=num_shared)

    assert bert.num_cached == 2 * BLOCK
    assert cached(pool, text(5), owner="anna", num_shared=num_shared) == 4 * BLOCK
    assert cached(pool, text(5), owner="bert", num_shared=num_shared) == 4 * BLOCK


def test_what_was_computed_as_private_does_not_become_public() -> None:
    pool = BlockPool(16)
    compute(pool, text(3), owner="anna")

    assert cached(pool, text(3), owner="bert", num_shared=3 * BLOCK) == 0
    assert cached(pool, text(3), owner="anna", num_shared=3 * BLOCK) == 0


def test_the_same_tokens_behind_another_prefix_are_another_block() -> None:
    pool = BlockPool(16)
    compute(pool, [*text(1, start=100), *text(1)])

    assert cached(pool, [*text(1), 1]) == 0
    assert cached(pool, [*text(1, start=200), *text(1), 1]) == 0
    assert cached(pool, [*text(1, start=100), *text(1), 1]) == 2 * BLOCK


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    pool = BlockPool(16)
    compute(pool, text(2))

    assert cached(pool, text(2)) == BLOCK
    assert cached(pool, [*text(2), 1]) == 2 * BLOCK


def test_a_partial_block_at_the_end_is_not_shared() -> None:
    pool = BlockPool(16)
    first = compute(pool, text(2)[:-1])
    pool.close(first)

    assert pool.num_cached_blocks == 1
    assert cached(pool, [*text(2), 1]) == BLOCK


def test_what_was_not_computed_is_not_found() -> None:
    """Cancelled while its prompt was read."""
    pool = BlockPool(16)
    cancelled = open_table(pool, text(4))
    pool.fill(cancelled, 2 * BLOCK + 5)
    pool.close(cancelled)

    assert cached(pool, text(4)) == 2 * BLOCK
    assert pool.num_free == 16


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    pool = BlockPool(4)
    preempted = compute(pool, text(2))
    decode(pool, preempted, text(1, start=500))
    pool.append(preempted, 7)
    pool.close(preempted)

    again = open_table(pool, preempted.tokens)

    assert again.num_filled == 3 * BLOCK
    assert len(again.tokens) == 3 * BLOCK + 1


def test_what_follows_a_block_that_two_computed_at_once_is_found() -> None:
    pool = BlockPool(16)
    first, second = open_table(pool, text(3)), open_table(pool, text(3))
    pool.fill(first, BLOCK)
    pool.fill(second, BLOCK)
    assert first.blocks[0] != second.blocks[0]
    pool.fill(second, 3 * BLOCK)

    third = open_table(pool, [*text(3), 1])

    assert third.blocks[:3] == [first.blocks[0], *second.blocks[1:3]]
    pool.close(second)
    assert pool.num_cached_blocks == 3


def test_the_least_recently_used_goes_first_and_the_tail_before_the_head() -> None:
    pool = BlockPool(6)
    old, new = compute(pool, text(3)), compute(pool, text(3, start=100))
    pool.close(old)
    pool.close(new)

    pool.close(open_table(pool, text(1, start=500)))
    assert cached(pool, text(3)) == 2 * BLOCK  # its tail went; and now it was used last
    filler = open_table(pool, text(2, start=600))

    assert cached(pool, text(3)) == 2 * BLOCK
    assert cached(pool, text(3, start=100)) == BLOCK
    pool.close(filler)


def test_what_followed_an_evicted_block_is_not_found_behind_its_successor() -> None:
    pool = BlockPool(6)
    first, second = open_table(pool, [*text(1), 1]), open_table(pool, text(2))
    pool.fill(first, BLOCK)
    pool.fill(second, 2 * BLOCK)  # its second block continues what `first` registered
    pool.close(first)
    pool.close(open_table(pool, text(4, start=100)))

    successor = compute(pool, [*text(1), 1])

    assert successor.num_cached == 0
    assert cached(pool, [*text(2), 1]) == BLOCK


def test_freed_blocks_are_used_before_new_ones_and_new_ones_before_the_cache() -> None:
    pool = BlockPool(6)
    kept, dropped = compute(pool, text(2)), open_table(pool, text(2, start=100))
    kept_blocks, dropped_blocks = list(kept.blocks), list(dropped.blocks)
    pool.close(kept)
    pool.close(dropped)

    table = open_table(pool, text(5, start=200))

    assert table.blocks[:2] == dropped_blocks
    assert table.blocks[2:4] == [4, 5]
    assert table.blocks[4] == kept_blocks[1]


def test_nothing_changes_when_there_are_not_enough_blocks() -> None:
    pool = BlockPool(6)
    pool.close(compute(pool, text(3)))
    running = compute(pool, text(3, start=100))

    # Three blocks are idle, but the prompt starts from them: they are not there to be evicted.
    assert pool.open([*text(3), 1], owner="anna", num_shared=0) is None
    assert pool.open(text(4, start=200), owner="anna", num_shared=0) is None
    assert pool.num_free == pool.num_cached_blocks - 3 == 3
    assert cached(pool, text(3)) == 2 * BLOCK

    # What somebody holds anyway can be shared even when little is left.
    assert open_table(pool, [*running.tokens, *text(3, start=300)]).num_cached == 3 * BLOCK
    pool.append(running, 1)
    assert not pool.grow(running)
    assert len(running.blocks) == 3


def test_closing_again_does_nothing() -> None:
    pool = BlockPool(4)
    table = compute(pool, [*text(1), 1])
    pool.close(table)
    other = open_table(pool, text(2, start=100))

    pool.close(table)

    assert pool.num_free == 2
    assert len(set(other.blocks)) == 2
    assert (table.blocks, table.num_filled) == ([], 0)


def test_a_table_of_a_pool_that_was_replaced_is_closed_without_harm() -> None:
    """An engine that starts afresh after a failure may still be given the requests from before."""
    table = compute(BlockPool(4), text(2))
    pool = BlockPool(4)
    other = open_table(pool, text(2, start=100))

    pool.close(table)

    assert pool.num_free == 2
    assert open_table(pool, text(2, start=200)).blocks != other.blocks


def test_a_closed_table_takes_no_more_blocks() -> None:
    pool = BlockPool(4)
    table = compute(pool, text(1))
    pool.close(table)

    with pytest.raises(AssertionError, match="closed"):
        pool.grow(table)
    with pytest.raises(AssertionError, match="closed"):
        pool.adopt(table)


def test_clearing_closes_all_and_forgets_all() -> None:
    pool = BlockPool(8)
    pool.close(compute(pool, text(2)))
    running = compute(pool, text(3, start=100))

    pool.clear()

    assert running.blocks == []
    assert (pool.num_free, pool.num_cached_blocks) == (8, 0)
    after = open_table(pool, [*text(2), 1])
    assert after.num_cached == 0
    pool.close(running)  # late, by somebody who has not heard
    assert pool.num_free == 8 - 3


def test_generated_tokens_cannot_be_declared_public() -> None:
    with pytest.raises(AssertionError, match="never everybody's"):
        BlockPool(4).open([1, 2], owner="anna", num_shared=3)


Cell = tuple[tuple[int, ...], str | None]
"""What one place in memory holds: the prefix that ends with its token, and whose it is (None: everybody's)."""


class Sequences(RuleBasedStateMachine):
    """Any sequences in any order, on a simulated memory that shows what a block really holds."""

    num_blocks = 9  # few: there is always somebody to evict

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.num_blocks)
        self.memory: dict[tuple[int, int], Cell] = {}
        self.tables: list[BlockTable] = []
        self.full: set[tuple[Cell, ...]] = set()  # the last cell of each block from the first on, of all ever full

    # What the model knows.

    def cell(self, table: BlockTable, position: int) -> Cell:
        end = (position // BLOCK + 1) * BLOCK
        return tuple(table.tokens[: position + 1]), None if end <= table.num_shared else table.owner

    def chain(self, table: BlockTable, num_blocks: int) -> tuple[Cell, ...]:
        return tuple(self.cell(table, index * BLOCK + BLOCK - 1) for index in range(num_blocks))

    def longest_prefix(self, table: BlockTable) -> int:
        """Tokens to start from if nothing had ever been evicted."""
        limit = (len(table.tokens) - 1) // BLOCK
        return next((n * BLOCK for n in range(limit, 0, -1) if self.chain(table, n) in self.full), 0)

    def write(self, table: BlockTable, num_filled: int) -> None:
        """Compute the next tokens, as the engine would."""
        for position in range(table.num_filled, num_filled):
            block = table.blocks[position // BLOCK]
            holders = sum(block in other.blocks for other in self.tables)
            assert holders == 1, "written to a block that somebody else reads"
            assert self.pool._keys[block] is None, "written to a block that can be found"
            self.memory[block, position % BLOCK] = self.cell(table, position)

    def note(self, table: BlockTable, num_filled: int) -> None:
        self.pool.fill(table, num_filled)
        self.full.update(self.chain(table, n) for n in range(1, num_filled // BLOCK + 1))

    def check_start(self, table: BlockTable, own: int = 0) -> None:
        """What it starts from was computed once, if not by itself."""
        assert table.num_filled <= max(self.longest_prefix(table), own)

    # What may happen.

    @rule(
        head=st.integers(0, 2),
        pieces=st.lists(st.integers(0, 1), max_size=4),
        rest=st.integers(1, BLOCK),
        owner=st.sampled_from(["anna", "bert"]),
    )
    def open(self, head: int, pieces: list[int], rest: int, owner: str) -> None:
        tokens = [*chain.from_iterable([piece] * BLOCK for piece in pieces), *[0] * rest]
        self.start(tokens, owner, min(head * (BLOCK + 3), len(tokens)))

    def start(self, tokens: list[int], owner: str, num_shared: int) -> None:
        before = self.state()
        table = self.pool.open(tokens, owner=owner, num_shared=num_shared)
        if table is None:
            assert self.state() == before
            assert -(-len(tokens) // BLOCK) > self.pool.num_free
            return
        self.tables.append(table)
        assert table.tokens == tokens
        assert len(table.blocks) == -(-len(tokens) // BLOCK)
        assert table.num_cached == table.num_filled < len(tokens)
        self.check_start(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num=st.integers(1, 3 * BLOCK), is_adopting=st.booleans())
    def prefill(self, data: st.DataObject, num: int, is_adopting: bool) -> None:
        table = data.draw(st.sampled_from(self.tables))
        if is_adopting:
            before, cached_before = table.num_filled, table.num_cached
            gained = self.pool.adopt(table)
            assert gained == table.num_filled - before == table.num_cached - cached_before
            if before % BLOCK == 0:
                self.check_start(table, before)
            else:
                assert gained == 0
        num_filled = min(table.num_filled + num, len(table.tokens), len(table.blocks) * BLOCK)
        self.write(table, num_filled)
        self.note(table, num_filled)

    @precondition(lambda self: self.tables)
    @rule(num=st.integers(1, 3 * BLOCK))
    def prefill_all_in_one_step(self, num: int) -> None:
        """Nobody knows yet of the others' part when all is written."""
        ends = [min(table.num_filled + num, len(table.tokens), len(table.blocks) * BLOCK) for table in self.tables]
        for table, end in zip(self.tables, ends, strict=True):
            self.write(table, end)
        for table, end in zip(self.tables, ends, strict=True):
            self.note(table, end)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4), times=st.sampled_from([1, 5]))
    def decode(self, data: st.DataObject, tokens: list[int], times: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        for token in tokens * times:
            if table.num_filled < len(table.tokens):
                if not self.pool.grow(table):
                    assert self.pool.num_free == 0
                    return
                self.write(table, len(table.tokens))
                self.note(table, len(table.tokens))
            self.pool.append(table, token)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), times=st.integers(1, 2))
    def close(self, data: st.DataObject, times: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.pool.close(table)
        after = self.state()
        for _ in range(times):
            self.pool.close(table)
        assert self.state() == after

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.pool.close(table)
        self.start(table.tokens, table.owner, table.num_shared)

    @precondition(lambda self: len(self.full) > 8)
    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert (self.pool.num_free, self.pool.num_cached_blocks) == (self.num_blocks, 0)
        self.tables.clear()
        self.full.clear()

    # What always holds.

    def state(self) -> object:
        pool = self.pool
        tables = [(id(table), list(table.blocks), table.num_filled) for table in self.tables]
        books = list(pool._num_holders), list(pool._freed), list(pool._idle), dict(pool._registered), pool._num_touched
        return tables, books

    def held(self) -> Iterator[int]:
        return chain.from_iterable(table.blocks for table in self.tables)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        pool = self.pool
        unused = [*pool._freed, *range(pool._num_touched, pool.num_blocks)]
        held = set(self.held())
        assert sorted([*unused, *pool._idle, *held]) == list(range(pool.num_blocks))
        assert pool.num_free == pool.num_blocks - len(held)

    @invariant()
    def every_holder_is_counted(self) -> None:
        held = Counter(self.held())
        assert self.pool._num_holders == [held[block] for block in range(self.num_blocks)]

    @invariant()
    def what_can_be_found_is_full_and_was_not_freed(self) -> None:
        pool = self.pool
        assert pool._registered == {key: block for block, key in enumerate(pool._keys) if key is not None}
        assert pool.num_cached_blocks == len(pool._registered)
        assert set(pool._idle) <= set(pool._registered.values())
        full = {block for table in self.tables for block in table.blocks[: table.num_filled // BLOCK]}
        assert set(pool._registered.values()) <= full | set(pool._idle)

    @invariant()
    def a_table_s_blocks_hold_its_own_prefix_and_nobody_else_s(self) -> None:
        for table in self.tables:
            assert table.num_filled <= len(table.blocks) * BLOCK
            assert len(set(table.blocks)) == len(table.blocks)
            for position in range(table.num_filled):
                held = self.memory[table.blocks[position // BLOCK], position % BLOCK]
                assert held == self.cell(table, position)

    @invariant()
    def only_full_blocks_are_shared_and_private_ones_by_one_owner(self) -> None:
        owners: dict[int, set[tuple[int, str | None]]] = {}
        for table in self.tables:
            for index, block in enumerate(table.blocks):
                owners.setdefault(block, set()).add((index, self.cell(table, index * BLOCK)[1]))
                if self.pool._num_holders[block] > 1:
                    assert (index + 1) * BLOCK <= table.num_filled
        assert all(len(places) == 1 for places in owners.values())

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.close(table)
        assert self.pool.num_free == self.num_blocks
        assert not any(self.pool._num_holders)


class SequencesInPlenty(Sequences):
    """So many blocks that nothing is evicted: whatever was computed once is found."""

    num_blocks = 300

    def check_start(self, table: BlockTable, own: int = 0) -> None:
        assert table.num_filled == max(self.longest_prefix(table), own)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSequencesInPlenty = SequencesInPlenty.TestCase
TestSequencesInPlenty.settings = TestSequences.settings
