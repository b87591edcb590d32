"""`Example`: a solution with the token pairs a verifier learns from, out of supervision or reference solutions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from llm2_fast.cache.slots import SlotCache
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import FINAL_LAYER, LanguageModel, Rows
from llm2_fast.ops import select_candidates
from llm2_fast.problems import Problem, load_problems
from llm2_fast.prompts import encode_prompt
from llm2_fast.supervision import (
    Supervision,
    SupervisionExample,
    TokenPair,
    check_positions,
    read_supervision,
    tokenize_messages,
)

Data = Supervision | list[Problem]
Source = str | os.PathLike[str] | Supervision | Iterable[SupervisionExample | Problem | Mapping[str, Any]]


@dataclass(frozen=True)
class Solution:
    """A tokenized solution, and what is known of its negatives.

    Attributes:
        input_ids: Prompt and solution.
        start: Position at which the solution begins.
        pairs: Token pairs; None where every plausible token besides the ground truth is a negative.
    """

    input_ids: list[int]
    start: int
    pairs: list[TokenPair] | None


@dataclass(frozen=True)
class System1View:
    """What the LLM alone makes of token pairs.

    Attributes:
        plausible: bool [num_pairs], the positive was plausible, so decoding chooses between the two.
        margin: float32 [num_pairs], logit of the positive minus logit of the negative.
    """

    plausible: torch.Tensor
    margin: torch.Tensor

    @classmethod
    def concatenate(cls, views: Sequence[System1View]) -> System1View:
        """Of all pairs of at least one view."""
        return cls(torch.cat([view.plausible for view in views]), torch.cat([view.margin for view in views]))


@dataclass(frozen=True)
class Example:
    """A solution and pairs of tokens at its positions, each a positive with a negative.

    A pass over an example has a row for every token of the solution, its *chain*, and behind them *branches*, which see
    the chain before their position and themselves: the negatives, then those positives that the solution does not
    contain.

    Attributes:
        input_ids: Prompt and solution, up to the last position compared.
        positive_position: int64 [num_positives].
        positive_ids: int64 [num_positives].
        positive: int64 [num_pairs], index of each pair's positive.
        negative_ids: int64 [num_pairs].
        system1: Of the pairs; None if the LLM was not asked.
    """

    input_ids: list[int]
    positive_position: torch.Tensor
    positive_ids: torch.Tensor
    positive: torch.Tensor
    negative_ids: torch.Tensor
    system1: System1View | None = None

    @classmethod
    def from_pairs(
        cls, input_ids: list[int], pairs: Sequence[TokenPair], system1: System1View | None = None
    ) -> Example:
        """An example of at least one pair."""
        position, positive_id, negative_id = torch.tensor(pairs).T
        positives, index = torch.stack([position, positive_id], dim=1).unique(dim=0, return_inverse=True)
        return cls(input_ids[: int(position.max()) + 1], *positives.T, index, negative_id, system1)

    def __len__(self) -> int:
        return len(self.negative_ids)

    @property
    def branch_ids(self) -> torch.Tensor:
        """int64 [num_branches], tokens of the branches."""
        return torch.cat([self.negative_ids, self.positive_ids[~self._in_chain]])

    @property
    def branch_positions(self) -> torch.Tensor:
        """int64 [num_branches]."""
        return torch.cat([self.positive_position[self.positive], self.positive_position[~self._in_chain]])

    @property
    def positive_rows(self) -> torch.Tensor:
        """int64 [num_positives], row of each positive."""
        in_chain = self._in_chain
        behind = len(self.input_ids) + len(self) - 1 + (~in_chain).cumsum(dim=0)
        return torch.where(in_chain, self.positive_position, behind)

    @property
    def negative_rows(self) -> torch.Tensor:
        """int64 [num_pairs], row of each negative."""
        return torch.arange(len(self)) + len(self.input_ids)

    def where(self, mask: torch.Tensor) -> Example | None:
        """The example with the pairs for which `mask`, bool [num_pairs], is true; None if there are none."""
        pairs = torch.stack(
            [self.positive_position[self.positive], self.positive_ids[self.positive], self.negative_ids]
        )
        kept = [TokenPair(*pair) for pair in pairs.T[mask].tolist()]
        system1 = self.system1 and System1View(self.system1.plausible[mask], self.system1.margin[mask])
        return Example.from_pairs(self.input_ids, kept, system1) if kept else None

    @property
    def _in_chain(self) -> torch.Tensor:
        return torch.tensor(self.input_ids)[self.positive_position] == self.positive_ids


class Reading(NamedTuple):
    """What is left of the LLM's pass over a solution: its example, and the pass itself."""

    example: Example
    cache: SlotCache
    slot: int
    hidden_states: list[torch.Tensor]  # [len(solution), hidden_size] of each layer asked for


def load_source(source: Source, name: str) -> Data:
    """Supervision or problems, from a file or directory, or from entries in memory.

    Args:
        source: A path, `Supervision`, or entries of one sort: supervision examples or problems, or mappings with the
            keys of either's JSON lines.
        name: What errors call it.

    Raises:
        ArgumentError: It is of no known layout, or holds nothing.
    """
    if isinstance(source, (str, os.PathLike)):
        source = read_supervision(source) if _is_supervision(Path(source), name) else load_problems(source)
    elif not isinstance(source, Supervision):
        entries = list(source)
        if any(isinstance(entry, SupervisionExample) or "messages" in _keys(entry) for entry in entries):
            parsed = [_as_supervision(entry, f"{name}[{i}]") for i, entry in enumerate(entries)]
            source = Supervision(parsed, manifest=None)
        else:
            source = load_problems(entries)
    if not (source.examples if isinstance(source, Supervision) else source):
        raise ArgumentError(name, "at least one example", "none")
    return source


