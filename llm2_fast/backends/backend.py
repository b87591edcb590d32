"""`Backend`: what an engine asks of whatever runs the models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence


class Backend(ABC):
    """Keeps keys and values of sequences in slots and decodes them together, one token each per step."""

    name: ClassVar[str]
    vocab_size: int
    max_position_embeddings: int | None

    @abstractmethod
    def prefill(self, sequences: list[Sequence]) -> None:
        """Give each new sequence a slot and compute the keys and values of its prompt."""

    @abstractmethod
    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give `child`, a sequence with the same prompt, a slot that shares what `parent` has computed."""

    @abstractmethod
    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        """Choose the next token of each sequence. The caller appends the tokens to the sequences."""

    @abstractmethod
    def free(self, sequence: Sequence) -> None:
        """Give the sequence's slot back. Does nothing if it has none."""
