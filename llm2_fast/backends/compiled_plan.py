"""`CompiledPlan`: what a compiled backend asks of the way in which it gets scores; `Twins`: what a verifier caches."""

from __future__ import annotations

from typing import Any

import torch

from llm2_fast.errors import ArgumentError
from llm2_fast.sequence import Sequence


class Twins:
    """Slots of the same sequences in a second cache: of the adapted LLM, or of the verifier's network.

    Args:
        decoder: Whose slots they are.
        **options: Of its `allocate`.
    """

    def __init__(self, decoder: Any, **options: Any) -> None:
        self._decoder, self._options = decoder, options
        self._slots: dict[int, int] = {}

    def __getitem__(self, slot: int) -> int:
        """The twin of one of the LLM's slots."""
        return self._slots[slot]

    def add(self, slot: int) -> None:
        """Give a slot of the LLM an empty twin. Raises `CacheFullError`."""
        self._slots[slot] = self._decoder.allocate(**self._options)

    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        """Give `child` a twin that shares all that the parent's has, or `length` tokens. Raises `CacheFullError`.

        What the parent's twin lacks of them is computed first: once for all forks.
        """
        self.catch_up([parent], length)
        self._slots[child.slot] = self._decoder.fork(self._slots[parent.slot], length)

    def reserve(self, slot: int, length: int) -> None:
        """Make room for `length` positions. Raises `CacheFullError`."""
        self._decoder.reserve(self._slots[slot], length)

    def free(self, slot: int) -> None:
        """Give the twin back if there is one."""
        if slot in self._slots:
            self._decoder.free(self._slots.pop(slot))

    def length(self, slot: int) -> int:
        """Committed positions of the twin."""
        return self._decoder.lengths[self._slots[slot]]

    def skipped(self, sequence: Sequence, length: int | None = None) -> list[int]:
        """Tokens that the twin lacks, of those that the sequence has, or of its first `length`."""
        cached = self.length(sequence.slot)
        return sequence.tokens_from(cached)[: None if length is None else max(0, length - cached)]

    def catch_up(self, sequences: list[Sequence], length: int | None = None) -> None:
        """Compute what the twins lack, or what they lack of the first `length` tokens."""
        missing = [(self._slots[s.slot], tokens) for s in sequences if (tokens := self.skipped(s, length))]
        if missing:
            self._decoder.extend(*zip(*missing, strict=True))


class CompiledPlan:
    """How a backend gets scores. With a verifier that caches for itself, `_twins` are its slots."""

    _twins: Twins | None = None

    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        """Logits of the next token of each sequence, float32 [B, vocab_size]. Not with a verifier."""
        raise ArgumentError("verifier", "None, for System 1's logits", type(self).__name__)

    def add(self, sequence: Sequence) -> None:
        """A sequence was given a slot."""
        if self._twins is not None:
            self._twins.add(sequence.slot)

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Make room for `length` positions in what a verifier keeps. Raises `CacheFullError`."""
        if self._twins is not None:
            self._twins.reserve(sequence.slot, length)

    def fork(self, parent: Sequence, child: Sequence, length: int | None) -> None:
        """A slot was forked, see `Backend.fork`. Raises `CacheFullError`."""
        if self._twins is not None:
            self._twins.fork(parent, child, length)

    def free(self, slot: int) -> None:
        """A slot is about to be given back; it may not have been added yet."""
        if self._twins is not None:
            self._twins.free(slot)
