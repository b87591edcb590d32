"""Block bookkeeping: invariants under arbitrary sequences of operations, and the forks in detail."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm2_fast.cache.blocks import BlockTables
from llm2_fast.errors import ArgumentError, CacheFullError


class BlockMachine(RuleBasedStateMachine):
    """Slots are grown, written, forked and freed; a model of the contents says what each position must hold."""

    @initialize(block_size=st.integers(1, 4), capacity=st.integers(0, 12))
    def start(self, block_size, capacity):
        self.tables = BlockTables(block_size, capacity)
        self.storage = {}  # (block, offset) -> value
        self.contents = {}  # slot -> what it must hold
        self.written = 0

    @rule()
    def allocate(self):
        slot = self.tables.allocate()
        assert slot not in self.contents
        self.contents[slot] = []

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), count=st.integers(0, 9))
    def append(self, data, count):
        slot = data.draw(st.sampled_from(sorted(self.contents)))
        before = self.tables.table(slot)
        length = len(self.contents[slot])
        missing = -(-(length + count) // self.tables.block_size) - len(before)
        if missing > self.tables.num_free_blocks:
            with self.unchanged(), pytest.raises(CacheFullError):
                self.tables.reserve(slot, length + count)
            return
        grew = self.tables.reserve(slot, length + count)
        table = self.tables.table(slot)
        assert table[: len(before)] == before
        assert grew == (len(table) > len(before))
        for position in range(length, length + count):
            self.written += 1
            block, offset = table[position // self.tables.block_size], position % self.tables.block_size
            self.storage[block, offset] = self.written
            self.contents[slot].append(self.written)

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def fork(self, data):
        slot = data.draw(st.sampled_from(sorted(self.contents)))
        length = data.draw(st.integers(0, len(self.contents[slot])))
        if length % self.tables.block_size and not self.tables.num_free_blocks:
            with self.unchanged(), pytest.raises(CacheFullError):
                self.tables.fork(slot, length)
            return
        child, copied = self.tables.fork(slot, length)
        assert child not in self.contents
        if copied is not None:
            source, target = copied
            for offset in range(self.tables.block_size):
                if (source, offset) in self.storage:
                    self.storage[target, offset] = self.storage[source, offset]
        self.contents[child] = self.contents[slot][:length]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def free(self, data):
        slot = data.draw(st.sampled_from(sorted(self.contents)))
        self.tables.free(slot)
        del self.contents[slot]

    @contextmanager
    def unchanged(self):
        def state():
            return self.tables.num_free_blocks, self.tables.num_slots, [*map(self.tables.table, self.contents)]

        before = state()
        yield
        assert state() == before

    @invariant()
    def every_slot_holds_what_was_written_to_it(self):
        for slot, expected in getattr(self, "contents", {}).items():
            table, size = self.tables.table(slot), self.tables.block_size
            assert [self.storage[table[i // size], i % size] for i in range(len(expected))] == expected

    @invariant()
    def references_count_the_tables_and_nothing_leaks(self):
        if not hasattr(self, "tables"):
            return
        held = [block for slot in self.contents for block in self.tables.table(slot)]
        for block in range(self.tables.num_blocks):
            assert self.tables.references(block) == held.count(block)
        assert set(held) <= set(range(self.tables.num_blocks))
        assert self.tables.num_blocks <= self.tables.capacity
        assert self.tables.num_free_blocks == self.tables.capacity - len(set(held))
        assert self.tables.num_slots >= len(self.contents)


TestBlocks = BlockMachine.TestCase


def test_fork_shares_full_blocks_and_copies_the_partial_one():
    tables = BlockTables(4, capacity=9)
    parent = tables.allocate()
    tables.reserve(parent, 10)
    first, second, third = tables.table(parent)
    child, copied = tables.fork(parent, 10)
    assert tables.table(child)[:2] == (first, second)
    assert copied == (third, tables.table(child)[2])
    assert [tables.references(block) for block in (first, second, third)] == [2, 2, 1]
    whole, nothing = tables.fork(parent, 8)
    assert tables.table(whole) == (first, second)
    assert nothing is None


def test_freed_blocks_are_used_again():
    tables = BlockTables(2, capacity=9)
    for _ in range(5):
        slot = tables.allocate()
        tables.reserve(slot, 6)
        tables.free(slot)
    assert tables.num_blocks == 3
    assert tables.num_slots == 1


@pytest.mark.parametrize("call", ["table", "free"])
def test_unknown_slots_are_refused(call):
    with pytest.raises(ArgumentError, match="slot: expected a slot in use, got 3"):
        getattr(BlockTables(4, capacity=9), call)(3)


def test_a_full_cache_says_what_it_lacks():
    tables = BlockTables(4, capacity=3)
    tables.reserve(tables.allocate(), 5)
    with pytest.raises(CacheFullError, match="2 cache blocks are needed, 1 of 3 are free"):
        tables.reserve(tables.allocate(), 8)


def test_a_fork_beyond_what_is_held_is_refused():
    tables = BlockTables(4, capacity=9)
    slot = tables.allocate()
    tables.reserve(slot, 3)
    with pytest.raises(ArgumentError, match="length: expected between 0 and 4"):
        tables.fork(slot, 5)


def test_bookkeeping_needs_no_torch():
    code = "import sys; import llm2_fast.cache.blocks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
