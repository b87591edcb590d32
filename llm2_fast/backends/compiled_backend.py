"""`CompiledBackend`: slots and room for sequences, over a decoder and a plan."""

from __future__ import annotations

from typing import Any

import torch

from llm2_fast.backends.backend import Backend, check_fork
from llm2_fast.backends.cache_budget import CacheBudget
from llm2_fast.backends.compilation import cached_specs, compiled_sources
from llm2_fast.errors import CacheFullError
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import Verifier


class CompiledBackend(Backend):
    """What backends with compiled decoders and a bounded cache have in common.

    Subclasses set `_llm`, the LLM's decoder and cache, and `_plan`, what a step does and a verifier keeps.
    """

    _llm: Any
    _plan: Any

    def __init__(
        self,
        model: LoadedModel,
        verifier: Verifier | None,
        kv_cache_memory_bytes: int | None,
        cached: list[DecoderSpec] | None = None,
    ) -> None:
        self._budget = CacheBudget(cached or cached_specs(model, verifier), kv_cache_memory_bytes)
        configs = [source.config.get_text_config() for source in compiled_sources(model, verifier)]
        self.vocab_size = min(config.vocab_size for config in configs)
        self.max_position_embeddings = min(config.max_position_embeddings for config in configs)

    def check_fits(self, num_tokens: int, name: str) -> None:
        self._budget.check_fits(num_tokens, name)

    def reserve(self, sequence: Sequence) -> None:
        is_new = sequence.slot is None
        try:
            if is_new:
                sequence.slot = self._llm.allocate()
                self._plan.add(sequence)
            self._make_room(sequence)
        except CacheFullError:
            if is_new:
                self.free(sequence)
            raise

    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        check_fork(child, length)
        child.slot = self._llm.fork(parent.slot, length)
        try:
            self._plan.fork(parent, child, length)
        except CacheFullError:
            self.free(child)
            raise

    def free(self, sequence: Sequence) -> None:
        slot, sequence.slot = sequence.slot, None
        if slot is not None:
            self._plan.free(slot)
            self._llm.free(slot)

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        for sequence in sequences:
            self._make_room(sequence)
        return self._plan.step(sequences)

    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        return self._plan.logits(sequences)

    def prefix(self, sequence: Sequence) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cached keys and values of the LLM per layer, each [num_kv_heads, cached_length, head_dim]."""
        return self._llm.prefix(sequence.slot)

    def _make_room(self, sequence: Sequence) -> None:
        length = self._length(sequence) + 1  # the next token may be cached with the step that chooses it
        self._llm.reserve(sequence.slot, length)
        self._plan.reserve(sequence, length)

    def _length(self, sequence: Sequence) -> int:
        """Of the sequence, once the tokens of all steps that have begun are its own."""
        return len(sequence)