def tokenize_source(
    source: Data, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_length: int, name: str
) -> list[Solution]:
    """The solutions of a source, cut to `max_length` tokens; those with nothing to compare are left out.

    Raises:
        ArgumentError: A pair does not belong to its solution, or has an id outside the vocabulary.
    """
    if isinstance(source, Supervision):
        own_tokens = source.manifest is None or source.manifest.options.get("positive") != "best"
        solutions = [
            _tokenize_pairs(entry, tokenizer, vocab_size, max_length, own_tokens, f"{name}[{i}]")
            for i, entry in enumerate(source.examples)
        ]
    else:
        solutions = [tokenize_problem(problem, tokenizer, vocab_size, max_length) for problem in source]
    return [solution for solution in solutions if len(solution.input_ids) > solution.start and solution.pairs != []]


def tokenize_problem(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_length: int
) -> Solution:
    """The question through the chat template, and the solution with the end-of-sequence token, cut to `max_length`."""
    prompt = encode_prompt([{"role": "user", "content": problem.question}], tokenizer, vocab_size, "question")
    solution = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        solution = [*solution, tokenizer.eos_token_id]
    return Solution([*prompt, *solution][:max_length], len(prompt), None)


def read_solution(
    lm: LanguageModel, solution: Solution, alpha: float, max_candidates: int, layers: tuple[int, ...] = ()
) -> Reading | None:
    """Run the LLM over a solution, and find or judge its pairs.

    Args:
        lm: The LLM.
        solution: At least one token long.
        alpha, max_candidates: Of the plausible set (`select_candidates`).
        layers: Hidden states to keep.

    Returns:
        `Reading`, its example with System 1's view; None if there is no pair.
    """
    cache = SlotCache()
    slot = cache.allocate()
    final, *kept = (h[0] for h in lm.forward(cache, [Rows(slot, solution.input_ids)], (FINAL_LAYER, *layers)))
    input_ids = torch.tensor(solution.input_ids)
    if solution.pairs is None:
        position = torch.arange(solution.start, len(input_ids))
    else:
        position = torch.tensor(solution.pairs)[:, 0].unique()
    logits = lm.logits(final[(position - 1).to(final.device)])
    options = {
        "log_alpha": torch.full((len(position),), alpha, device=logits.device).log(),
        "candidate_top_k": torch.zeros(len(position), dtype=torch.int32, device=logits.device),
    }
    candidates = select_candidates(logits, **options, max_candidates=max_candidates).ids.cpu().long()
    if solution.pairs is None:
        truth = input_ids[position]
        index, column = ((candidates >= 0) & (candidates != truth[:, None])).nonzero(as_tuple=True)
        pairs = torch.stack([position[index], truth[index], candidates[index, column]], dim=1)
    else:
        pairs = torch.tensor(solution.pairs)
        index = torch.searchsorted(position, pairs[:, 0].contiguous())
    if len(pairs) == 0:
        return None
    plausible = (candidates[index] == pairs[:, 1:2]).any(dim=1)
    row, positive_ids, negative_ids = (x.to(logits.device) for x in (index, pairs[:, 1], pairs[:, 2]))
    view = System1View(plausible, (logits[row, positive_ids] - logits[row, negative_ids]).cpu())
    return Reading(Example.from_pairs(solution.input_ids, pairs.tolist(), view), cache, slot, kept)


def plausible_pairs(examples: Iterable[Example]) -> list[Example]:
    """The pairs whose positive was plausible."""
    kept = (example.where(example.system1.plausible) for example in examples)
    return [example for example in kept if example is not None]


def _tokenize_pairs(
    entry: SupervisionExample,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    max_length: int,
    own_tokens: bool,
    where: str,
) -> Solution:
    if not entry.samples:
        return Solution([], 0, [])
    input_ids = tokenize_messages(entry.messages, tokenizer)
    check_positions(entry, input_ids, where, own_tokens=own_tokens)
    for index, (_, *token_ids) in enumerate(entry.samples):
        if max(token_ids) >= vocab_size or len(set(token_ids)) < 2:
            expected = f"two different tokens in [0, {vocab_size})"
            raise ArgumentError(f"{where}.samples[{index}]", expected, token_ids)
    return Solution(input_ids[:max_length], 0, [pair for pair in entry.samples if pair.position < max_length])


def _is_supervision(path: Path, name: str) -> bool:
    """Whether a path holds supervision and not problems, judged by its first line."""
    if path.is_dir():
        return True
    if not path.is_file():
        raise ArgumentError(name, "a JSON-lines file, or a directory that exploration wrote", str(path))
    try:
        with path.open(encoding="utf-8") as file:
            return "messages" in _keys(json.loads(next((line for line in file if line.strip()), "{}")))
    except UnicodeDecodeError as error:
        raise ArgumentError(name, "JSON lines in UTF-8", f"{path}: {error}") from error
    except json.JSONDecodeError:
        return False  # `load_problems` names the line


def _keys(entry: object) -> Iterable[str]:
    return entry.keys() if isinstance(entry, Mapping) else ()


def _as_supervision(entry: object, where: str) -> SupervisionExample:
    return entry if isinstance(entry, SupervisionExample) else SupervisionExample.from_json(json.dumps(entry), where)
