"""The ways in which the cpu backend gets scores: plain, joint look-ahead, lazy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from llm2_fast.backends.cached_decoder import CachedDecoder, PassRows
from llm2_fast.backends.compiled_plan import CompiledPlan, Twins
from llm2_fast.backends.options import occurring_tokens, pick_options, seen_tokens
from llm2_fast.backends.outputs import step_outputs
from llm2_fast.backends.step_tensors import StepTensors
from llm2_fast.ops import adjust_and_pick
from llm2_fast.reference import Candidates
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence

_LONG = 64  # more skipped tokens than this do not ride along with the candidates


class CpuPlan(CompiledPlan, ABC):
    """One step of a batch, and what a verifier keeps of its sequences."""

    def __init__(self, extension: ModuleType, llm: CachedDecoder) -> None:
        self._extension, self._llm = extension, llm
        self._tensors: StepTensors | None = None

    @abstractmethod
    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        """Choose the next token of each sequence."""

    def prefill(self, sequences: list[Sequence]) -> None:
        """Compute what a verifier keeps of all tokens, if it needs it at every step."""

    def _tensors_for(self, sequences: list[Sequence]) -> StepTensors:
        if self._tensors is None or not self._tensors.fit(sequences):
            self._tensors = self._make_tensors(sequences)
        return self._tensors

    def _make_tensors(self, sequences: list[Sequence]) -> StepTensors:
        return StepTensors(self._extension, sequences)

    def _pending(self, sequences: list[Sequence]) -> PassRows:
        """Rows for the tokens that the LLM's cache lacks: the last one, or none right after the prompt."""
        slots = [s.slot for s in sequences]
        return self._llm.pending_rows(slots, [s.tokens_from(self._llm.lengths[s.slot]) for s in sequences])


class PlainCpuPlan(CpuPlan):
    """No verifier: the pick is among the whole vocabulary."""

    def __init__(self, extension: ModuleType, llm: CachedDecoder) -> None:
        super().__init__(extension, llm)
        self._candidates: Candidates | None = None  # the whole vocabulary, arrays as `_tensors` has them

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        picked = self._run(sequences).arrays.picked
        return step_outputs(sequences, self._candidates, None, picked, [0] * len(sequences))

    def _make_tensors(self, sequences: list[Sequence]) -> StepTensors:
        vocab_size = self._llm.spec.vocab_size
        tensors = StepTensors(self._extension, sequences, max_candidates=1, pick_width=vocab_size)
        usable, logits = tensors.arrays.candidates, tensors.arrays.picked.adjusted
        ids = np.broadcast_to(np.arange(vocab_size, dtype=np.int32), logits.shape)
        self._candidates = usable._replace(ids=ids, logits=logits, cut=np.zeros_like(usable.cut))
        return tensors

    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        # Every logit is written only where a token is drawn; what is drawn is left aside.
        drawing = [replace(s, config=s.config.merge(temperature=1.0)) for s in sequences]
        return self._run(drawing).picked.adjusted

    def _run(self, sequences: list[Sequence]) -> StepTensors:
        vocab_size = self._llm.spec.vocab_size
        tensors = self._tensors_for(sequences)
        pending = self._pending(sequences)
        seen = occurring_tokens(sequences, vocab_size)
        self._llm.decoder.plain_step(
            self._llm.cache,
            tensors.bound,
            [s.slot for s in sequences],
            pending.token_ids,
            pending.slots,
            pending.positions,
            None if seen is None else to_dlpack(seen),
            self._llm.num_threads,
        )
        return tensors


class JointCpuPlan(CpuPlan):
    """`head`: one pass over all branches gives their scores and, for the chosen one, the next logits."""

    def __init__(self, extension: ModuleType, llm: CachedDecoder, head: Any) -> None:
        super().__init__(extension, llm)
        self._head = head

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        tensors = self._tensors_for(sequences)
        slots = [s.slot for s in sequences]
        lengths = [self._llm.lengths[slot] for slot in slots]
        seen = occurring_tokens(sequences, self._llm.spec.vocab_size)
        adapted_cache, adapted_slots = self._adapted_slots(slots)
        self._llm.decoder.joint_step(
            self._llm.cache,
            tensors.bound,
            slots,
            lengths,
            self._head,
            adapted_cache,
            adapted_slots,
            None if seen is None else to_dlpack(seen),
            self._llm.num_threads,
        )
        candidates, scores, picked = tensors.arrays
        for slot, index in zip(slots, picked.index.tolist(), strict=True):
            if index >= 0:
                self._committed(slot)
        return step_outputs(sequences, candidates, scores, picked, self._verifier_rows(candidates.count.tolist()))

    def _adapted_slots(self, slots: list[int]) -> tuple[Any, list[int]]:
        """The cache of the branches' adapted twins, if they have any, and their slots."""
        return None, []

    def _committed(self, slot: int) -> None:
        """The chosen branch of a slot has been committed."""
        self._llm.lengths[slot] += 1

    def _verifier_rows(self, counts: list[int]) -> list[int]:
        return [count if count > 1 else 0 for count in counts]


