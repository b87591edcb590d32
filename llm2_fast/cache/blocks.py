"""`BlockTables`: which blocks of a paged cache hold the positions of which slot. Bookkeeping only, no tensors."""

from __future__ import annotations

from llm2_fast.errors import ArgumentError, CacheFullError


class BlockTables:
    """Reference-counted blocks of `block_size` positions each, in tables per slot.

    Positions before a slot's fork point may lie in blocks shared with other slots and must not be written; all later
    ones lie in blocks of its own. Blocks that were given back are used again before others are touched.

    Args:
        block_size: Positions per block.
        capacity: Number of blocks there are.

    Attributes:
        block_size, capacity: As given.
        num_blocks: Blocks ever handed out.
    """

    def __init__(self, block_size: int, capacity: int) -> None:
        self.block_size, self.capacity = block_size, capacity
        self.num_blocks = 0
        self._references: list[int] = []  # per block
        self._free_blocks: list[int] = []
        self._tables: dict[int, list[int]] = {}  # slot -> blocks
        self._free_slots: list[int] = []

    @property
    def num_slots(self) -> int:
        """Slots ever handed out."""
        return len(self._tables) + len(self._free_slots)

    @property
    def num_free_blocks(self) -> int:
        """Blocks in no table."""
        return self.capacity - self.num_blocks + len(self._free_blocks)

    def table(self, slot: int) -> tuple[int, ...]:
        """Blocks of `slot`: block i holds positions [i * block_size, (i + 1) * block_size)."""
        return tuple(self._known(slot))

    def references(self, block: int) -> int:
        """Number of slots whose tables hold `block`."""
        return self._references[block]

    def allocate(self) -> int:
        """An empty slot."""
        slot = self._free_slots.pop() if self._free_slots else len(self._tables)
        self._tables[slot] = []
        return slot

    def reserve(self, slot: int, length: int) -> bool:
        """Give `slot` blocks for the positions [0, length). Returns whether its table grew.

        Raises:
            CacheFullError: Too few blocks are free; nothing has changed.
        """
        table = self._known(slot)
        missing = -(-length // self.block_size) - len(table)
        self._require_free(missing)
        table.extend(self._take_block() for _ in range(missing))
        return missing > 0

    def fork(self, slot: int, length: int) -> tuple[int, tuple[int, int] | None]:
        """A new slot with the first `length` positions of `slot`.

        Full blocks are shared. The last one, if it is only partly filled, would be written by both, so the new slot
        gets its own.

        Returns:
            The new slot, and (source, target) of the block whose content the caller has to copy, None if there is none.

        Raises:
            ArgumentError: `slot` is not in use or holds fewer positions.
            CacheFullError: The block to copy into is not free; nothing has changed.
        """
        table = self._known(slot)
        if not 0 <= length <= len(table) * self.block_size:
            raise ArgumentError("length", f"between 0 and {len(table) * self.block_size}, what the slot holds", length)
        num_full, rest = divmod(length, self.block_size)
        self._require_free(int(rest > 0))
        child = self.allocate()
        shared = table[:num_full]
        for block in shared:
            self._references[block] += 1
        self._tables[child] = list(shared)
        if rest == 0:
            return child, None
        copy = self._take_block()
        self._tables[child].append(copy)
        return child, (table[num_full], copy)

    def free(self, slot: int) -> None:
        """Give `slot` back, and the blocks that no other slot shares."""
        for block in self._known(slot):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free_blocks.append(block)
        del self._tables[slot]
        self._free_slots.append(slot)

    def _require_free(self, count: int) -> None:
        if count > self.num_free_blocks:
            raise CacheFullError(f"{count} cache blocks are needed, {self.num_free_blocks} of {self.capacity} are free")

    def _take_block(self) -> int:
        if not self._free_blocks:
            self._free_blocks.append(self.num_blocks)
            self._references.append(0)
            self.num_blocks += 1
        block = self._free_blocks.pop()
        self._references[block] = 1
        return block

    def _known(self, slot: int) -> list[int]:
        if slot not in self._tables:
            raise ArgumentError("slot", "a slot in use", slot)
        return self._tables[slot]
