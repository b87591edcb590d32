"""`GenerationConfig`: every option of a generation, validated on construction."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from llm2_fast.errors import ArgumentError

_MAX_SEED = 2**64 - 1
_MAX_INT32 = 2**31 - 1
_MOST_CANDIDATES = 2**16  # memory of a step is proportional to it
_LARGE = 1e6
_MIN_TEMPERATURE = 1e-4


def check_number(
    name: str,
    value: Any,
    *,
    integer: bool = False,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    exclusive_minimum: bool = False,
) -> None:
    """Raise `ArgumentError` unless `value` is a finite number (an `int` if `integer`) within the bounds."""
    kind = int if integer else (int, float)
    lower = f"{'>' if exclusive_minimum else '>='} {minimum:g}" if minimum > -math.inf else ""
    upper = f"<= {maximum:g}" if maximum < math.inf else ""
    expected = " ".join(
        filter(None, ["an integer" if integer else "a number", " and ".join(filter(None, [lower, upper]))])
    )
    # Compared, not converted: an integer may be too large for a float.
    valid = isinstance(value, kind) and not isinstance(value, bool) and -math.inf < value < math.inf
    if not valid or value > maximum or value < minimum or (exclusive_minimum and value == minimum):
        raise ArgumentError(name, expected, repr(value))


def check_option_names(names: Any, allowed: Any, *, what: str) -> None:
    """Raise `ArgumentError` naming the first of `names` that is not `allowed`, with the closest match."""
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ArgumentError(what, f"one of {', '.join(sorted(allowed))}", f"{name!r}{hint}")


def literal_values(hint: Any) -> tuple[str, ...]:
    """The names that an option of this type, a `Literal` or a union with one, may have as its value."""
    parts = [hint] if get_origin(hint) is Literal else get_args(hint)
    return tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))


@dataclass(frozen=True)
class GenerationConfig:
    """Options of one generation. Immutable; `merge` makes a changed copy.

    System 2 (LLM2, arXiv 2412.20372, equations 1 to 3; ignored when there is no verifier):

    Attributes:
        alpha: Plausibility constraint in [0, 1]. A token is a candidate when its probability is at least `alpha`
            times that of the most probable token. 0 turns the constraint off and needs `candidate_top_k`.
        beta: Weight of the verifier's score in the adjusted logit, `z + beta * s`; at least 0.
        candidate_top_k: Keep at most this many candidates, largest logit first, ties to the lower token id.
        max_candidates: Bound on the candidates of one step. A step cut by it is counted in the statistics.

    Sampling (applied to the adjusted logits of the candidates, in this order; without a verifier to all logits):

    Attributes:
        repetition_penalty: Divides positive and multiplies negative logits of tokens already in the sequence; > 0.
        temperature: 0 picks the largest adjusted logit; otherwise, from 1e-4 on, logits are divided by it before
            sampling.
        top_k: Keep the `top_k` largest.
        top_p: Keep the smallest set of largest probabilities that sums to at least `top_p`; in (0, 1].
        min_p: Drop tokens less probable than `min_p` times the most probable; in [0, 1].
        n: Samples per prompt. They share the prompt's keys and values.
        seed: Key of the counter-based random numbers, 64 bits.

    Stopping and output:

    Attributes:
        max_new_tokens: Tokens to generate at most, per sample.
        stop: Strings that end a sample; the text is cut before the first one found.
        ignore_eos: Do not stop at end-of-sequence tokens.
        trace: Record candidates, scores and adjusted logits of every step.

    Raises:
        ArgumentError: A value is outside its range; the message names it.
    """

    alpha: float = 0.1
    beta: float = 0.25
    candidate_top_k: int | None = None
    max_candidates: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, minimum=0, maximum=1)
        check_number("beta", self.beta, minimum=0, maximum=_LARGE)
        check_number("max_candidates", self.max_candidates, integer=True, minimum=1, maximum=_MOST_CANDIDATES)
        if self.candidate_top_k is not None:
            check_number("candidate_top_k", self.candidate_top_k, integer=True, minimum=1)
            if self.candidate_top_k > self.max_candidates:
                expected = f"at most max_candidates = {self.max_candidates}"
                raise ArgumentError("candidate_top_k", expected, self.candidate_top_k)
        elif self.alpha == 0:
            expected = "> 0, or candidate_top_k set, since alpha = 0 makes every token a candidate"
            raise ArgumentError("alpha", expected, "alpha = 0 with candidate_top_k = None")
        check_number("temperature", self.temperature, minimum=0, maximum=_LARGE)
        if 0 < self.temperature < _MIN_TEMPERATURE:  # logits divided by less overflow float32
            raise ArgumentError("temperature", f"0 or at least {_MIN_TEMPERATURE:g}", self.temperature)
        if self.top_k is not None:
            check_number("top_k", self.top_k, integer=True, minimum=1, maximum=_MAX_INT32)
        check_number("top_p", self.top_p, minimum=0, maximum=1, exclusive_minimum=True)
        check_number("min_p", self.min_p, minimum=0, maximum=1)
        check_number("repetition_penalty", self.repetition_penalty, minimum=0, maximum=_LARGE, exclusive_minimum=True)
        check_number("n", self.n, integer=True, minimum=1)
        check_number("seed", self.seed, integer=True, minimum=0, maximum=_MAX_SEED)
        check_number("max_new_tokens", self.max_new_tokens, integer=True, minimum=1)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise ArgumentError("stop", "a non-empty string or a sequence of non-empty strings", self.stop)
        object.__setattr__(self, "stop", tuple(stop))
        for name in ("ignore_eos", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(name, "True or False", getattr(self, name))

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(field.name for field in fields(cls))

    def merge(self, **overrides: Any) -> GenerationConfig:
        """A copy with `overrides` in place. Raises `ArgumentError` for an unknown name."""
        check_option_names(overrides, self.option_names(), what="option")
        return replace(self, **overrides)

    @property
    def log_alpha(self) -> float:
        """ln(alpha), the distance below the largest logit within which a token is a candidate."""
        return math.log(self.alpha) if self.alpha > 0 else -math.inf

    @property
    def log_min_p(self) -> float:
        """ln(min_p), -inf when the filter is off."""
        return math.log(self.min_p) if self.min_p > 0 else -math.inf
