"""`Pairs`: what a `head` learns from, hidden states of the frozen LLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from llm2_fast.models.decoder import LanguageModel, Rows
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Reading, Solution, System1View, read_solution


@dataclass(frozen=True)
class Pairs:
    """Hidden states of positives and of the negatives they are compared with.

    Attributes:
        positives: [num_positives, features], each at its own position.
        negatives: [num_pairs, features], each at its own position, in place of the positive.
        positive: int64 [num_pairs], row of `positives` that each negative is compared with.
        system1: Of the pairs.
    """

    positives: torch.Tensor
    negatives: torch.Tensor
    positive: torch.Tensor
    system1: System1View

    def __len__(self) -> int:
        return len(self.negatives)

    def where(self, mask: torch.Tensor) -> Pairs:
        """The pairs for which `mask`, bool [num_pairs], is true."""
        system1 = System1View(self.system1.plausible[mask], self.system1.margin[mask])
        return Pairs(self.positives, self.negatives[mask], self.positive[mask], system1)

    @classmethod
    def concatenate(cls, parts: Sequence[Pairs]) -> Pairs:
        """All pairs of at least one part."""
        counts = torch.tensor([len(part.positives) for part in parts])
        offsets = counts.cumsum(dim=0) - counts
        return cls(
            torch.cat([part.positives for part in parts]),
            torch.cat([part.negatives for part in parts]),
            torch.cat([part.positive + offset for part, offset in zip(parts, offsets, strict=True)]),
            System1View.concatenate([part.system1 for part in parts]),
        )


def collect_pairs(
    lm: LanguageModel, solutions: Iterable[Solution], config: TrainingConfig, *, progress: bool = False
) -> Pairs | None:
    """Run every solution once, then all of its branches in one pass over the cached solution.

    Args:
        lm: The LLM.
        solutions: Those without a pair contribute nothing.
        config: Its `layers`, concatenated as `ScoreHead` reads them, `alpha` and `max_candidates`.
        progress: Show a progress bar.

    Returns:
        `Pairs`, features in float32 on the CPU; None if there are none.
    """
    parts = []
    for solution in tqdm(solutions, desc="hidden states", disable=not progress, unit="solution"):
        reading = read_solution(lm, solution, config.alpha, config.max_candidates, config.layers)
        if reading is not None:
            parts.append(_hidden_pairs(lm, reading, config.layers))
    return Pairs.concatenate(parts) if parts else None


def _hidden_pairs(lm: LanguageModel, reading: Reading, layers: tuple[int, ...]) -> Pairs:
    example = reading.example
    branches = Rows(
        reading.slot,
        branches=example.branch_ids.tolist(),
        branch_positions=example.branch_positions.tolist(),
    )
    behind = torch.cat([h[0] for h in lm.forward(reading.cache, [branches], layers)], dim=-1)
    chain = torch.cat(reading.hidden_states, dim=-1)[: len(example.input_ids)]
    rows = torch.cat([chain, behind]).float().cpu()
    return Pairs(rows[example.positive_rows], rows[example.negative_rows], example.positive, example.system1)
