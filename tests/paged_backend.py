"""A backend without a model: its cache holds token ids, so that it can tell whether what a step reads is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from llm2_fast.backends.backend import Backend, check_fork
from llm2_fast.cache.blocks import BlockTables
from llm2_fast.errors import ArgumentError, CacheFullError
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence

VOCAB = 61


def next_token(token_ids: list[int], request_id: int, sample_index: int) -> int:
    """Stands for a model and random numbers: depends on every token before it."""
    state = 17 * request_id + 5 * sample_index
    for token in token_ids:
        state = (31 * state + token + 1) % 10007
    return state % VOCAB


def continuation(prompt: list[int], request_id: int, sample_index: int, max_new_tokens: int) -> list[int]:
    """What a sample must become."""
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        token_ids.append(next_token(token_ids, request_id, sample_index))
    return token_ids[len(prompt) :]


class PagedBackend(Backend):
    """Blocks of `block_size` positions, `capacity` of them.

    Attributes:
        fail: Called by every step, prefill and fork; what it raises leaves the cache half written.
        prefilled: Tokens computed other than by steps.
        num_steps: Calls of `step`.
    """

    name = "paged"
    vocab_size = VOCAB
    max_position_embeddings = None

    def __init__(self, block_size: int, capacity: int) -> None:
        self.tables = BlockTables(block_size, capacity)
        self.fail = lambda: None
        self.prefilled = self.num_steps = 0
        self._storage: dict[tuple[int, int], int] = {}  # (block, offset) -> token
        self._lengths: dict[int, int] = {}
        self._hidden: dict[int, int] = {}  # slot -> the token whose hidden state is there

    def check_fits(self, num_tokens: int, name: str) -> None:
        if -(-num_tokens // self.tables.block_size) + 1 > self.tables.capacity:
            raise ArgumentError("capacity", f"enough for {name}", self.tables.capacity)

    def reserve(self, sequence: Sequence) -> None:
        is_new = sequence.slot is None
        if is_new:
            sequence.slot = self.tables.allocate()
            self._lengths[sequence.slot] = 0
        try:
            self.tables.reserve(sequence.slot, len(sequence) + 1)
        except CacheFullError:
            if is_new:
                self.free(sequence)
            raise

    def prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.reserve(sequence)
        for sequence in sequences:
            self.prefilled += len(sequence) - self._lengths[sequence.slot]
        self._write(sequences)

    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        whole = length is None
        check_fork(child, length)
        length = len(parent) if whole else length
        assert length <= self._lengths[parent.slot], "forked before it was computed"
        assert child.tokens_from(0)[:length] == parent.tokens_from(0)[:length]
        child.slot, copied = self.tables.fork(parent.slot, length)
        self._lengths[child.slot] = length
        self.fail()
        if whole:
            self._hidden[child.slot] = self._hidden.get(parent.slot)
        if copied is not None:
            for offset in range(self.tables.block_size):
                self._storage[copied[1], offset] = self._storage.get((copied[0], offset), -1)

    def free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.tables.free(sequence.slot)
            del self._lengths[sequence.slot]
            self._hidden.pop(sequence.slot, None)
            sequence.slot = None

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        self.num_steps += 1
        assert sequences
        assert all(sequence.slot is not None for sequence in sequences)
        for sequence in sequences:
            self.tables.reserve(sequence.slot, len(sequence) + 1)
        for sequence in sequences:
            assert self._lengths[sequence.slot] >= len(sequence) - 1, "stepped before it was computed"
        self._write(sequences)
        return [self._choose(sequence) for sequence in sequences]

    def logits(self, sequences: list[Sequence]) -> NoReturn:
        raise NotImplementedError

    def _write(self, sequences: list[Sequence]) -> None:
        """Cache what is missing; lengths first, as in backends whose passes can fail."""
        missing = [(s, position) for s in sequences for position in range(self._lengths[s.slot], len(s))]
        for sequence in sequences:
            self._lengths[sequence.slot] = len(sequence)
        self.fail()
        for sequence, position in missing:
            self._storage[self._place(sequence, position)] = sequence.tokens_from(position)[0]
            self._hidden[sequence.slot] = position

    def _choose(self, sequence: Sequence) -> StepOutput:
        cached = [self._storage[self._place(sequence, position)] for position in range(len(sequence))]
        assert cached == sequence.tokens_from(0)
        assert self._hidden[sequence.slot] == len(sequence) - 1, "stepped from another token's hidden state"
        return StepOutput(next_token(cached, sequence.request_id, sequence.sample_index), -1.0, num_candidates=1)

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.tables.block_size)
        return self.tables.table(sequence.slot)[block], offset


class AheadBackend(PagedBackend):
    """Begins steps of sequences that lack the last token, as a device does that the host runs behind.

    Attributes:
        num_ahead: Steps that began so.
    """

    def __init__(self, block_size: int, capacity: int) -> None:
        super().__init__(block_size, capacity)
        self.num_ahead = 0
        self._last: list[Sequence] | None = None  # whose step was the last, if nothing has happened since
        self._picked: list[list[int]] = []

    def reserve(self, sequence: Sequence) -> None:
        self._last = None
        super().reserve(sequence)

    def free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._last = None
        super().free(sequence)

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        return self._last == sequences

    def begin_step(self, sequences: list[Sequence]) -> Callable[[], list[StepOutput]]:
        missing = [[] for _ in sequences]
        if self._last == sequences:
            missing = [picked[len(s.token_ids) :] for s, picked in zip(sequences, self._picked, strict=True)]
        assert all(len(tokens) <= 1 for tokens in missing), "more than one step ahead"
        self.num_ahead += any(missing)
        for sequence, tokens in zip(sequences, missing, strict=True):
            sequence.token_ids.extend(tokens)
        try:
            outputs = self.step(sequences)
            self._last = list(sequences)
            self._picked = [[*s.token_ids, o.token_id] for s, o in zip(sequences, outputs, strict=True)]
        finally:
            for sequence, tokens in zip(sequences, missing, strict=True):
                del sequence.token_ids[len(sequence.token_ids) - len(tokens) :]
        return lambda: outputs
