"""`CachedDecoder`: a compiled decoder and the paged cache of its sequences."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack
from transformers import PreTrainedModel

from llm2_fast.backends.compilation import check_same
from llm2_fast.cache.blocks import BlockTables
from llm2_fast.errors import ArgumentError
from llm2_fast.models.spec import DecoderSpec

BLOCK_SIZE = 32
# Python has a name for it from 3.13 on; elsewhere memory is not reserved anyway.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
MIN_SHARED_WEIGHTS = 1 << 16  # of one linear layer: threads meet after each, which takes as long as reading these
_MAX_ROWS = 256  # of one pass over prompts: working memory stays small and the weights are read often enough


def block_bytes(spec: DecoderSpec) -> int:
    """Memory of one block of a cache: keys and values of `BLOCK_SIZE` positions in all layers."""
    values = spec.num_layers * spec.num_kv_heads * BLOCK_SIZE * spec.head_dim
    return 2 * values * getattr(torch, spec.dtype).itemsize


@dataclass
class PassRows:
    """Rows of one pass, as lists of the same length.

    Attributes:
        token_ids, slots, positions: One per row. A row sees the positions of its slot before its own, and itself.
        stored: The row extends the prefix of its slot.
    """

    token_ids: list[int]
    slots: list[int]
    positions: list[int]
    stored: list[int]

    @classmethod
    def empty(cls) -> PassRows:
        return cls([], [], [], [])

    def __len__(self) -> int:
        return len(self.token_ids)

    def add(self, slot: int, token_id: int, position: int, *, stored: bool) -> None:
        """Append a row."""
        self.token_ids.append(token_id)
        self.slots.append(slot)
        self.positions.append(position)
        self.stored.append(int(stored))


class CachedDecoder:
    """Slots with committed prefixes, and passes over them.

    Args:
        extension: The module `llm2_fast_C`.
        decoder: `llm2_fast_C.Decoder`. Several cached decoders may share one.
        spec: Its shape.
        num_blocks: Blocks of `BLOCK_SIZE` positions in the cache. Their addresses are taken at once and never move; the
            operating system provides the memory when they are first written.
        adapted: Rows get the decoder's low-rank updates.

    Attributes:
        lengths: Committed positions by slot.
        cache: `llm2_fast_C.PagedCache` over the current storage.

    Raises:
        ArgumentError: So much memory cannot be had.
    """

    def __init__(
        self, extension: ModuleType, decoder: Any, spec: DecoderSpec, num_blocks: int, *, adapted: bool = False
    ) -> None:
        self._extension, self.decoder, self.spec, self._adapted = extension, decoder, spec, adapted
        self.lengths: dict[int, int] = {}
        self._tables = BlockTables(BLOCK_SIZE, num_blocks)
        dtype = getattr(torch, spec.dtype)
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        self._keys, self._values = _untouched(shape, dtype), _untouched(shape, dtype)
        self._block_table = torch.zeros(0, 1, dtype=torch.int32)
        self._hidden_states = torch.empty(0, spec.hidden_size, dtype=dtype)
        self._bind()

    @property
    def num_threads(self) -> int:
        """Threads of a pass: torch's number, but one where a layer is too small to be worth dividing."""
        spec = self.spec
        largest = spec.hidden_size * spec.intermediate_size
        return torch.get_num_threads() if largest >= MIN_SHARED_WEIGHTS else 1

    def check(self, model: PreTrainedModel) -> None:
        """`check_same` with `model`, whose weights these are."""
        check_same(self._last_hidden_state, model, self.spec)

    def _last_hidden_state(self, token_ids: list[int]) -> torch.Tensor:
        slot = self.allocate()
        self.extend([slot], [token_ids])
        hidden_state = self.hidden_state(slot).clone()
        self.free(slot)
        return hidden_state

    def allocate(self) -> int:
        """An empty slot."""
        self._fit_slots(self._tables.num_slots + 1)
        slot = self._tables.allocate()
        self.lengths[slot] = 0
        return slot

    def fork(self, slot: int, length: int | None = None) -> int:
        """A new slot with the committed prefix of `slot`, or the first `length` positions. Full blocks are shared.

        The hidden state that comes along is that of the whole prefix; a shorter one has to be extended before use.

        Raises:
            CacheFullError: There is no block for the rest; nothing has changed.
        """
        length = self.lengths[slot] if length is None else length
        self._fit_slots(self._tables.num_slots + 1)
        child, copied = self._tables.fork(slot, length)
        self.lengths[child] = length
        self._write_table(child)
        if copied is not None:
            for storage in (self._keys, self._values):
                _copy_block(storage, *copied)
        self._hidden_states[child] = self._hidden_states[slot]
        return child

    def free(self, slot: int) -> None:
        """Give `slot` back."""
        self._tables.free(slot)
        del self.lengths[slot]

    def reserve(self, slot: int, length: int) -> None:
        """Make room for the positions [0, length) of `slot`.

        Raises:
            CacheFullError: Too few blocks are free; nothing has changed.
        """
        num_blocks = -(-length // BLOCK_SIZE)
        if num_blocks > self._table_width:
            self._fit_slots(self._tables.num_slots, num_blocks)
        if self._tables.reserve(slot, length):
            self._write_table(slot)

    def pending_rows(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> PassRows:
        """Rows that extend the prefixes of `slots` by `token_ids`, which the next pass commits.

        Raises:
            CacheFullError: Too few blocks are free; no prefix has changed.
        """
        for slot, tokens in zip(slots, token_ids, strict=True):
            self.reserve(slot, self.lengths[slot] + len(tokens))
        rows = PassRows.empty()
        for slot, tokens in zip(slots, token_ids, strict=True):
            length = self.lengths[slot]
            for offset, token in enumerate(tokens):
                rows.add(slot, token, length + offset, stored=True)
            self.lengths[slot] = length + len(tokens)
        return rows

    def extend(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Run prompts, or what is missing of sequences, and keep the final hidden state of each one's last token.

        The rows of all of them are packed into passes of up to 256, so memory does not depend on their lengths.

        Raises:
            CacheFullError: Too few blocks are free; nothing has been computed.
        """
        rows = self.pending_rows(slots, token_ids)
        for first in range(0, len(rows), _MAX_ROWS):
            part = slice(first, first + _MAX_ROWS)
            chunk = PassRows(rows.token_ids[part], rows.slots[part], rows.positions[part], rows.stored[part])
            self.forward(chunk)
            for row, (slot, position) in enumerate(zip(chunk.slots, chunk.positions, strict=True)):
                if position + 1 == self.lengths[slot]:
                    self.decoder.keep_row(self.cache, row)

    def forward(self, rows: PassRows, head: Any = None) -> torch.Tensor | None:
        """One pass. Returns the scores, float32 [rows], if there is a head (`llm2_fast_C.ScoreHead`)."""
        scores = None if head is None else torch.empty(len(rows))
        self.decoder.forward(
            self.cache,
            rows.token_ids,
            rows.slots,
            rows.positions,
            rows.stored,
            self._adapted,
            head,
            None if scores is None else to_dlpack(scores),
            self.num_threads,
        )
        return scores

    def keep_row(self, slot: int, row: int) -> None:
        """Commit a branch of the last pass."""
        self.decoder.keep_row(self.cache, row)
        self.lengths[slot] += 1

    def hidden_state(self, slot: int) -> torch.Tensor:
        """Final hidden state [hidden_size] of the last token."""
        return self._hidden_states[slot]

    def prefix(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Committed keys and values per layer, each [num_kv_heads, length, head_dim]."""
        blocks, length = list(self._tables.table(slot)), self.lengths[slot]

        def gather(storage: torch.Tensor) -> torch.Tensor:
            return storage[blocks].transpose(0, 1).flatten(1, 2)[:, :length]

        return [(gather(keys), gather(values)) for keys, values in zip(self._keys, self._values, strict=True)]

    def _write_table(self, slot: int) -> None:
        table = self._tables.table(slot)
        self._block_table.numpy()[slot, : len(table)] = table

    def _fit_slots(self, num_slots: int, num_blocks: int = 0) -> None:
        """Grow what is kept per slot, by doubling, to `num_slots` slots of up to `num_blocks` blocks."""
        block_table = _grow(_grow(self._block_table, 0, num_slots), 1, num_blocks)
        hidden_states = _grow(self._hidden_states, 0, block_table.shape[0])
        if block_table is not self._block_table:
            self._block_table, self._hidden_states = block_table, hidden_states
            self._bind()

    def _bind(self) -> None:
        tensors = (self._keys, self._values, self._block_table, self._hidden_states)
        self.cache = self._extension.PagedCache(*map(to_dlpack, tensors))
        self._table_width = self._block_table.shape[1]  # asked for at every step


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Addresses that get memory when they are first written to.

    Mapped without reserving swap space, so that several engines, or a forked process, are not refused memory that none
    of them uses. It need not be cleared: what is not committed is never read.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        storage = mmap.mmap(-1, num_bytes, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        expected = "no more than this machine can provide"
        raise ArgumentError("kv_cache_memory_bytes", expected, f"{num_bytes} for the keys of a model") from error
    return torch.frombuffer(storage, dtype=dtype).view(shape)


def _copy_block(storage: torch.Tensor, source: int, target: int) -> None:
    """In this thread: torch's would wake for it and then spin on the processors of ours."""
    blocks = storage.view(torch.uint8).numpy()
    blocks[:, target] = blocks[:, source]


def _grow(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`tensor` itself if `dim` holds `size`, else a copy of at least twice its size there."""
    current = tensor.shape[dim]
    if size <= current:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = max(size, 2 * current)
    grown = tensor.new_empty(shape)
    grown.narrow(dim, 0, current).copy_(tensor)
    return grown
