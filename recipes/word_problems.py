"""Generated word problems of several kinds with worked solutions: per line, an event and what it does to a number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

NAMES = ("Ann", "Ben", "Cem", "Dora", "Eve", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "dolls", "eggs", "figs", "games", "hats", "keys", "maps", "pens", "shells")
VERBS = {1: ("finds", "buys", "makes", "wins", "gets"), -1: ("loses", "sells", "breaks", "drops", "uses")}
# The target kind's own words. A generalist can repeat them and has rarely seen what they do to a number.
_RISING = """
acquires adopts amasses assembles bakes brews builds captures carves catches collects compiles composes crafts creates
cultivates discovers draws earns fetches folds forges gains gathers grows harvests hatches imports inherits knits
mines mints molds obtains orders paints picks plants prints procures produces quarries raises receives recovers
repairs salvages saves scores secures sews shapes spots stitches stocks unearths weaves welds wraps yields
"""
_FALLING = """
abandons auctions banishes bins burns cancels cedes consumes contributes crushes deletes destroys devours discards
dismantles donates dumps eats empties exports forfeits forgets gambles grinds junks launches leaks leases lends
liquidates mails melts mislays misplaces offers pawns posts pours rejects releases relinquishes retires returns ruins
sacrifices scatters scraps sheds ships shreds sinks smashes spends spills spoils squanders surrenders tosses wastes
wrecks
"""
WORKSHOP_VERBS = {1: _RISING.split(), -1: _FALLING.split()}
_ORDINALS = ("first", "second", "third")
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


def happen(draw: random.Random, name: str, solution: Solution, verbs: Mapping[int, Sequence[str]] = VERBS) -> str:
    """Somebody's total changes; the event, for the question."""
    change = draw_change(draw, solution.value)
    event = f"{name} {draw.choice(verbs[1 if change > 0 else -1])} {abs(change)}"
    solution.change(change, event)
    return f"{event}."


def diary(draw: random.Random) -> WordProblem:
    """What happens to one person's things."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    solution = Solution(draw.randint(1, MAX_VALUE))
    sentences = [f"{name} has {solution.value} {things}."]
    sentences += [happen(draw, name, solution) for _ in range(draw.randint(1, 4))]
    return WordProblem(f"How many {things} has {name}?", sentences, solution)


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


def record(draw: random.Random) -> WordProblem:
    """Which of several events? In the words of the target kind, without what they do to a number."""
    name, verbs = draw.choice(NAMES), [*WORKSHOP_VERBS[1], *WORKSHOP_VERBS[-1]]
    amounts = [draw.randint(1, MAX_VALUE) for _ in _ORDINALS]
    events = [f"{name} {draw.choice(verbs)} {amount}" for amount in amounts]
    last = draw.randrange(len(events))
    solution = Solution(amounts[last], events[: last + 1])
    return WordProblem(f"How many in the {_ORDINALS[last]} event?", [f"{event}." for event in events], solution)


def workshop(draw: random.Random, operations: int = 3) -> WordProblem:
    """A diary in words of its own. The target kind."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    solution = Solution(draw.randint(1, MAX_VALUE))
    sentences = [f"{name} has {solution.value} {things}."]
    sentences += [happen(draw, name, solution, WORKSHOP_VERBS) for _ in range(operations)]
    return WordProblem(f"How many {things} has {name}?", sentences, solution)


TARGET = "workshop"
KINDS: dict[str, Callable[[random.Random], WordProblem]] = {
    kind.__name__: kind for kind in (expression, diary, comparison, boxes, sharing, record, workshop)
}


def generate(kind: str, seed: str) -> Iterator[dict[str, str]]:
    """Endless problems of one kind, in the format of GSM8K, each question once."""
    return _generate(KINDS[kind], seed)


def generate_workshop(seed: str, operations: int) -> Iterator[dict[str, str]]:
    """Endless problems of the target kind with another number of operations."""
    return _generate(lambda draw: workshop(draw, operations), seed)


def _generate(make: Callable[[random.Random], WordProblem], seed: str) -> Iterator[dict[str, str]]:
    draw, seen = random.Random(seed), set()
    while True:
        problem = make(draw)
        question, solution = " ".join([problem.asked, *problem.sentences]), problem.solution
        if question not in seen and solution.lines:
            seen.add(question)
            yield {"question": question, "answer": "\n".join([*solution.lines, f"#### {solution.value}"])}
