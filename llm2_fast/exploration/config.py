"""`ExplorationConfig`: every option of an exploration, validated on construction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_type_hints

from llm2_fast.config import GenerationConfig, check_number, check_option_names, literal_values
from llm2_fast.errors import ArgumentError
from llm2_fast.problems import Problem

Quality = Callable[[Problem, str], float]


@dataclass(frozen=True)
class ExplorationConfig:
    """Options of token quality exploration (LLM2, section 2.3). Immutable; `merge` makes a changed copy.

    Candidates:

    Attributes:
        alpha: Plausibility constraint in (0, 1], as in decoding.
        top_k: Candidates per position at most, the solution's own token not counted; not with `bypass`.
        max_positions: Positions per solution at most, drawn among those that have a candidate; all if None.

    Their quality:

    Attributes:
        n: Continuations sampled from each candidate.
        temperature: Of the continuations; > 0.
        max_new_tokens: Tokens of a continuation at most.
        quality: What a continuation is worth. "answer": 1 if its final answer is right, else 0. "likelihood": mean
            log-probability per token of the gold answer in place of the continuation's own. Or a function that gives a
            number for a problem and the text of a whole solution. Results are told apart by its module and name only.
        bypass: Sample nothing; every plausible token but the solution's own is a negative.

    Pairs:

    Attributes:
        threshold: A candidate whose mean quality is below it is a negative.
        thresholds: More thresholds that verdicts must be exact for; see `SupervisionExample.with_threshold`.
        positive: "ground_truth", the solution's own token, or "best", the token of the highest quality, that one
            included.
        negatives_per_position: Negatives kept per position at most; all if None.
        strategy: Distribution from which they are drawn, without replacement: "uniform", "base" (System 1's
            probability) or "quality" (1 - Q).

    Solutions and random numbers:

    Attributes:
        solutions: "reference", those of the problems; "model", the first right one of the model's own samples; "auto",
            the reference where there is more to it than the final answer.
        attempts: Samples at most until one of the model's own is right.
        seed: Of everything that is drawn, 64 bits.

    Raises:
        ArgumentError: A value is outside its range; the message names it.
    """

    alpha: float = 0.1
    top_k: int = 5
    max_positions: int | None = None
    n: int = 20
    temperature: float = 1.0
    max_new_tokens: int = 256
    quality: Literal["answer", "likelihood"] | Quality = "answer"
    bypass: bool = False
    threshold: float = 0.5
    thresholds: tuple[float, ...] = ()
    positive: Literal["ground_truth", "best"] = "ground_truth"
    negatives_per_position: int | None = None
    strategy: Literal["uniform", "base", "quality"] = "uniform"
    solutions: Literal["auto", "reference", "model"] = "auto"
    attempts: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, minimum=0, maximum=1, exclusive_minimum=True)
        for name in ("top_k", "n", "attempts"):
            check_number(name, getattr(self, name), integer=True, minimum=1)
        for name in ("max_positions", "negatives_per_position"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), integer=True, minimum=1)
        check_number("temperature", self.temperature, minimum=0, exclusive_minimum=True)
        self.sampling(self.seed)  # checks the rest of what the two have in common
        if not isinstance(self.bypass, bool):
            raise ArgumentError("bypass", "True or False", self.bypass)
        check_number("threshold", self.threshold)
        if not isinstance(self.thresholds, (tuple, list)):
            raise ArgumentError("thresholds", "a sequence of numbers", self.thresholds)
        for threshold in self.thresholds:
            check_number("thresholds", threshold)
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        hints = get_type_hints(type(self))
        for name in ("quality", "positive", "strategy", "solutions"):
            value, choices = getattr(self, name), literal_values(hints[name])
            if value not in choices and not (name == "quality" and callable(value)):
                raise ArgumentError(name, f"one of {', '.join(map(repr, choices))}", repr(value))
        highest = max(self.threshold, *self.thresholds, -math.inf)
        if self.quality == "likelihood" and not self.bypass and highest > 0:
            expected = "thresholds of at most 0, since quality='likelihood' is a log-probability"
            raise ArgumentError("threshold", expected, highest)
        if self.bypass and (self.positive == "best" or self.strategy == "quality"):
            expected = 'positive="ground_truth" and a strategy without quality, since nothing is measured'
            raise ArgumentError("bypass", expected, f"positive={self.positive!r}, strategy={self.strategy!r}")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(field.name for field in fields(cls))

    def merge(self, **overrides: Any) -> ExplorationConfig:
        """A copy with `overrides` in place. Raises `ArgumentError` for an unknown name."""
        check_option_names(overrides, self.option_names(), what="option")
        return replace(self, **overrides)

    def sampling(self, seed: int) -> GenerationConfig:
        """How continuations are sampled: from System 1 as it is."""
        return GenerationConfig(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed)

    @property
    def log_alpha(self) -> float:
        """ln(alpha)."""
        return math.log(self.alpha)

    @property
    def exact(self) -> bool:
        """Every continuation is needed: something is ranked by quality, not only compared with thresholds."""
        drawn = self.negatives_per_position is not None and self.strategy == "quality"
        return self.quality != "answer" or self.positive == "best" or drawn

    @property
    def needs_answers(self) -> bool:
        """Something is compared with a problem's gold answer."""
        return self.solutions != "reference" or (not self.bypass and not callable(self.quality))

    def to_json(self) -> dict[str, Any]:
        """What makes the results, for a manifest."""
        options = {**asdict(self), "thresholds": list(self.thresholds)}
        if callable(self.quality):
            named = self.quality if hasattr(self.quality, "__qualname__") else type(self.quality)
            options["quality"] = f"{named.__module__}.{named.__qualname__}"
        return options
