"""`SlotCache`: keys and values of many sequences for Hugging Face models, one dense slot per sequence."""

from __future__ import annotations

import torch
from transformers import Cache


class SlotCache(Cache):
    """Committed prefixes of many sequences, and behind each the rows of the last forward pass.

    Slot s holds `lengths[s]` committed positions. A forward pass stores its rows right behind them; `advance` commits
    the first of those rows, `keep_row` one of them, and what is not committed is overwritten by the next pass. So
    rejecting a branch costs nothing and commits of branches move one row per layer.

    Storage is [num_slots, num_kv_heads, capacity, head_dim] per layer, grown by doubling in both directions.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._stored: list[int] = []  # end of what has been written into each slot, committed or not
        self._free: list[int] = []
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._capacity = 0
        self._slots = self._positions = torch.empty(0, dtype=torch.long)
        self._visible = 0

    def allocate(self) -> int:
        """An empty slot."""
        if not self._free:
            self._grow_slots()
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Give `slot` back."""
        self.lengths[slot] = 0
        self._clear(slot, 0)
        self._free.append(slot)

    def fork(self, slot: int, length: int | None = None) -> int:
        """A new slot with the committed prefix of `slot`, or the first `length` positions of it."""
        child = self.allocate()
        length = self.lengths[slot] if length is None else length
        for storage in (*self._keys, *self._values):
            storage[child, :, :length] = storage[slot, :, :length]
        self.lengths[child] = self._stored[child] = length
        return child

    def truncate(self, slot: int, length: int) -> None:
        """Forget the committed positions from `length` on."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def advance(self, slot: int, num_rows: int) -> None:
        """Commit the first `num_rows` rows stored behind the prefix."""
        self.lengths[slot] += num_rows

    def keep_row(self, slot: int, row: int) -> None:
        """Commit only row `row` of those stored behind the prefix."""
        length = self.lengths[slot]
        if row > 0:
            for storage in (*self._keys, *self._values):
                storage[slot, :, length] = storage[slot, :, length + row]
        self.lengths[slot] = length + 1

    def begin(self, slots: list[int], num_rows: int, device: torch.device) -> int:
        """Prepare a forward pass of `num_rows` rows for each of `slots`. Returns the number of keys its rows index."""
        lengths = torch.tensor([self.lengths[slot] for slot in slots])
        self._visible = int(lengths.max()) + num_rows
        if self._visible > self._capacity:
            self._resize(len(self.lengths), max(self._visible, 2 * self._capacity))
        for slot in slots:
            self._clear(slot, self.lengths[slot] + num_rows)
            self._stored[slot] = self.lengths[slot] + num_rows
        self._slots = torch.tensor(slots, device=device)
        self._positions = (lengths[:, None] + torch.arange(num_rows)).to(device)
        return self._visible

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention: store the rows of this pass, return all keys and values they may see.

        Args:
            key_states, value_states: [B, num_kv_heads, num_rows, head_dim], in the order of `begin`'s slots.
            layer_idx: Decoder layer.

        Returns:
            Keys and values [B, num_kv_heads, visible, head_dim].
        """
        if layer_idx == len(self._keys):
            new = [self._new_storage(states) for states in (key_states, value_states)]
            self._keys.append(new[0])
            self._values.append(new[1])
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._slots[:, None], :, self._positions] = key_states.transpose(1, 2)
        values[self._slots[:, None], :, self._positions] = value_states.transpose(1, 2)
        return keys[self._slots, :, : self._visible], values[self._slots, :, : self._visible]

    def prefix(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [num_kv_heads, length, head_dim] of the committed prefix, per layer."""
        length = self.lengths[slot]
        return [(k[slot, :, :length], v[slot, :, :length]) for k, v in zip(self._keys, self._values, strict=True)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: callers pass explicit positions, since every row of the batch has its own."""
        return 0

    def _clear(self, slot: int, start: int) -> None:
        """Zero what was stored from `start` on: attention multiplies masked positions by zero, and 0 * NaN is NaN."""
        end = self._stored[slot]
        if end > start:
            for storage in (*self._keys, *self._values):
                storage[slot, :, start:end] = 0
            self._stored[slot] = start

    def _new_storage(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(len(self.lengths), states.shape[1], self._capacity, states.shape[3])

    def _grow_slots(self) -> None:
        old, new = len(self.lengths), max(1, 2 * len(self.lengths))
        self._resize(new, self._capacity)
        self.lengths.extend([0] * (new - old))
        self._stored.extend([0] * (new - old))
        self._free.extend(reversed(range(old, new)))

    def _resize(self, num_slots: int, capacity: int) -> None:
        """Move everything to larger storage. Nothing has changed if memory runs out on the way."""

        def moved(old: torch.Tensor) -> torch.Tensor:
            new = old.new_zeros(num_slots, old.shape[1], capacity, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            return new

        keys, values = ([moved(old) for old in storages] for storages in (self._keys, self._values))
        self._keys, self._values, self._capacity = keys, values, capacity
