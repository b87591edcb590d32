"""`VerifierSession`: scores candidates of many sequences over cached prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm2_fast.cache.slots import SlotCache
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import Rows
from llm2_fast.verifier.scorer import Scorer


class VerifierSession:
    """The interface through which any decoding loop uses a verifier.

    Each sequence has a slot. `extend` only notes tokens; `score` runs one pass for all sequences asked about, in which
    the tokens not yet cached and the candidates go together. When the next token of a sequence is a candidate that was
    just scored, its keys and values are kept and not computed again.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._cache = SlotCache()
        self._tokens: dict[int, list[int]] = {}
        self._scored: dict[int, list[int]] = {}  # candidates whose rows lie behind the slot's prefix

    @property
    def vocab_size(self) -> int:
        """Token ids from here on cannot be scored."""
        return self._scorer.decoder.vocab_size

    def add(self, token_ids: Sequence[int] = ()) -> int:
        """A slot for a new sequence that begins with `token_ids`."""
        slot = self._cache.allocate()
        self._tokens[slot], self._scored[slot] = [], []
        self.extend(slot, token_ids)
        return slot

    def extend(self, slot: int, token_ids: Sequence[int]) -> None:
        """Append `token_ids` to the sequence. Raises `ArgumentError` for an id outside the verifier's vocabulary."""
        tokens = self._known(slot)
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise ArgumentError("token_ids", f"ids in [0, {self.vocab_size}), the verifier's vocabulary", token)
        if token_ids and self._cache.lengths[slot] == len(tokens) and token_ids[0] in self._scored[slot]:
            self._cache.keep_row(slot, self._scored[slot].index(token_ids[0]))
        if token_ids:
            self._scored[slot] = []
        tokens.extend(token_ids)

    def token_ids(self, slot: int) -> list[int]:
        """The sequence's tokens so far."""
        return list(self._known(slot))

    def rollback(self, slot: int, length: int) -> None:
        """Forget the tokens from `length` on."""
        tokens = self._known(slot)
        if not 0 <= length <= len(tokens):
            raise ArgumentError("length", f"between 0 and {len(tokens)}, the sequence's length", length)
        if length < len(tokens):
            del tokens[length:]
            self._cache.truncate(slot, length)
            self._scored[slot] = []

    def fork(self, slot: int) -> int:
        """A slot for a copy of the sequence, with its cached prefix."""
        tokens = self._known(slot)
        child = self._cache.fork(slot)
        self._tokens[child], self._scored[child] = list(tokens), []
        return child

    def free(self, slot: int) -> None:
        """Give the slot back."""
        self._known(slot)
        del self._tokens[slot], self._scored[slot]
        self._cache.free(slot)

    def score(self, slots: Sequence[int], candidate_ids: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, int]]:
        """Score each sequence's candidates as its next token, in one pass.

        Args:
            slots: Distinct slots.
            candidate_ids: Candidates of each; ids outside the verifier's vocabulary get -inf.

        Returns:
            Per slot the scores, float32 [len(candidates)] on the CPU, and the number of token rows computed for them.
        """
        if not slots:
            return []
        rows = []
        for slot, candidates in zip(slots, candidate_ids, strict=True):
            pending = self._known(slot)[self._cache.lengths[slot] :]
            rows.append(Rows(slot, pending, [c if c < self.vocab_size else 0 for c in candidates]))
        scores = self._scorer.forward(self._cache, rows).cpu()
        results = []
        for row_scores, row, candidates in zip(scores, rows, candidate_ids, strict=True):
            scored = row_scores[len(row.chain) : len(row)].clone()
            scored[torch.tensor(list(candidates)) >= self.vocab_size] = float("-inf")
            self._scored[row.slot] = list(candidates)
            results.append((scored, len(row)))
        return results

    def prefix(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cached keys and values per layer, each [num_kv_heads, cached_length, head_dim]."""
        return self._cache.prefix(slot)

    def _known(self, slot: int) -> list[int]:
        if slot not in self._tokens:
            raise ArgumentError("slot", "a slot in use", slot)
        return self._tokens[slot]