class JointLoraCpuPlan(JointCpuPlan):
    """`lora`: the same pass runs every branch a second time, with the adapter.

    Args:
        extension: The module `llm2_fast_C`.
        llm: The LLM, over the decoder with the adapter's updates.
        adapted: The LLM with the adapter, over the same decoder. Its keys and values differ from the LLM's.
        head: `llm2_fast_C.ScoreHead`.
    """

    def __init__(self, extension: ModuleType, llm: CachedDecoder, adapted: CachedDecoder, head: Any) -> None:
        super().__init__(extension, llm, head)
        self._adapted, self._twins = adapted, Twins(adapted)

    def prefill(self, sequences: list[Sequence]) -> None:
        self._twins.catch_up(sequences)

    def _adapted_slots(self, slots: list[int]) -> tuple[Any, list[int]]:
        return self._adapted.cache, [self._twins[slot] for slot in slots]

    def _committed(self, slot: int) -> None:
        super()._committed(slot)
        self._adapted.lengths[self._twins[slot]] += 1

    def _verifier_rows(self, counts: list[int]) -> list[int]:
        return counts  # an unambiguous step's row extends the adapter's cache


class LazyCpuPlan(CpuPlan):
    """`full`: the verifier runs at ambiguous steps only and catches up on what it skipped."""

    def __init__(self, extension: ModuleType, llm: CachedDecoder, verifier: CachedDecoder, head: Any) -> None:
        super().__init__(extension, llm)
        self._verifier, self._twins, self._head = verifier, Twins(verifier), head

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        tensors = self._tensors_for(sequences)
        pending = self._pending(sequences)
        self._llm.decoder.propose(
            self._llm.cache,
            tensors.bound,
            [s.slot for s in sequences],
            pending.token_ids,
            pending.slots,
            pending.positions,
            self._verifier.spec.vocab_size,  # what the verifier does not know cannot be scored, so it is no candidate
            self._llm.num_threads,
        )
        candidates = tensors.candidates
        scores, first_rows, verifier_rows = self._score(sequences, candidates)
        seen = seen_tokens(sequences, candidates.ids, self._llm.spec.vocab_size)
        picked = adjust_and_pick(
            candidates.ids, candidates.logits, candidates.count, scores, seen=seen, **pick_options(sequences)
        )
        for sequence, first_row, index in zip(sequences, first_rows, picked.index.tolist(), strict=True):
            if index >= 0 and first_row is not None:
                self._verifier.keep_row(self._twins[sequence.slot], first_row + index)
        return step_outputs(sequences, candidates, scores, picked, verifier_rows)

    def _score(
        self, sequences: list[Sequence], candidates: Candidates
    ) -> tuple[torch.Tensor, list[int | None], list[int]]:
        """Scores [B, K], and per sequence the row of its first branch in the last pass and the number of rows."""
        scores = torch.full(candidates.ids.shape, float("-inf"))
        counts = candidates.count.tolist()
        first_rows: list[int | None] = [None] * len(sequences)
        verifier_rows = [0] * len(sequences)
        ambiguous = [row for row, count in enumerate(counts) if count > 1]
        if not ambiguous:
            return scores, first_rows, verifier_rows
        for row in ambiguous:
            verifier_rows[row] = len(self._twins.skipped(sequences[row])) + counts[row]
        # Long stretches of skipped tokens, prompts mostly, run in passes of their own.
        self._twins.catch_up([sequences[row] for row in ambiguous if verifier_rows[row] - counts[row] > _LONG])
        rows = PassRows.empty()
        for row in ambiguous:
            slot = self._twins[sequences[row].slot]
            chain = self._verifier.pending_rows([slot], [self._twins.skipped(sequences[row])])
            for token, position in zip(chain.token_ids, chain.positions, strict=True):
                rows.add(slot, token, position, stored=True)
            first_rows[row] = len(rows)
            length = self._verifier.lengths[slot]
            for token in candidates.ids[row, : counts[row]].tolist():
                rows.add(slot, token, length, stored=False)
        row_scores = self._verifier.forward(rows, self._head)
        for row in ambiguous:
            first, count = first_rows[row], counts[row]
            scores[row, :count] = row_scores[first : first + count]
        return scores, first_rows, verifier_rows
