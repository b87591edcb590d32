"""`ExplorationReport`: what an exploration did, and what it was spared."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2_fast.files import replace_text

_FILE = "report.json"


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

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> ExplorationReport:
        """The sum over all calls of `explore` with an output directory, interrupted ones up to their last problem."""
        path = Path(directory) / _FILE
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return cls(**{**saved, "skipped": Counter(saved.get("skipped", {}))})

    def write(self, directory: str | os.PathLike[str], earlier: ExplorationReport) -> None:
        """Save the sum with that of earlier calls where `read` finds it."""
        total = dataclasses.replace(earlier, skipped=Counter(earlier.skipped), seconds=earlier.seconds + self.seconds)
        total.add(dataclasses.replace(self, resumed=0))
        replace_text(Path(directory) / _FILE, json.dumps(total.to_json()))

    def to_json(self) -> dict[str, Any]:
        """The counts by name."""
        return {**vars(self), "skipped": dict(self.skipped)}

    def add(self, other: ExplorationReport) -> None:
        """Add the counts of `other`; its time, which may have run beside this one's, is not added."""
        for entry in dataclasses.fields(self):
            if entry.name != "seconds":
                setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
