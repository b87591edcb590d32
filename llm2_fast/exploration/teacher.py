"""`Teacher`: what System 1 makes of given tokens, position by position."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

import torch

from llm2_fast.backends.backend import Backend
from llm2_fast.config import GenerationConfig
from llm2_fast.errors import CacheFullError
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.sequence import Sequence

_CONFIG = GenerationConfig()


class Teacher:
    """Teacher-forced passes over a backend without a verifier.

    Args:
        backend: Runs them.
        max_batch_size: Positions computed together.
        report: Counts what is computed.
    """

    def __init__(self, backend: Backend, max_batch_size: int, report: ExplorationReport) -> None:
        self._backend, self._max_batch_size, self._report = backend, max_batch_size, report

    @contextmanager
    def prefilled(self, token_ids: list[int]) -> Iterator[Sequence]:
        """A sequence with the keys and values of `token_ids`, as long as the context lasts."""
        sequence = Sequence(0, 0, _CONFIG, token_ids)
        try:
            self._backend.prefill([sequence])
            self._report.prefilled_tokens += len(token_ids)
            yield sequence
        finally:
            self._backend.free(sequence)

    def logits(self, sequence: Sequence, positions: SequenceOf[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Logits of the tokens at `positions` of a prefilled sequence, given those before.

        Args:
            sequence: As `prefilled` gave it.
            positions: Each in [1, len(sequence)].

        Yields:
            Some of the positions, in order, and their logits, float32 [B, vocab_size].

        Raises:
            CacheFullError: There is no room for one position.
        """
        first, size = 0, self._max_batch_size
        while batch := list(positions[first : first + size]):
            try:
                logits = self._logits(sequence, batch)
            except CacheFullError:
                if len(batch) == 1:
                    raise
                size = len(batch) // 2
                continue
            yield batch, logits
            first += len(batch)

    def _logits(self, sequence: Sequence, positions: list[int]) -> torch.Tensor:
        children = [Sequence(0, 0, _CONFIG, sequence.prompt_token_ids[:position]) for position in positions]
        try:
            for child in children:
                self._backend.fork(sequence, child, len(child) - 1)
            logits = self._backend.logits(children)
        finally:
            for child in children:
                self._backend.free(child)
        self._report.prefilled_tokens += len(children)
        return logits

    def mean_logprob(self, token_ids: list[int], start: int) -> float:
        """Mean log-probability of the tokens from `start` on, at least one, each given those before."""
        total = 0.0
        with self.prefilled(token_ids[:-1]) as sequence:
            for batch, logits in self.logits(sequence, range(start, len(token_ids))):
                targets = torch.tensor([token_ids[position] for position in batch])
                total += float(logits.log_softmax(dim=-1).gather(1, targets[:, None]).double().sum())
        return total / (len(token_ids) - start)
