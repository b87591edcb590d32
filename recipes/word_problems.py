"""Generated word problems of several kinds with worked solutions: per line, an event and what it does to a number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

NAMES = ("Ann", "Ben", "Cem", "Dora", "Eve", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "dolls", "eggs", "figs", "games", "hats", "keys", "maps", "pens", "shells")
VERBS = {1: ("finds", "buys", "makes", "wins", "gets"), -1: ("loses", "sells", "breaks", "drops", "uses")}
# What a trade means to the one who is named first: +1 receives, -1 parts with.
TRADES = {"gives {} to": -1, "takes {} from": 1, "hands {} to": -1, "borrows {} from": 1}
MAX_VALUE = 9  # numbers are one digit, so one token
_FACTORS = [(a, b) for a in range(2, 5) for b in range(1, 5) if a * b <= MAX_VALUE]


@dataclass
class Solution:
    """A running total and the lines that led to it.

    Attributes:
        value: So far.
        lines: Of the worked solution.
    """

    value: int
    lines: list[str] = field(default_factory=list)

    def compute(self, operator: str, operand: int, event: str = "") -> None:
        """One more line."""
        results = {"+": self.value + operand, "-": self.value - operand, "*": self.value * operand}
        result = results[operator] if operator in results else self.value // operand
        equation = f"{self.value}{operator}{operand}={result}"
        self.lines.append(f"{event}: {equation}" if event else equation)
        self.value = result

    def change(self, amount: int, event: str) -> None:
        """A line that adds an amount, which may be negative."""
        self.compute("+" if amount > 0 else "-", abs(amount), event)


@dataclass
class WordProblem:
    """What is asked, the sentences after it, and the way to the answer."""

    asked: str
    sentences: list[str]
    solution: Solution


def draw_change(draw: random.Random, value: int) -> int:
    """Up or down, not 0, such that one digit suffices."""
    return draw.choice([change for change in range(-value, MAX_VALUE - value + 1) if change])


def expression(draw: random.Random) -> WordProblem:
    """Sums and differences without a story."""
    solution = Solution(draw.randint(1, MAX_VALUE))
    text = str(solution.value)
    for _ in range(draw.randint(1, 4)):
        change = draw_change(draw, solution.value)
        text += f"{change:+d}"
        solution.change(change, "")
    return WordProblem(f"What is {text}?", [], solution)


def happen(draw: random.Random, name: str, solution: Solution) -> str:
    """Somebody's total changes; the event, for the question."""
    change = draw_change(draw, solution.value)
    event = f"{name} {draw.choice(VERBS[1 if change > 0 else -1])} {abs(change)}"
    solution.change(change, event)
    return f"{event}."


def diary(draw: random.Random) -> WordProblem:
    """What happens to one person's things."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    solution = Solution(draw.randint(1, MAX_VALUE))
    sentences = [f"{name} has {solution.value} {things}."]
    sentences += [happen(draw, name, solution) for _ in range(draw.randint(1, 4))]
    return WordProblem(f"How many {things} has {name}?", sentences, solution)


def neighbours(draw: random.Random) -> WordProblem:
    """Two diaries in one; only one of them is asked about."""
    names, things = draw.sample(NAMES, 2), draw.choice(THINGS)
    totals = {name: Solution(draw.randint(1, MAX_VALUE)) for name in names}
    sentences = [f"{name} has {totals[name].value} {things}." for name in names]
    for name in [*names, *draw.choices(names, k=draw.randint(0, 2))]:
        sentences.append(happen(draw, name, totals[name]))
    asked = draw.choice(names)
    return WordProblem(f"How many {things} has {asked}?", sentences, totals[asked])


def comparison(draw: random.Random) -> WordProblem:
    """A chain of people with more or fewer than the one before."""
    names, things = draw.sample(NAMES, draw.randint(2, 4)), draw.choice(THINGS)
    solution = Solution(draw.randint(1, MAX_VALUE))
    sentences = [f"{names[0]} has {solution.value} {things}."]
    for before, name in pairwise(names):
        change = draw_change(draw, solution.value)
        event = f"{name} has {abs(change)} {'more' if change > 0 else 'fewer'} than {before}"
        solution.change(change, event)
        sentences.append(f"{event}.")
    return WordProblem(f"How many {things} has {names[-1]}?", sentences, solution)


def boxes(draw: random.Random) -> WordProblem:
    """Equal groups, then gains and losses."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    count, each = draw.choice(_FACTORS)
    solution = Solution(count)
    solution.compute("*", each)
    sentences = [f"{name} has {count} boxes with {each} {things} each."]
    sentences += [happen(draw, name, solution) for _ in range(draw.randint(0, 2))]
    return WordProblem(f"How many {things} has {name}?", sentences, solution)


def sharing(draw: random.Random) -> WordProblem:
    """Division, then gains and losses."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    count, each = draw.choice(_FACTORS)
    solution = Solution(count * each)
    sentences = [f"{count} people share {solution.value} {things}.", f"{name} is one of them."]
    solution.compute("/", count)
    sentences += [happen(draw, name, solution) for _ in range(draw.randint(0, 2))]
    return WordProblem(f"How many {things} has {name}?", sentences, solution)


def market(draw: random.Random, operations: int = 3) -> WordProblem:
    """Trades among three people, one of whom is asked about; some trades do not concern that one. The target kind."""
    names = draw.sample(NAMES, 3)
    totals = {name: Solution(draw.randint(2, MAX_VALUE - 2)) for name in names}
    asked = names[0]
    sentences = [f"{name} has {totals[name].value}." for name in draw.sample(names, 3)]
    while len(totals[asked].lines) < operations:
        first, second = draw.sample(names, 2)
        verb, sign = draw.choice(list(TRADES.items()))
        amount = draw.randint(1, 5)
        after = totals[first].value + sign * amount, totals[second].value - sign * amount
        if not all(0 <= value <= MAX_VALUE for value in after):
            continue
        event = f"{first} {verb.format(amount)} {second}"
        totals[first].change(sign * amount, event)
        totals[second].change(-sign * amount, event)
        sentences.append(f"{event}.")
        if len(sentences) > 2 * operations + 2:
            return market(draw, operations)
    return WordProblem(f"How many has {asked}?", sentences, totals[asked])


TARGET = "market"
KINDS: dict[str, Callable[[random.Random], WordProblem]] = {
    kind.__name__: kind for kind in (expression, diary, neighbours, comparison, boxes, sharing, market)
}


def generate(kind: str, seed: str) -> Iterator[dict[str, str]]:
    """Endless problems of one kind, in the format of GSM8K, each question once."""
    return _generate(KINDS[kind], seed)


def generate_market(seed: str, operations: int) -> Iterator[dict[str, str]]:
    """Endless problems of the target kind with another number of operations."""
    return _generate(lambda draw: market(draw, operations), seed)


def _generate(make: Callable[[random.Random], WordProblem], seed: str) -> Iterator[dict[str, str]]:
    draw, seen = random.Random(seed), set()
    while True:
        problem = make(draw)
        question, solution = " ".join([problem.asked, *problem.sentences]), problem.solution
        if question not in seen and solution.lines:
            seen.add(question)
            yield {"question": question, "answer": "\n".join([*solution.lines, f"#### {solution.value}"])}
