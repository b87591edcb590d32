"""`PairwiseAccuracy`: how often the positive comes before the negative."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llm2_fast.config import GenerationConfig
from llm2_fast.train.examples import System1View


@dataclass(frozen=True)
class PairwiseAccuracy:
    """Share of held-out pairs in which the positive comes before the negative; NaN without pairs.

    Attributes:
        num_pairs: Pairs measured.
        verifier: By the verifier's score alone.
        system1: By System 1's logit alone.
        combined: By the adjusted logit z + beta * s with the default beta.
    """

    num_pairs: int
    verifier: float
    system1: float
    combined: float

    @classmethod
    def measure(cls, margin: torch.Tensor, system1: System1View, mask: torch.Tensor) -> PairwiseAccuracy:
        """Of the pairs for which `mask`, bool [num_pairs], is true.

        Args:
            margin: float32 [num_pairs], the verifier's score of the positive minus that of the negative.
            system1: Of the same pairs.
        """
        margin, system1_margin = margin[mask], system1.margin[mask]
        margins = margin, system1_margin, system1_margin + GenerationConfig().beta * margin
        return cls(len(margin), *(float((m > 0).double().mean()) for m in margins))

    @property
    def beats_chance(self) -> bool:
        """Whether the verifier is right in more than half of the pairs by two standard errors of a fair coin."""
        return self.verifier > 0.5 + 1 / math.sqrt(max(1, self.num_pairs))
