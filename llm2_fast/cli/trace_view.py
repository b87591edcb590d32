"""Traces for people: the text with System 2's own choices marked, and the candidates it had."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from llm2_fast.cli.display import Display, Segment
from llm2_fast.detokenizer import Detokenizer
from llm2_fast.results import TraceStep

_MAX_CANDIDATES = 6
_CHOICE_WIDTH = 30
LEGEND = (
    Segment("Below an answer: each step where System 2 stepped in, with the token that "),
    Segment("System 1", "system1"),
    Segment(" would have chosen and the one that "),
    Segment("System 2", "system2"),
    Segment(" chose; then the candidates with System 1's probability and the verifier's score."),
)


def marked_text(trace: Iterable[TraceStep], tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    """The text of a sample in segments; those that hold an intervention are "changed"."""
    detokenizer, changed = Detokenizer(tokenizer), False
    for step in trace:
        changed |= step.intervention
        if text := detokenizer.push(step.token_id):
            yield Segment(text, "changed" if changed else "text")
            changed = False
    if rest := detokenizer.finish():
        yield Segment(rest, "changed" if changed else "text")


def show_steps(
    display: Display, trace: list[TraceStep], tokenizer: PreTrainedTokenizerBase | None, *, interventions_only: bool
) -> None:
    """A row per step: its number, System 1's choice, System 2's if it differs, and the candidates.

    Each candidate comes with the probability that System 1 gives it and the verifier's score.

    Args:
        display: Gets the rows.
        trace: All steps of a sample, with a verifier.
        tokenizer: Names the tokens; without one their ids are shown.
        interventions_only: Leave out ambiguous steps in which both agree.
    """
    number_width = len(f"#{len(trace)}")
    for number, step in enumerate(trace, 1):
        if step.scores is None or (interventions_only and not step.intervention):
            continue
        choice = [Segment(_token(step.system1_token_id, tokenizer), "system1")]
        if step.intervention:
            choice += [Segment(" → ", "quiet"), Segment(_token(step.token_id, tokenizer), "system2")]
        used = sum(len(segment.text) for segment in choice)
        head = [Segment(f"  {f'#{number}':>{number_width}}  ", "quiet"), *choice]
        indent = 4 + number_width + _CHOICE_WIDTH
        lines = _pack(list(_candidates(step, tokenizer)), display.width - indent)
        if used + 2 > _CHOICE_WIDTH:  # too long to stand beside the candidates
            display.line(*head)
            head = [Segment(" " * indent)]
        else:
            head.append(Segment(" " * (_CHOICE_WIDTH - used)))
        for line in lines:
            display.line(*head, *line)
            head = [Segment(" " * indent)]


def _candidates(step: TraceStep, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Segment]:
    """One segment per candidate: the first ones in System 1's order, and the chosen one wherever it is."""
    left_out = 0
    for rank, (token, logprob, score) in enumerate(zip(step.candidate_ids, step.logprobs, step.scores, strict=True)):
        if rank >= _MAX_CANDIDATES and token not in (step.token_id, step.system1_token_id):
            left_out += 1
            continue
        style = "system2" if token == step.token_id else "system1" if token == step.system1_token_id else "quiet"
        yield Segment(f"{_token(token, tokenizer)} {math.exp(logprob):.0%} {score:+.2f}", style)
    if left_out:
        yield Segment(f"… {left_out} more", "quiet")


def _pack(entries: list[Segment], width: int) -> list[list[Segment]]:
    """The entries on as few lines as hold them, in columns of one width."""
    column = max(len(entry.text) for entry in entries) + 3
    per_line = max(1, (width + 3) // column)
    lines = [entries[start : start + per_line] for start in range(0, len(entries), per_line)]
    return [[*(Segment(e.text.ljust(column), e.style) for e in line[:-1]), line[-1]] for line in lines]


def _token(token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A token in quotes, with spaces and line ends to be seen."""
    if tokenizer is None:
        return str(token_id)
    return json.dumps(tokenizer.decode([token_id]), ensure_ascii=False)
