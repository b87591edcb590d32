"""`ProblemExplorer`: token quality exploration of one problem (LLM2, section 2.3)."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Generator

from transformers import PreTrainedTokenizerBase

from llm2_fast.answers import GoldAnswer, find_answer
from llm2_fast.config import GenerationConfig
from llm2_fast.exploration.candidates import Position, draw_positions, find_positions
from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.pairs import Measured, Pairs
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.exploration.rollouts import Branch
from llm2_fast.exploration.skip import Skip
from llm2_fast.exploration.tally import Tally
from llm2_fast.exploration.teacher import Teacher
from llm2_fast.problems import Problem
from llm2_fast.prompts import encode_prompt
from llm2_fast.sequence import Sequence
from llm2_fast.supervision import SupervisionExample, TokenQuality, tokenize_messages

_STATEMENT = "\nThe answer is "  # before the gold answer, where a continuation states none
_LOGPROB_DIGITS = 4  # behind the point, in what is written

Exploration = Generator[list[Branch], None, SupervisionExample]
Judge = Callable[[list[int], bool], float]


class ProblemExplorer:
    """Makes tasks for a `RolloutPool`, one per problem.

    Args:
        teacher: Runs given tokens.
        tokenizer: With a chat template.
        vocab_size: Bound on token ids.
        eos_token_ids: Tokens that end a solution.
        max_length: Bound on prompt and solution together; None for no bound.
        config: Options.
        report: Counts.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_length: int | None,
        config: ExplorationConfig,
        report: ExplorationReport,
    ) -> None:
        self._teacher, self._tokenizer, self._config, self._report = teacher, tokenizer, config, report
        self._vocab_size, self._eos_token_ids, self._max_length = vocab_size, eos_token_ids, max_length

    def explore(self, problem: Problem) -> Exploration:
        """Yield branches to be decided, return the example."""
        messages = [{"role": "user", "content": problem.question}]
        try:
            own = self._config.solutions == "model"
            own = own or (self._config.solutions == "auto" and not problem.has_solution)
            solution = (yield from self._own_solution(problem, messages)) if own else problem.solution
            messages = [*messages, {"role": "assistant", "content": solution}]
            pairs = yield from self._explore_solution(problem, messages)
        except Skip as skip:
            self._report.problems += 1
            self._report.skipped[str(skip)] += 1
            return SupervisionExample(messages, [], id=problem.id, skipped=str(skip))
        self._report.problems += 1
        self._report.pairs += len(pairs.samples)
        return SupervisionExample(messages, **vars(pairs), id=problem.id)

    def _own_solution(self, problem: Problem, messages: list[dict[str, str]]) -> Generator[list[Branch], None, str]:
        """The first of the model's own samples that ends in the right answer."""
        prompt, gold, attempts = self._prompt(messages), problem.gold, self._config.attempts

        def judge(generated: list[int], complete: bool) -> float:
            return float(complete and gold.is_right(self._text(generated)))

        with self._teacher.prefilled(prompt) as parent:
            tally = Tally(attempts, thresholds=(1 / attempts,))  # decided by the first that is right
            branch = Branch(parent, prompt, self._sampling(problem), tally, judge)
            yield from _decide([branch])
        if tally.total == 0:
            raise Skip("none of the model's own samples is right")
        return self._text(branch.continuations[tally.done - 1]).strip()

    def _explore_solution(
        self, problem: Problem, messages: list[dict[str, str]]
    ) -> Generator[list[Branch], None, Pairs]:
        prompt, token_ids = self._prompt(messages[:-1]), tokenize_messages(messages, self._tokenizer)
        if token_ids[: len(prompt)] != prompt:
            raise Skip("the chat template does not put the solution behind the prompt")
        start, seed = len(prompt), f"{self._config.seed}:{problem.id}"
        token_ids = token_ids[: _end_of_solution(token_ids, start, self._eos_token_ids)]
        self._check_length(token_ids)
        with self._teacher.prefilled(token_ids) as sequence:
            positions = find_positions(self._teacher, sequence, start, self._config)
            positions = draw_positions(positions, self._config.max_positions, seed)
            measured = yield from self._measure(problem, sequence, start, positions)
        self._report.positions += len(token_ids) - start
        self._report.explored_positions += len(positions)
        pairs = Pairs()
        for position in positions:
            pairs.add(position.index, position.ground_truth_id, measured[position.index], self._config, seed)
        return pairs

    def _measure(
        self, problem: Problem, sequence: Sequence, start: int, positions: list[Position]
    ) -> Generator[list[Branch], None, dict[int, Measured]]:
        """Qualities of the tokens that compete at each position."""
        tokens = [(position, *token) for position in positions for token in _measured_tokens(position, self._config)]
        tallies: list[Tally | None] = [None] * len(tokens)
        if not self._config.bypass:
            judge, sampling = self._judge(problem, sequence.prompt_token_ids[:start]), self._sampling(problem)
            branches = [
                self._branch(sequence, start, position.index, token, sampling, judge) for position, token, _ in tokens
            ]
            yield from _decide(branches)
            tallies = [branch.tally for branch in branches]
        self._report.candidates += len(tokens)
        measured: dict[int, Measured] = {position.index: {} for position in positions}
        for (position, token, logprob), tally in zip(tokens, tallies, strict=True):
            measured[position.index][token] = self._quality(tally, position.plausible, logprob)
        return measured

    def _branch(
        self, parent: Sequence, start: int, index: int, token: int, sampling: GenerationConfig, judge: Judge
    ) -> Branch:
        token_ids = [*parent.prompt_token_ids[:index], token]
        thresholds = None if self._config.exact else (self._config.threshold, *self._config.thresholds)
        return Branch(
            parent,
            token_ids,
            sampling,
            Tally(self._config.n, thresholds),
            lambda generated, complete: judge([*token_ids[start:], *generated], complete),
            ended=token in self._eos_token_ids,
        )

    def _quality(self, tally: Tally | None, plausible: bool, logprob: float) -> TokenQuality:
        if tally is None:
            return TokenQuality(None, None, 0, 0, plausible, round(logprob, _LOGPROB_DIGITS))
        self._report.spared_rollouts += tally.n - tally.done
        if not math.isfinite(tally.total):
            raise Skip("a quality is not finite")
        right = round(tally.total) if self._config.quality == "answer" else None
        quality = tally.total / tally.done
        return TokenQuality(quality, right, tally.done, tally.n, plausible, round(logprob, _LOGPROB_DIGITS))

    def _judge(self, problem: Problem, prompt: list[int]) -> Judge:
        """What a solution, given as tokens, is worth."""
        quality = self._config.quality
        if callable(quality):
            return lambda solution, complete: float(quality(problem, self._text(solution)))
        gold = problem.gold
        if quality == "answer":
            return lambda solution, complete: float(gold.is_right(self._text(solution), complete=complete))
        # Continuations of a sure model are often the same.
        likelihood = functools.cache(lambda before: self._answer_likelihood(prompt, before, gold))
        return lambda solution, complete: likelihood(_up_to_answer(self._text(solution)))

    def _answer_likelihood(self, prompt: list[int], before: str, gold: GoldAnswer) -> float:
        """Mean log-probability per token of the gold answer behind the text `before`."""
        context, whole = self._tokenize(before), self._tokenize(before + gold.text)
        common = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
        answer = whole[common:]
        context = [*prompt, *whole[:common]]
        if self._max_length is not None:
            context = context[: self._max_length - len(answer)]
        return self._teacher.mean_logprob([*context, *answer], len(context))

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        prompt = encode_prompt(messages, self._tokenizer, self._vocab_size, "messages")
        self._check_length(prompt)
        return prompt

    def _check_length(self, token_ids: list[int]) -> None:
        if self._max_length is not None and len(token_ids) > self._max_length:
            raise Skip("longer than the model's context")

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _sampling(self, problem: Problem) -> GenerationConfig:
        """A key for the random numbers of each problem, so that it may be explored anywhere and at any time."""
        digest = hashlib.sha256(f"{self._config.seed}:{problem.id}".encode()).digest()
        return self._config.sampling(int.from_bytes(digest[:8], "big"))


def _up_to_answer(solution: str) -> str:
    """The text in front of the answer that a solution states, or behind which one would have to follow."""
    span = find_answer(solution)
    return solution[: span.start] if span is not None and span.marked else solution.rstrip() + _STATEMENT


def _decide(branches: list[Branch]) -> Generator[list[Branch], None, None]:
    """Wait until every branch is decided."""
    yield branches
    for branch in branches:
        if branch.error is not None:
            raise Skip(branch.error)


def _measured_tokens(position: Position, config: ExplorationConfig) -> list[tuple[int, float]]:
    """Ids and log-probabilities of the tokens whose quality is asked for, most probable first."""
    own = (position.ground_truth_id, position.ground_truth_logprob)
    tokens = list(position.candidates)
    if config.positive == "best" and math.isfinite(own[1]):
        tokens.append(own)
    return sorted(tokens, key=lambda token: (-token[1], token[0]))


def _end_of_solution(token_ids: list[int], start: int, eos_token_ids: tuple[int, ...]) -> int:
    """Behind the token that ends the solution: what a chat template adds after it is not the model's to choose."""
    ends = (index + 1 for index in range(start, len(token_ids)) if token_ids[index] in eos_token_ids)
    return next(ends, len(token_ids))
