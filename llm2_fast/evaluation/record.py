"""`Record`: what one arm made of one problem, as it stands on disk."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2_fast.errors import ArgumentError
from llm2_fast.supervision import SHARD_PATTERN


@dataclass(frozen=True)
class SampleRecord:
    """One solution.

    Attributes:
        text: As generated.
        answer: The final answer it states; None if it states none or ended with an error.
        right: The answer equals the gold answer.
        vote: Index of the problem's first sample with an equal answer; None without an answer that can be compared.
        num_tokens: Generated.
        finish_reason: Of the sample.
        score: Sum of the verifier's scores of its tokens, for samples of plain decoding that are reranked.
        error: What went wrong, with `finish_reason` "error".
        token_ids: Of plain decoding with several samples, which verifiers can rerank.
    """

    text: str
    answer: str | None
    right: bool
    vote: int | None
    num_tokens: int
    finish_reason: str
    score: float | None = None
    error: str | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Record:
    """One problem in one arm.

    Attributes:
        problem_id: `Problem.id`.
        arm: `Arm.key`.
        samples: By sample index.
        steps, ambiguous_steps, interventions, cut_steps, verifier_rows: As in `GenerationStats`.
        num_candidates: Sum over the steps; 0 without a verifier.
        margins: With `trace`: ambiguous steps by the difference of the two best scores, to one decimal.
        seconds: Its share of the wall clock of the problems that were decoded together.
        rerank_seconds: The same for the scores of plain samples.
        taken_over: It was decoded by an earlier evaluation, in the same `seconds`.
    """

    problem_id: str
    arm: str
    samples: list[SampleRecord]
    steps: int
    ambiguous_steps: int
    interventions: int
    cut_steps: int
    num_candidates: int
    verifier_rows: int
    margins: dict[str, int]
    seconds: float
    rerank_seconds: float = 0.0
    taken_over: bool = False

    @property
    def id(self) -> str:
        """What tells it from other records."""
        return record_id(self.problem_id, self.arm)

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps({"id": self.id, **dataclasses.asdict(self)}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str, where: str) -> Record:
        """The record of a line; `where` is what errors call it.

        Raises:
            ArgumentError: It is none.
        """
        try:
            entry: dict[str, Any] = json.loads(line)
            del entry["id"]
            return cls(**{**entry, "samples": [SampleRecord(**sample) for sample in entry["samples"]]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArgumentError(where, "a record of an evaluation", repr(error)) from error


def read_records(directory: Path) -> dict[str, Record]:
    """By id, what the finished shards of an evaluation hold.

    Raises:
        ArgumentError: A line is no record; the message names file and line.
    """
    found = {}
    for path in sorted(directory.glob(SHARD_PATTERN)):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line:
                record = Record.from_json(line, f"{path.name}:{number}")
                found[record.id] = record
    return found


def record_id(problem_id: str, arm: str) -> str:
    """`Record.id` of a problem and the key of an arm."""
    return f"{problem_id} {arm}"
