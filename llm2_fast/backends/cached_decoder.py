"""`CachedDecoder`: a compiled decoder and the paged cache of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack
from transformers import PreTrainedModel

from llm2_fast.cache.blocks import BlockTables
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import agree, evaluating
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.spec import DecoderSpec

_BLOCK_SIZE = 32
_PROBE_LENGTH = 9
_PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # bfloat16 models round after every op, compiled ones seldom
MIN_SHARED_WEIGHTS = 1 << 16  # of one linear layer: threads meet after each, which takes as long as reading these
_MAX_ROWS = 256  # of one pass over prompts: working memory stays small and the weights are read often enough


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
        adapted: Rows get the decoder's low-rank updates.

    Attributes:
        lengths: Committed positions by slot.
        cache: `llm2_fast_C.PagedCache` over the current storage.
    """

    def __init__(self, extension: ModuleType, decoder: Any, spec: DecoderSpec, *, adapted: bool = False) -> None:
        self._extension, self.decoder, self.spec, self._adapted = extension, decoder, spec, adapted
        self.lengths: dict[int, int] = {}
        self._tables = BlockTables(_BLOCK_SIZE)
        dtype = getattr(torch, spec.dtype)
        shape = (spec.num_layers, 0, spec.num_kv_heads, _BLOCK_SIZE, spec.head_dim)
        # What is not committed is never read, so new storage need not be cleared.
        self._keys, self._values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self._block_table = torch.zeros(0, 1, dtype=torch.int32)
        self._hidden_states = torch.empty(0, spec.hidden_size, dtype=dtype)
        self._bind()

    @property
    def num_threads(self) -> int:
        """Threads of a pass: torch's number, but one where a layer is too small to be worth dividing."""
        spec = self.spec
        largest = spec.hidden_size * spec.intermediate_size
        return torch.get_num_threads() if largest >= MIN_SHARED_WEIGHTS else 1

    def check(self, model: PreTrainedModel, quantization: Quantization | None = None) -> None:
        """Compare a few tokens with `model`, whose weights these are or, quantized, were.

        A model whose layers were replaced or patched may compute something else than its type says, so it is refused.
        What int8 loses is no difference: with `quantization` the model computes with the same rounded weights.

        Raises:
            ArgumentError: The hidden states differ.
        """
        token_ids = [(7 * i + 1) % self.spec.vocab_size for i in range(_PROBE_LENGTH)]
        rounding = nullcontext() if quantization is None else quantization.applied_to(model)
        with evaluating(model), rounding, torch.no_grad():
            expected = model.base_model(torch.tensor([token_ids]), use_cache=False).last_hidden_state[0, -1].float()
        slot = self.allocate()
        self.extend([slot], [token_ids])
        actual = self.hidden_state(slot).float()
        self.free(slot)
        if not agree(actual, expected, _PROBE_TOLERANCE[self.spec.dtype]):
            raise ArgumentError("model", "layers that compute what their type says", f"{type(model).__name__} differs")

    def allocate(self) -> int:
        """An empty slot."""
        slot = self._tables.allocate()
        self.lengths[slot] = 0
        self._fit_storage()
        return slot

    def fork(self, slot: int, length: int | None = None) -> int:
        """A new slot with the committed prefix of `slot`, or the first `length` positions. Full blocks are shared.

        The hidden state that comes along is that of the whole prefix; a shorter one has to be extended before use.
        """
        length = self.lengths[slot] if length is None else length
        child, copied = self._tables.fork(slot, length)
        self.lengths[child] = length
        self._fit_storage()
        self._write_table(child)
        if copied is not None:
            source, target = copied
            self._keys[:, target], self._values[:, target] = self._keys[:, source], self._values[:, source]
        self._hidden_states[child] = self._hidden_states[slot]
        return child

    def free(self, slot: int) -> None:
        """Give `slot` back."""
        self._tables.free(slot)
        del self.lengths[slot]

    def reserve(self, slot: int, length: int) -> None:
        """Make room for the positions [0, length) of `slot`."""
        if self._tables.reserve(slot, length):
            self._fit_storage()
            self._write_table(slot)

    def pending_rows(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> PassRows:
        """Rows that extend the prefixes of `slots` by `token_ids`, which the next pass commits."""
        rows = PassRows.empty()
        for slot, tokens in zip(slots, token_ids, strict=True):
            length = self.lengths[slot]
            self.reserve(slot, length + len(tokens))
            for offset, token in enumerate(tokens):
                rows.add(slot, token, length + offset, stored=True)
            self.lengths[slot] = length + len(tokens)
        return rows

    def extend(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Run prompts and keep the final hidden state of each one's last token."""
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
        self._block_table[slot, : len(table)] = torch.tensor(table, dtype=torch.int32)

    def _fit_storage(self) -> None:
        """Grow the storage, by doubling, to what the tables need."""
        table_width = max((len(self._tables.table(slot)) for slot in self.lengths), default=0)
        grown = [
            _grow(self._keys, 1, self._tables.num_blocks),
            _grow(self._values, 1, self._tables.num_blocks),
            _grow(_grow(self._block_table, 0, self._tables.num_slots), 1, table_width),
            _grow(self._hidden_states, 0, self._tables.num_slots),
        ]
        current = [self._keys, self._values, self._block_table, self._hidden_states]
        if any(new is not old for new, old in zip(grown, current, strict=True)):
            self._keys, self._values, self._block_table, self._hidden_states = grown
            self._bind()

    def _bind(self) -> None:
        tensors = (self._keys, self._values, self._block_table, self._hidden_states)
        self.cache = self._extension.PagedCache(*map(to_dlpack, tensors))


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
