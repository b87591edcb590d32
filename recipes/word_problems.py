"""Generated word problems of several kinds with worked solutions, one step of arithmetic per line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Cem", "Dora", "Eve", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "dolls", "eggs", "figs", "games", "hats", "keys", "maps", "pens", "shells")
GAINS = ("finds", "buys", "makes", "wins", "gets")
LOSSES = ("loses", "sells", "breaks", "drops", "uses")
MAX_VALUE = 9  # numbers are one digit, so one token
_FACTORS = [(a, b) for a in range(2, 5) for b in range(1, 5) if a * b <= MAX_VALUE]
# What a trade means to the one who is named first: +1 receives, -1 parts with.
TRADES = {
    "gives {} to": -1,
    "takes {} from": 1,
    "hands {} to": -1,
    "borrows {} from": 1,
}


@dataclass
class Solution:
    """A running total and the steps that led to it.

    Attributes:
        value: So far.
        steps: Equations.
    """

    value: int
    steps: list[str]

    def add(self, operator: str, operand: int) -> None:
        """One more step."""
        results = {"+": self.value + operand, "-": self.value - operand, "*": self.value * operand}
        result = results[operator] if operator in results else self.value // operand
        self.steps.append(f"{self.value}{operator}{operand}={result}")
        self.value = result

    def change(self, draw: random.Random, sign: int) -> int:
        """One more step up or down that leaves the total at one digit; returns how far, 0 for not at all."""
        room = MAX_VALUE - self.value if sign > 0 else self.value
        if room < 1:
            return 0
        amount = draw.randint(1, room)
        self.add("+" if sign > 0 else "-", amount)
        return amount


Made = tuple[list[str], Solution]


def expression(draw: random.Random) -> Made:
    """Sums and differences without a story."""
    solution = Solution(draw.randint(1, MAX_VALUE), [])
    text = str(solution.value)
    for _ in range(draw.randint(1, 4)):
        sign = draw.choice((1, -1))
        if amount := solution.change(draw, sign):
            text += f"{'+' if sign > 0 else '-'}{amount}"
    return [f"What is {text}?"], solution


def diary(draw: random.Random) -> Made:
    """What happens to one person's things."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    solution = Solution(draw.randint(1, MAX_VALUE), [])
    sentences = [f"{name} has {solution.value} {things}."]
    for _ in range(draw.randint(1, 4)):
        sign = draw.choice((1, -1))
        if amount := solution.change(draw, sign):
            sentences.append(f"{name} {draw.choice(GAINS if sign > 0 else LOSSES)} {amount}.")
    return [*sentences, f"How many {things} has {name}?"], solution


def comparison(draw: random.Random) -> Made:
    """A chain of people with more or fewer than the one before."""
    names, things = draw.sample(NAMES, draw.randint(2, 4)), draw.choice(THINGS)
    solution = Solution(draw.randint(1, MAX_VALUE), [])
    sentences = [f"{names[0]} has {solution.value} {things}."]
    asked = names[0]
    for before, name in zip(names, names[1:], strict=False):
        sign = draw.choice((1, -1))
        if not (amount := solution.change(draw, sign)):
            break
        sentences.append(f"{name} has {amount} {'more' if sign > 0 else 'fewer'} than {before}.")
        asked = name
    return [*sentences, f"How many {things} has {asked}?"], solution


def boxes(draw: random.Random) -> Made:
    """Equal groups, then gains and losses."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    count, each = draw.choice(_FACTORS)
    solution = Solution(count, [])
    solution.add("*", each)
    sentences = [f"{name} has {count} boxes with {each} {things} each."]
    for _ in range(draw.randint(0, 2)):
        sign = draw.choice((1, -1))
        if amount := solution.change(draw, sign):
            sentences.append(f"{name} {draw.choice(GAINS if sign > 0 else LOSSES)} {amount}.")
    return [*sentences, f"How many {things} has {name}?"], solution


def sharing(draw: random.Random) -> Made:
    """Division, then gains and losses."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    count, each = draw.choice(_FACTORS)
    solution = Solution(count * each, [])
    sentences = [f"{count} people share {solution.value} {things}.", f"{name} is one of them."]
    solution.add("/", count)
    for _ in range(draw.randint(0, 2)):
        sign = draw.choice((1, -1))
        if amount := solution.change(draw, sign):
            sentences.append(f"{name} {draw.choice(GAINS if sign > 0 else LOSSES)} {amount}.")
    return [*sentences, f"How many {things} has {name}?"], solution


def neighbours(draw: random.Random) -> Made:
    """Two diaries in one; only one of them is asked about."""
    names, things = draw.sample(NAMES, 2), draw.choice(THINGS)
    totals = {name: Solution(draw.randint(1, MAX_VALUE), []) for name in names}
    sentences = [f"{name} has {totals[name].value} {things}." for name in names]
    for _ in range(draw.randint(2, 4)):
        name, sign = draw.choice(names), draw.choice((1, -1))
        if amount := totals[name].change(draw, sign):
            sentences.append(f"{name} {draw.choice(GAINS if sign > 0 else LOSSES)} {amount}.")
    asked = draw.choice(names)
    return [*sentences, f"How many {things} has {asked}?"], totals[asked]


def market(draw: random.Random, operations: int = 3) -> Made:
    """Trades among three people, one of whom is asked about; some do not concern that one. The target kind."""
    names = draw.sample(NAMES, 3)
    totals = {name: Solution(draw.randint(2, MAX_VALUE - 2), []) for name in names}
    asked = draw.choice(names)
    sentences = [f"{name} has {totals[name].value}." for name in names]
    while len(totals[asked].steps) < operations:
        first, second = draw.sample(names, 2)
        verb, sign = draw.choice(list(TRADES.items()))
        amount = draw.randint(1, 5)
        after = totals[first].value + sign * amount, totals[second].value - sign * amount
        if not all(0 <= value <= MAX_VALUE for value in after):
            continue
        totals[first].add("+" if sign > 0 else "-", amount)
        totals[second].add("-" if sign > 0 else "+", amount)
        sentences.append(f"{first} {verb.format(amount)} {second}.")
        if len(sentences) > 2 * operations + 2:
            return market(draw, operations)
    return [*sentences, f"How many has {asked}?"], totals[asked]


TARGET = "market"
KINDS: dict[str, Callable[[random.Random], Made]] = {
    kind.__name__: kind for kind in (expression, diary, comparison, boxes, sharing, neighbours, market)
}


def generate(kind: str, seed: str) -> Iterator[dict[str, str]]:
    """Endless problems of one kind, in the format of GSM8K, each question once."""
    draw, seen = random.Random(seed), set()
    while True:
        sentences, solution = KINDS[kind](draw)
        question = " ".join(sentences)
        if question not in seen and solution.steps:
            seen.add(question)
            yield {"question": question, "answer": "\n".join([*solution.steps, f"#### {solution.value}"])}
