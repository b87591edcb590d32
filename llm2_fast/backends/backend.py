"""`Backend`: what an engine asks of whatever runs the models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from llm2_fast.errors import ArgumentError
from llm2_fast.models.quantization import Quantization
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence


class Backend(ABC):
    """Keeps keys and values of sequences in slots and decodes them together, one token each per step.

    Where the memory for them is bounded, methods raise `CacheFullError` before anything is computed. After any other
    exception the sequences that were passed may hold wrong keys and values and have to be freed.
    """

    name: ClassVar[str]
    vocab_size: int
    max_position_embeddings: int | None
    quantization: Quantization | None = None  # of the weights it runs on

    def check_fits(self, num_tokens: int, name: str) -> None:
        """Raise `ArgumentError` if a sequence of `num_tokens`, called `name`, would not even fit alone."""

    @abstractmethod
    def reserve(self, sequence: Sequence) -> None:
        """Make room for the sequence's tokens and the next one, in a slot that it gets if it has none.

        Without room it has no slot afterwards if it had none before.
        """

    @abstractmethod
    def prefill(self, sequences: list[Sequence]) -> None:
        """Compute the keys and values of all tokens whose sequence lacks them, after `reserve` if it has no slot."""

    @abstractmethod
    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        """Give `child` a slot that shares what `parent` has computed. Without room it has none afterwards.

        Args:
            parent: Has a slot.
            child: A sequence whose tokens begin with those of `parent` or, with `length`, one that has the first
                `length` tokens in common.
            length: Share only this many tokens, which `parent` has computed, fewer than `child` has. `prefill` computes
                the rest or, without a verifier, the next step.
        """

    @abstractmethod
    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        """System 1's logits of the next token of each sequence, float32 [B, vocab_size]; none is chosen.

        Of a backend without a verifier; the next step may overwrite them.
        """

    @abstractmethod
    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        """Choose the next token of each sequence. The caller appends the tokens to the sequences."""

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        """Whether `begin_step` of these sequences may follow a step of theirs whose tokens they have not got yet."""
        return False

    def begin_step(self, sequences: list[Sequence]) -> Callable[[], list[StepOutput]]:
        """Enqueue a step where the backend can; the function that is returned waits for its outputs.

        At most one step before it may have tokens that the sequences have not got, and only if `can_run_ahead`. Room is
        made for those, too.
        """
        outputs = self.step(sequences)
        return lambda: outputs

    @abstractmethod
    def free(self, sequence: Sequence) -> None:
        """Give the sequence's slot back. Does nothing if it has none."""


def check_fork(child: Sequence, length: int | None) -> None:
    """Raise `ArgumentError` unless a child may be forked at `length`."""
    if length is not None and not 0 <= length < len(child):
        raise ArgumentError("length", f"fewer tokens than the {len(child)} of the child", length)
