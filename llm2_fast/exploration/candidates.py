"""The tokens that compete with a solution's own, position by position."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.skip import Skip
from llm2_fast.exploration.teacher import Teacher
from llm2_fast.ops import select_candidates
from llm2_fast.sequence import Sequence

_MAX_CANDIDATES = 32  # of the plausible set, as in decoding


@dataclass(frozen=True)
class Position:
    """A position of a solution with at least one candidate besides the solution's own token.

    Attributes:
        index: Into the tokens of the whole chat.
        ground_truth_id: The solution's own token.
        ground_truth_logprob: Its log-probability.
        plausible: It is in the plausible set.
        candidates: Token ids and log-probabilities of the others, most probable first.
    """

    index: int
    ground_truth_id: int
    ground_truth_logprob: float
    plausible: bool
    candidates: tuple[tuple[int, float], ...]


def find_positions(teacher: Teacher, sequence: Sequence, start: int, config: ExplorationConfig) -> list[Position]:
    """The positions from `start` on of a prefilled sequence at which a token besides its own is plausible.

    Raises:
        Skip: System 1's logits are NaN or infinite somewhere.
    """
    found = []
    for batch, logits in teacher.logits(sequence, range(start, len(sequence))):
        options = {
            "log_alpha": torch.full((len(batch),), config.log_alpha),
            "candidate_top_k": torch.zeros(len(batch), dtype=torch.int32),
        }
        plausible = select_candidates(logits, **options, max_candidates=max(_MAX_CANDIDATES, config.top_k + 1))
        columns = (plausible.ids, plausible.logits - plausible.logsumexp[:, None], plausible.count, plausible.logsumexp)
        rows = zip(batch, logits, *(column.tolist() for column in columns), strict=True)
        for index, row, ids, logprobs, count, logsumexp in rows:
            if count == 0:
                raise Skip("the model's logits are not finite")
            truth = sequence.prompt_token_ids[index]
            others = [pair for pair in zip(ids[:count], logprobs[:count], strict=True) if pair[0] != truth]
            if others:
                kept = others if config.bypass else others[: config.top_k]
                truth_logprob = float(row[truth]) - logsumexp
                found.append(Position(index, truth, truth_logprob, truth in ids, tuple(kept)))
    return found


def draw_positions(positions: list[Position], limit: int | None, seed: str) -> list[Position]:
    """At most `limit` of the positions, in order."""
    if limit is None or len(positions) <= limit:
        return positions
    kept = random.Random(seed).sample(range(len(positions)), limit)
    return [positions[i] for i in sorted(kept)]
