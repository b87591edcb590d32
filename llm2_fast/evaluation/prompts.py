"""`make_prompt`: how a problem is put to a model, alone or behind worked examples."""

from __future__ import annotations

from collections.abc import Sequence

from llm2_fast.problems import Problem
from llm2_fast.prompts import Prompt

FEW_SHOT_STOP = "\n\nQuestion:"  # a model that goes on writes another problem


def make_prompt(problem: Problem, examples: Sequence[Problem]) -> Prompt:
    """The question as a chat; behind `examples` a text whose worked answers end in "So the answer is x."."""
    if not examples:
        return [{"role": "user", "content": problem.question}]
    worked = [f"{_ask(example)} {_answer(example)}" for example in examples]
    return "\n\n".join([*worked, _ask(problem)])


def _ask(problem: Problem) -> str:
    return f"Question: {problem.question.strip()}\nAnswer:"


def _answer(problem: Problem) -> str:
    return f"{problem.rationale} So the answer is {problem.gold.text}.".lstrip()
