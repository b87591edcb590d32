"""The reference backend: Hugging Face models, torch ops, one forward pass per model and step."""

from __future__ import annotations

import torch

from llm2_fast.backends.backend import Backend, check_fork
from llm2_fast.backends.options import pick_options, seen_tokens
from llm2_fast.backends.outputs import step_outputs
from llm2_fast.backends.plans import make_plan
from llm2_fast.cache.slots import SlotCache
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import LanguageModel, Rows
from llm2_fast.models.loading import LoadedModel
from llm2_fast.reference import adjust_and_pick
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import Verifier


class ReferenceBackend(Backend):
    """Runs any Hugging Face decoder-only model with any verifier.

    Args:
        model: The LLM.
        verifier: System 2, or None for plain decoding.
        kv_cache_memory_bytes: None. The caches grow as needed.

    Raises:
        ArgumentError: The model keeps other conventions, or `kv_cache_memory_bytes` is given.
    """

    name = "reference"

    def __init__(self, model: LoadedModel, verifier: Verifier | None, kv_cache_memory_bytes: int | None = None) -> None:
        if kv_cache_memory_bytes is not None:
            expected = "None with the reference backend, whose caches grow as needed"
            raise ArgumentError("kv_cache_memory_bytes", expected, kv_cache_memory_bytes)
        self._lm = LanguageModel(model.model)
        self._lm.check()
        self._cache = SlotCache()
        self._hidden: dict[int, torch.Tensor] = {}  # final hidden state [hidden_size] of each slot's last token
        self._plan = make_plan(self._lm, self._cache, self._hidden, model, verifier)
        self.vocab_size = self._plan.vocab_size(self._lm)
        self.max_position_embeddings = self._plan.max_position_embeddings(self._lm)

    def reserve(self, sequence: Sequence) -> None:
        if sequence.slot is None:
            sequence.slot = self._cache.allocate()
            self._plan.add(sequence)

    def prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.reserve(sequence)
        self._advance(sequences)

    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        check_fork(child, length)
        child.slot = self._cache.fork(parent.slot, length)
        if length is None:
            self._hidden[child.slot] = self._hidden[parent.slot]
        self._plan.fork(parent, child, length)

    def free(self, sequence: Sequence) -> None:
        slot, sequence.slot = sequence.slot, None
        if slot is not None:
            self._plan.free(slot)
            self._cache.free(slot)
            self._hidden.pop(slot, None)

    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        self._advance(sequences)
        return self._lm.logits(torch.stack([self._hidden[s.slot] for s in sequences])).cpu()

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        logits = self.logits(sequences)
        candidates = self._plan.propose(logits, sequences)
        scores, verifier_rows = self._plan.score(sequences, candidates)
        seen = seen_tokens(sequences, candidates.ids, self.vocab_size)
        picked = adjust_and_pick(
            candidates.ids, candidates.logits, candidates.count, scores, seen=seen, **pick_options(sequences)
        )
        self._plan.commit(sequences, candidates, picked)
        return step_outputs(sequences, candidates, scores, picked, verifier_rows)

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
