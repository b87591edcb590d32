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
        token_ids = self._checked(token_ids, 0)
        slot = self._cache.allocate()
        self._tokens[slot], self._scored[slot] = token_ids, []
        return slot

    def extend(self, slot: int, token_ids: Sequence[int]) -> None:
        """Append `token_ids` to the sequence.

        Raises:
            ArgumentError: An id is outside the verifier's vocabulary, or the sequence would outgrow its context.
        """
        tokens = self._known(slot)
        token_ids = self._checked(token_ids, len(tokens))
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

        Raises:
            ArgumentError: Slots and candidates do not fit together, or a slot occurs twice or is not in use.
        """
        slots, candidate_ids = list(slots), [[int(c) for c in candidates] for candidates in candidate_ids]
        self._check_question(slots, candidate_ids)
        rows = []
        for slot, candidates in zip(slots, candidate_ids, strict=True):
            pending = self._tokens[slot][self._cache.lengths[slot] :]
            rows.append(Rows(slot, pending, [c if c < self.vocab_size else 0 for c in candidates]))
            self._scored[slot] = []  # the pass overwrites their rows, whether it succeeds or not
        scores = self._forward(rows)
        results = []
        for row, candidates in zip(rows, candidate_ids, strict=True):
            scored = scores[row.slot][len(row.chain) : len(row)].clone() if len(row) > 0 else torch.empty(0)
            scored[torch.tensor(candidates, dtype=torch.long) >= self.vocab_size] = float("-inf")
            self._scored[row.slot] = candidates
            results.append((scored, len(row)))
        return results

    def score_tokens(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Append tokens to each sequence and score each of them, given those before, in one pass.

        Args:
            slots: Distinct slots.
            token_ids: Tokens of each.

        Returns:
            Per slot the scores, float32 [len(tokens)] on the CPU.

        Raises:
            ArgumentError: As for `extend`, or slots and tokens do not fit together; nothing has been appended then.
        """
        slots, token_ids = list(slots), [list(tokens) for tokens in token_ids]
        self._check_slots(slots, "token_ids", len(token_ids))
        token_ids = [
            self._checked(tokens, len(self._tokens[slot])) for slot, tokens in zip(slots, token_ids, strict=True)
        ]
        rows = []
        for slot, tokens in zip(slots, token_ids, strict=True):
            pending = self._tokens[slot][self._cache.lengths[slot] :]
            self._tokens[slot].extend(tokens)
            rows.append(Rows(slot, [*pending, *tokens]))
            self._scored[slot] = []
        scores = self._forward(rows)
        return [
            scores[row.slot][len(row) - len(tokens) : len(row)].clone() if tokens else torch.empty(0)
            for row, tokens in zip(rows, token_ids, strict=True)
        ]

    def compute(self, slots: Sequence[int]) -> None:
        """Cache the tokens noted so far, in one pass, so that forks share them."""
        rows = [Rows(slot, self._known(slot)[self._cache.lengths[slot] :]) for slot in slots]
        for row in rows:
            if len(row) > 0:
                self._scored[row.slot] = []
        self._forward(rows)

    def prefix(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cached keys and values per layer, each [num_kv_heads, cached_length, head_dim]."""
        return self._cache.prefix(slot)

    def _forward(self, rows: list[Rows]) -> dict[int, torch.Tensor]:
        """Scores by slot of the rows that are not empty, from one pass."""
        rows = [row for row in rows if len(row) > 0]
        if not rows:
            return {}
        return dict(zip((row.slot for row in rows), self._scorer.forward(self._cache, rows).cpu(), strict=True))

    def _check_question(self, slots: list[int], candidate_ids: list[list[int]]) -> None:
        self._check_slots(slots, "candidate_ids", len(candidate_ids))
        for slot, candidates in zip(slots, candidate_ids, strict=True):
            if negative := [c for c in candidates if c < 0]:
                raise ArgumentError("candidate_ids", "ids of at least 0", negative[0])
            if candidates:
                self._checked([0], len(self._tokens[slot]))  # a candidate takes a position, too

    def _check_slots(self, slots: list[int], name: str, count: int) -> None:
        for slot in slots:
            self._known(slot)
        if len(set(slots)) != len(slots):
            raise ArgumentError("slots", "distinct slots", slots)
        if count != len(slots):
            raise ArgumentError(name, f"tokens for each of {len(slots)} slots", f"{count}")

    def _checked(self, token_ids: Sequence[int], length: int) -> list[int]:
        limit = self._scorer.decoder.max_position_embeddings
        if limit is not None and length + len(token_ids) > limit:
            raise ArgumentError("token_ids", f"at most {limit} tokens, the verifier's context", length + len(token_ids))
        for token in token_ids:
            if int(token) != token or not 0 <= token < self.vocab_size:
                raise ArgumentError("token_ids", f"ids in [0, {self.vocab_size}), the verifier's vocabulary", token)
        return [int(token) for token in token_ids]

    def _known(self, slot: int) -> list[int]:
        if slot not in self._tokens:
            raise ArgumentError("slot", "a slot in use", slot)
        return self._tokens[slot]
