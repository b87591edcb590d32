"""The ways in which the reference backend gets scores: plain, joint look-ahead, lazy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from llm2_fast.backends.options import candidate_options
from llm2_fast.cache.slots import SlotCache
from llm2_fast.models.decoder import FINAL_LAYER, LanguageModel, Rows
from llm2_fast.models.loading import LoadedModel
from llm2_fast.reference import NEG_INF, Candidates, Picked, select_candidates
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import FullVerifier, HeadVerifier, Verifier, VerifierSession
from llm2_fast.verifier.scorer import Scorer


class Plan(ABC):
    """How scores come about and what is cached once a token is chosen."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache

    def max_position_embeddings(self, lm: LanguageModel) -> int | None:
        """Context that the LLM and the verifier share."""
        return lm.max_position_embeddings

    def vocab_size(self, lm: LanguageModel) -> int:
        """Token ids that the LLM and the verifier share are those below."""
        return lm.vocab_size

    def propose(self, logits: torch.Tensor, sequences: list[Sequence]) -> Candidates:
        return select_candidates(logits, **candidate_options(sequences))

    @abstractmethod
    def score(self, sequences: list[Sequence], candidates: Candidates) -> tuple[torch.Tensor | None, list[int]]:
        """Scores [B, K] (None: there is no verifier) and verifier rows computed per sequence."""

    def commit(self, sequences: list[Sequence], candidates: Candidates, picked: Picked) -> None:
        """Keep what was computed for the chosen tokens."""

    def add(self, sequence: Sequence) -> None:
        """A sequence was given a slot."""

    def fork(self, parent: Sequence, child: Sequence, length: int | None) -> None:
        """A slot was forked, see `Backend.fork`."""

    def free(self, slot: int) -> None:
        """A slot is about to be given back; it may not have been added yet."""


class PlainPlan(Plan):
    """No verifier: every token is a candidate, nothing is scored."""

    def propose(self, logits: torch.Tensor, sequences: list[Sequence]) -> Candidates:
        batch, vocab = logits.shape
        options = {"log_alpha": torch.full((batch,), float("-inf")), "candidate_top_k": torch.zeros(batch).int()}
        usable = select_candidates(logits, **options, max_candidates=1)  # for the checks and the log-sum-exp
        ids = torch.arange(vocab, dtype=torch.int32).expand(batch, vocab)
        count = torch.where(usable.count > 0, vocab, 0).to(torch.int32)
        return Candidates(ids, logits, count, usable.logsumexp, torch.zeros_like(usable.cut))

    def score(self, sequences: list[Sequence], candidates: Candidates) -> tuple[None, list[int]]:
        return None, [0] * len(sequences)


class JointPlan(Plan):
    """`head`: one LLM pass over all branches gives their scores and, for the chosen one, the next logits."""

    def __init__(self, lm: LanguageModel, cache: SlotCache, hidden: dict[int, torch.Tensor], scorer: Scorer) -> None:
        super().__init__(cache)
        self._lm, self._hidden, self._head = lm, hidden, scorer.head
        self._branches: dict[int, torch.Tensor] = {}  # final hidden states [rows, hidden_size] of each slot's branches

    def score(self, sequences: list[Sequence], candidates: Candidates) -> tuple[torch.Tensor, list[int]]:
        counts = candidates.count.tolist()
        rows = [
            Rows(s.slot, branches=ids[:count].tolist())
            for s, ids, count in zip(sequences, candidates.ids, counts, strict=True)
        ]
        rows = [r for r in rows if len(r) > 0]
        scores = torch.full(candidates.ids.shape, float("-inf"))
        if rows:
            final, *read = self._lm.forward(self._cache, rows, (FINAL_LAYER, *self._head.layers))
            with torch.no_grad():
                branch_scores = iter(self._head(read).cpu())
            self._branches = {r.slot: states for r, states in zip(rows, final, strict=True)}
            for row, count in enumerate(counts):
                if count:
                    scores[row, :count] = next(branch_scores)[:count]
        return scores, [count if count > 1 else 0 for count in counts]

    def commit(self, sequences: list[Sequence], candidates: Candidates, picked: Picked) -> None:
        for sequence, index in zip(sequences, picked.index.tolist(), strict=True):
            if index >= 0:
                self._cache.keep_row(sequence.slot, index)
                self._hidden[sequence.slot] = self._branches[sequence.slot][index]


class LazyPlan(Plan):
    """`lora` and `full`: the verifier runs at ambiguous steps only and catches up on what it skipped."""

    def __init__(self, cache: SlotCache, scorer: Scorer) -> None:
        super().__init__(cache)
        self.session = VerifierSession(scorer)
        self._limit = scorer.decoder.max_position_embeddings
        self._slots: dict[int, int] = {}  # LLM slot -> verifier slot

    def max_position_embeddings(self, lm: LanguageModel) -> int | None:
        limits = [limit for limit in (lm.max_position_embeddings, self._limit) if limit is not None]
        return min(limits, default=None)

    def vocab_size(self, lm: LanguageModel) -> int:
        return min(lm.vocab_size, self.session.vocab_size)

    def propose(self, logits: torch.Tensor, sequences: list[Sequence]) -> Candidates:
        # What the verifier does not know cannot be scored, so it is no candidate.
        logits[:, self.session.vocab_size :] = NEG_INF
        return super().propose(logits, sequences)

    def score(self, sequences: list[Sequence], candidates: Candidates) -> tuple[torch.Tensor, list[int]]:
        scores = torch.full(candidates.ids.shape, float("-inf"))
        ambiguous = [row for row, count in enumerate(candidates.count.tolist()) if count > 1]
        slots = [self._slots[sequences[row].slot] for row in ambiguous]
        branches = [candidates.ids[row, : candidates.count[row]].tolist() for row in ambiguous]
        verifier_rows = [0] * len(sequences)
        for row, (row_scores, num_rows) in zip(ambiguous, self.session.score(slots, branches), strict=True):
            scores[row, : len(row_scores)] = row_scores
            verifier_rows[row] = num_rows
        return scores, verifier_rows

    def commit(self, sequences: list[Sequence], candidates: Candidates, picked: Picked) -> None:
        for sequence, token in zip(sequences, picked.token.tolist(), strict=True):
            if token >= 0:
                self.session.extend(self._slots[sequence.slot], [token])

    def add(self, sequence: Sequence) -> None:
        self._slots[sequence.slot] = self.session.add(sequence.tokens_from(0))

    def fork(self, parent: Sequence, child: Sequence, length: int | None) -> None:
        slot, length = self._slots[parent.slot], len(parent) if length is None else length
        self.session.compute([slot])  # once for all forks
        self._slots[child.slot] = forked = self.session.fork(slot)
        self.session.rollback(forked, length)
        self.session.extend(forked, child.tokens_from(length))

    def free(self, slot: int) -> None:
        if slot in self._slots:
            self.session.free(self._slots.pop(slot))


def make_plan(
    lm: LanguageModel,
    cache: SlotCache,
    hidden: dict[int, torch.Tensor],
    model: LoadedModel,
    verifier: Verifier | None,
) -> Plan:
    """The plan for a verifier's kind, over the LLM's cache and the final hidden state of each slot's last token."""
    if verifier is None:
        return PlainPlan(cache)
    scorer = verifier.scorer(model)
    if isinstance(verifier, FullVerifier):
        scorer.decoder.check()
    if isinstance(verifier, HeadVerifier):
        return JointPlan(lm, cache, hidden, scorer)
    return LazyPlan(cache, scorer)
