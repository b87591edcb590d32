"""`ExplorationReport`: what an exploration did, and what it was spared."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ExplorationReport:
    """Counts over the problems explored by one call.

    Attributes:
        problems: Explored, skipped ones included.
        resumed: Found finished in the output already.
        skipped: Problems without supervision, by reason.
        positions: Tokens of the solutions.
        explored_positions: Those with a candidate besides the solution's own token that were looked at.
        candidates: Tokens whose quality was asked for.
        pairs: Token pairs written.
        rollouts: Continuations sampled, those of own solutions included.
        spared_rollouts: Continuations that were not sampled since the verdict was known.
        generated_tokens: Tokens of the continuations.
        prefilled_tokens: Tokens of prompts and solutions that were computed.
        shared_tokens: Tokens in front of continuations that were not computed again.
        seconds: Wall clock.
    """

    problems: int = 0
    resumed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    positions: int = 0
    explored_positions: int = 0
    candidates: int = 0
    pairs: int = 0
    rollouts: int = 0
    spared_rollouts: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    shared_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, everything else that takes time included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def add(self, other: ExplorationReport) -> None:
        """Add the counts of `other`; its time, which may have run beside this one's, is not added."""
        for entry in dataclasses.fields(self):
            if entry.name != "seconds":
                setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
