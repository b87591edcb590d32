"""`Problem`: a question with its reference solution, and how to read them from JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2_fast.answers import GoldAnswer, answers_equal
from llm2_fast.errors import ArgumentError

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"\n?####[ \t]*(.+?)\s*$")


@dataclass(frozen=True)
class Problem:
    """A question and its reference solution.

    Attributes:
        question: What the user asks.
        answer: The reference, as written: in GSM8K's format the final answer follows `####` and calculator annotations
            stand in `<<...>>`.
    """

    question: str
    answer: str

    @property
    def id(self) -> str:
        """What tells it from other problems, wherever it stands: a hash, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.question, self.answer]).encode()).hexdigest()[:16]

    @property
    def has_solution(self) -> bool:
        """The reference says more than the final answer."""
        return self.gold.text != self.answer.strip()

    @property
    def gold(self) -> GoldAnswer:
        """The final answer of the reference."""
        return GoldAnswer.parse(self.answer)

    @property
    def rationale(self) -> str:
        """The reference without annotations and `#### x`; empty if it is the final answer only."""
        return _FINAL.sub("", _CALCULATOR.sub("", self.answer)).strip() if self.has_solution else ""

    @property
    def solution(self) -> str:
        """The reference as a model would say it: no annotations, and `#### x` spelled out."""
        return _FINAL.sub(r"\nThe answer is \1.", _CALCULATOR.sub("", self.answer)).strip()


ProblemSource = str | os.PathLike[str] | Iterable[Problem | Mapping[str, Any]]


def load_problems(source: ProblemSource) -> list[Problem]:
    r"""Problems from a JSON-lines file, or from mappings.

    Each has `question` and `answer`, or MATH's keys: `problem`, and `solution` with the final answer in `\boxed{}` or
    else in the field `answer`, which may also stand alone.

    Raises:
        ArgumentError: The file is missing, a line is no JSON object, or a field is missing or not text.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [_parse(entry, f"problems[{i}]") for i, entry in enumerate(source)]
    path = Path(source)
    if not path.is_file():
        raise ArgumentError("problems", "the path of a JSON-lines file", str(path))
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            problems.append(parse_problem(line, f"{path.name}:{number}"))
    return problems


def unique_problems(source: ProblemSource) -> list[Problem]:
    """As `load_problems`, each once. Raises `ArgumentError` also if there is none."""
    problems = list({problem.id: problem for problem in load_problems(source)}.values())
    if not problems:
        raise ArgumentError("problems", "at least one problem", "none")
    return problems


def check_answers(problems: Iterable[Problem]) -> None:
    """Raise unless solutions can be compared with the gold answer of every problem.

    Raises:
        ArgumentError: A problem has no gold answer.
        MissingDependencyError: `math-verify` is needed to compare answers.
    """
    if "math" in [problem.gold.kind for problem in problems]:
        answers_equal("1", "1", "math")


def parse_problem(line: str, where: str) -> Problem:
    """The problem of a JSON line; `where` is what errors call it.

    Raises:
        ArgumentError: As for `load_problems`.
    """
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ArgumentError(where, "a JSON object", str(error)) from error
    return _parse(entry, where)


def _parse(entry: Problem | Mapping[str, Any], where: str) -> Problem:
    if isinstance(entry, Problem):
        return entry
    if not isinstance(entry, Mapping):
        raise ArgumentError(where, "an object with question and answer", type(entry).__name__)
    if "problem" not in entry or "question" in entry:
        return Problem(_text(entry, "question", where), _text(entry, "answer", where))
    question = _text(entry, "problem", where)
    if "solution" not in entry:
        return Problem(question, _text(entry, "answer", where))
    problem = Problem(question, _text(entry, "solution", where))
    if "answer" not in entry or problem.has_solution:  # the final answer is in the solution
        return problem
    final = " ".join(_text(entry, "answer", where).split())
    return Problem(question, f"{problem.answer.rstrip()}\n#### {final}")


def _text(entry: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(entry.get(field), str) or not entry[field].strip():
        raise ArgumentError(f"{where}.{field}", "non-empty text", entry.get(field))
    return entry[field]
