"""The reference backend: Hugging Face models, torch ops, one forward pass per model and step."""

from __future__ import annotations

import torch

from llm2_fast.backends.backend import Backend
from llm2_fast.backends.options import pick_options, seen_tokens
from llm2_fast.backends.plans import make_plan
from llm2_fast.cache.slots import SlotCache
from llm2_fast.models.decoder import LanguageModel, Rows
from llm2_fast.models.loading import LoadedModel
from llm2_fast.reference import Candidates, Picked, adjust_and_pick
from llm2_fast.results import StepOutput, TraceStep
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import Verifier

_BAD_LOGITS = "logits of the model: expected a finite maximum and no NaN"
_BAD_SCORES = "scores of the verifier: expected a finite adjusted maximum and no NaN"


class ReferenceBackend(Backend):
    """Runs any Hugging Face decoder-only model with any verifier.

    Args:
        model: The LLM.
        verifier: System 2, or None for plain decoding.
    """

    name = "reference"

    def __init__(self, model: LoadedModel, verifier: Verifier | None) -> None:
        self._lm = LanguageModel(model.model)
        self._lm.check()
        self._cache = SlotCache()
        self._hidden: dict[int, torch.Tensor] = {}  # final hidden state [hidden_size] of each slot's last token
        self._plan = make_plan(self._lm, self._cache, self._hidden, model, verifier)
        self.vocab_size = self._lm.vocab_size
        self.max_position_embeddings = self._plan.max_position_embeddings(self._lm)

    def prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.slot = self._cache.allocate()
            self._plan.add(sequence)
        self._advance(sequences)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        child.slot = self._cache.fork(parent.slot)
        self._hidden[child.slot] = self._hidden[parent.slot]
        self._plan.fork(parent.slot, child.slot)

    def free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._plan.free(sequence.slot)
            self._cache.free(sequence.slot)
            self._hidden.pop(sequence.slot, None)
            sequence.slot = None

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        self._advance(sequences)
        logits = self._lm.logits(torch.stack([self._hidden[s.slot] for s in sequences])).cpu()
        candidates = self._plan.propose(logits, sequences)
        scores, verifier_rows = self._plan.score(sequences, candidates)
        seen = seen_tokens(sequences, candidates.ids, self.vocab_size)
        picked = adjust_and_pick(
            candidates.ids, candidates.logits, candidates.count, scores, seen=seen, **pick_options(sequences)
        )
        self._plan.commit(sequences, candidates, picked)
        return [
            self._output(sequence, row, candidates, scores, picked, verifier_rows[row])
            for row, sequence in enumerate(sequences)
        ]

    def prefix(self, sequence: Sequence) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cached keys and values of the LLM per layer, each [num_kv_heads, cached_length, head_dim]."""
        return self._cache.prefix(sequence.slot)

    def _advance(self, sequences: list[Sequence]) -> None:
        """Run the LLM over the tokens that its cache lacks: a prompt, the last token, or nothing."""
        rows = [Rows(s.slot, s.tokens_from(self._cache.lengths[s.slot])) for s in sequences]
        rows = [r for r in rows if len(r) > 0]
        if rows:
            (hidden_states,) = self._lm.forward(self._cache, rows)
            for states, r in zip(hidden_states, rows, strict=True):
                self._hidden[r.slot] = states[len(r) - 1]

    def _output(
        self,
        sequence: Sequence,
        row: int,
        candidates: Candidates,
        scores: torch.Tensor | None,
        picked: Picked,
        verifier_rows: int,
    ) -> StepOutput:
        count, index = int(candidates.count[row]), int(picked.index[row])
        verified = self._plan.verifies
        shared = {
            "num_candidates": count if verified else 0,
            "cut": bool(candidates.cut[row]),
            "verifier_rows": verifier_rows,
        }
        if index < 0:
            return StepOutput(None, float("nan"), error=_BAD_LOGITS if count == 0 else _BAD_SCORES, **shared)
        system1_index = int(picked.system1_index[row])
        return StepOutput(
            int(picked.token[row]),
            float(picked.logprob[row]),
            intervention=verified and index != system1_index,
            trace=_trace(row, candidates, scores, picked, verified) if sequence.config.trace else None,
            **shared,
        )


def _trace(row: int, candidates: Candidates, scores: torch.Tensor | None, picked: Picked, verified: bool) -> TraceStep:
    index, system1_index = int(picked.index[row]), int(picked.system1_index[row])
    count = int(candidates.count[row])
    shown = torch.arange(count) if verified else torch.tensor([index])
    ids = candidates.ids[row, shown].tolist()
    return TraceStep(
        candidate_ids=tuple(ids),
        logprobs=tuple((candidates.logits[row, shown] - candidates.logsumexp[row]).tolist()),
        scores=tuple(scores[row, shown].tolist()) if scores is not None and count > 1 else None,
        adjusted_logits=tuple(picked.adjusted[row, shown].tolist()),
        system1_token_id=int(candidates.ids[row, system1_index]),
        token_id=int(picked.token[row]),
    )
