"""`Scorer`: a verifier ready to run on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llm2_fast.cache.slots import SlotCache
from llm2_fast.models.decoder import Decoder, Rows


class Head(Protocol):
    """Maps hidden states to scores."""

    layers: tuple[int, ...]

    def __call__(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """float32 [...] from one [..., hidden_size] per layer."""


@dataclass(frozen=True)
class Scorer:
    """A decoder and the head that reads its hidden states.

    Attributes:
        decoder: For `lora` with the adapter applied, for `full` the verifier's own.
        head: Reads `head.layers` of it.
    """

    decoder: Decoder
    head: Head

    def forward(self, cache: SlotCache, rows: Sequence[Rows]) -> torch.Tensor:
        """Scores float32 [B, Q] of one pass over `rows`, laid out as `Decoder.forward` returns them."""
        hidden_states = self.decoder.forward(cache, rows, self.head.layers)
        with torch.no_grad():
            return self.head(hidden_states)
