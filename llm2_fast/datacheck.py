"""Checks of problems and supervision: what would spoil training or an evaluation without an error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from llm2_fast.errors import ArgumentError, MissingDependencyError
from llm2_fast.problems import Problem, parse_problem
from llm2_fast.prompts import chat_template_hash, encode_prompt
from llm2_fast.supervision import (
    Manifest,
    SupervisionExample,
    check_positions,
    manifest_path,
    supervision_files,
    tokenize_messages,
)

Kind = Literal["layout", "gold answer", "position", "template", "duplicate", "contamination"]
Entry = Problem | SupervisionExample

_OVERLAP = 13  # words in a row that no two independent questions share
_LONG_ANSWER = 60  # characters; a whole field that is longer was hardly meant as a final answer
_PLACEHOLDERS = ("n/a", "na", "nan", "none", "null", "tbd", "todo")  # `math-verify` reads letters as a product


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        kind: What sort of thing.
        where: File and line.
        detail: What is wrong there.
    """

    kind: Kind
    where: str
    detail: str


@dataclass
class DataCheck:
    """Reads files of problems or supervision, and collects what is wrong with them.

    Args:
        tokenizer: Of the model that the supervision is for. Without one, positions are not checked.

    Attributes:
        findings: So far.
        num_entries: Problems and examples read.
        num_unread_answers: Gold answers that are expressions, so that only `math-verify` can read them, where it is not
            installed.
    """

    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        self.findings: list[Finding] = []
        self.num_entries = 0
        self.num_unread_answers = 0

    def check(self, paths: Iterable[str | os.PathLike[str]], test_paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Check files (or directories of supervision) for training, and that nothing of the test files is in them.

        Raises:
            ArgumentError: A path is not there.
        """
        train = [entry for path in paths for entry in self._read(Path(path))]
        test = [entry for path in test_paths for entry in self._read(Path(path))]
        for part in (train, test):
            self._find_duplicates(part)
        self._find_contamination(train, test)

    def _add(self, kind: Kind, where: str, detail: str) -> None:
        self.findings.append(Finding(kind, where, detail))

    def _read(self, path: Path) -> Iterator[tuple[str, Entry]]:
        """The entries of a path that can be read, each with its file and line."""
        own_tokens = self._read_options(manifest_path(path)).get("positive") != "best"
        for file in supervision_files(path):
            for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
                if line.strip():
                    where = f"{file}:{number}"
                    try:
                        entry = _parse(line, where)
                    except ArgumentError as error:
                        self._add("layout", where, _without(where, error))
                        continue
                    self.num_entries += 1
                    if isinstance(entry, Problem):
                        self._check_gold(where, entry)
                    else:
                        self._check_example(where, entry, own_tokens)
                    yield where, entry

    def _read_options(self, path: Path) -> dict[str, Any]:
        """Options that supervision was made with, as far as they are known."""
        if not path.is_file():
            return {}
        try:
            manifest = Manifest.read(path)
        except ArgumentError as error:
            self._add("layout", str(path), str(error))
            return {}
        if self.tokenizer is not None and manifest.chat_template_hash != chat_template_hash(self.tokenizer):
            self._add("template", str(path), "made with another chat template")
        return manifest.options

    def _check_gold(self, where: str, problem: Problem) -> None:
        try:
            gold = problem.gold
        except ArgumentError as error:
            self._add("gold answer", where, str(error))
            return
        if not problem.has_solution and len(gold.text) > _LONG_ANSWER:
            self._add(
                "gold answer", where, f"no final answer is marked, so it is the whole field: {gold.text[:40]!r} …"
            )
            return
        if gold.text.casefold() in _PLACEHOLDERS:
            self._add("gold answer", where, f"stands for no answer: {gold.text!r}")
            return
        try:
            if not gold.is_readable:
                self._add("gold answer", where, f"math-verify cannot read it: {gold.text!r}")
        except MissingDependencyError:
            self.num_unread_answers += 1

    def _check_example(self, where: str, example: SupervisionExample, own_tokens: bool) -> None:
        for pair in example.samples:
            if pair.negative_id == pair.ground_truth_id:
                self._add("position", where, f"the negative is the ground truth: {list(pair)}")
                break
        if self.tokenizer is None or example.skipped is not None:
            return
        try:
            input_ids = tokenize_messages(example.messages, self.tokenizer)
            prompt = encode_prompt(example.messages[:-1], self.tokenizer, len(self.tokenizer), "messages")
        except ArgumentError as error:
            self._add("template", where, str(error))
            return
        if input_ids[: len(prompt)] != prompt:
            self._add("template", where, "the chat template does not put the solution behind the prompt")
        try:
            check_positions(example, input_ids, where, own_tokens=own_tokens)
        except ArgumentError as error:
            self._add("position", where, _without(where, error))
            return
        inside = [list(pair) for pair in example.samples if pair.position < len(prompt)]
        beyond = [list(pair) for pair in example.samples if pair.negative_id >= len(self.tokenizer)]
        if inside:
            self._add("position", where, f"inside the prompt of {len(prompt)} tokens: {inside[0]}")
        if beyond:
            self._add("position", where, f"a negative that the tokenizer does not know: {beyond[0]}")

    def _find_duplicates(self, entries: list[tuple[str, Entry]]) -> None:
        first: dict[tuple[str, ...], str] = {}
        for where, entry in entries:
            # Several solutions of one question are no duplicates.
            texts = [entry.question] if isinstance(entry, Problem) else [m["content"] for m in entry.messages]
            key = (type(entry).__name__, *map(_normalized, texts))
            if key in first:
                self._add("duplicate", where, f"the same as {first[key]}")
            first.setdefault(key, where)

    def _find_contamination(self, train: list[tuple[str, Entry]], test: list[tuple[str, Entry]]) -> None:
        """Training questions that are test questions, or share many words in a row with one."""
        whole = {_normalized(_question(entry)): where for where, entry in test}
        parts = {part: where for where, entry in test for part in _word_runs(_question(entry))}
        for where, entry in train:
            question = _question(entry)
            if (found := whole.get(_normalized(question))) is not None:
                self._add("contamination", where, f"the test question {found}")
            elif shared := next((part for part in _word_runs(question) if part in parts), None):
                self._add("contamination", where, f"{_OVERLAP} words in a row of {parts[shared]}: {shared!r}")


def _parse(line: str, where: str) -> Entry:
    try:
        is_supervision = "messages" in json.loads(line)
    except (json.JSONDecodeError, TypeError):
        is_supervision = False
    return SupervisionExample.from_json(line, where) if is_supervision else parse_problem(line, where)


def _without(where: str, error: ArgumentError) -> str:
    """The error's text without the place."""
    return str(error).removeprefix(where).lstrip(".: ")


def _question(entry: Entry) -> str:
    if isinstance(entry, Problem):
        return entry.question
    return "\n".join(message["content"] for message in entry.messages if message["role"] == "user")


def _normalized(text: str) -> str:
    """Words without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _word_runs(text: str) -> Iterator[str]:
    words = _normalized(text).split()
    return (" ".join(words[i : i + _OVERLAP]) for i in range(len(words) - _OVERLAP + 1))
