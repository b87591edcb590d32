"""`Arm`: one way of decoding that is compared with others on the same problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from llm2_fast.config import GenerationConfig, check_option_names
from llm2_fast.errors import ArgumentError

STEERING = ("alpha", "beta", "candidate_top_k", "max_candidates")  # options that only matter with a verifier
SWEPT = STEERING[:3]
PLAIN, VERIFIED, TRUNCATED = "plain", "verified", "truncated"


@dataclass(frozen=True)
class Arm:
    """One way of decoding.

    Attributes:
        name: For people: "plain", "verified", "truncated", with the options in which it differs from the evaluation's.
        config: Options it decodes with.
        baseline: Name of the arm that a gain is claimed against; None for plain decoding.
    """

    name: str
    config: GenerationConfig
    baseline: str | None

    @property
    def steered(self) -> bool:
        """It runs on the engine with the verifier."""
        return self.baseline is not None

    @property
    def settings(self) -> dict[str, float | None]:
        """What tells it from other steered arms; empty for plain decoding."""
        return {name: getattr(self.config, name) for name in STEERING} if self.steered else {}

    @property
    def key(self) -> str:
        """What tells it from every other arm of an evaluation, whatever else is swept: part of its records' ids."""
        return " ".join(f"{name}={_canonical(value)}" for name, value in self.settings.items()) or PLAIN


def make_arms(config: GenerationConfig, sweep: Mapping[str, Iterable[Any]], *, verified: bool) -> list[Arm]:
    """The arms of an evaluation.

    Plain decoding; with a verifier the options of `config` and every combination of those in `sweep`; and where tokens
    are sampled, for each of these its own truncation, beta = 0: it draws from the same candidates, so a gain over it is
    System 2's.

    Args:
        config: The evaluation's options.
        sweep: Values by option, one of `SWEPT`.
        verified: There is a verifier.

    Raises:
        ArgumentError: An option cannot be swept, or a value is out of range.
    """
    check_option_names(sweep, SWEPT, what="sweep")
    sweep = {name: _values(name, values) for name, values in sweep.items()}
    if not verified:
        if sweep:
            raise ArgumentError("sweep", "nothing, since the engine has no verifier", ", ".join(sweep))
        return [Arm(PLAIN, config, None)]
    if config.beta == 0:
        raise ArgumentError("beta", "> 0, since the arm with 0 is a baseline", config.beta)
    points = [config, *(config.merge(**dict(zip(sweep, values, strict=True))) for values in product(*sweep.values()))]
    sampled = config.temperature > 0
    truncations = [point.merge(beta=0.0) for point in points if sampled]
    arms = [Arm(PLAIN, config, None)]
    for point in dict.fromkeys(truncations):
        arms.append(Arm(_name(TRUNCATED, point, config.merge(beta=0.0)), point, PLAIN))
    by_config = {arm.config: arm.name for arm in arms[1:]}
    for point in dict.fromkeys(points):
        if point not in by_config:  # beta = 0 where tokens are sampled is there already
            arms.append(Arm(_name(VERIFIED, point, config), point, by_config.get(point.merge(beta=0.0), PLAIN)))
    return arms


def _canonical(value: float | None) -> float | None:
    """1 and 1.0 are one value."""
    return value if value is None or value % 1 else int(value)


def _values(name: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (values := list(values)):
        raise ArgumentError(f"sweep[{name!r}]", "at least one value", repr(values))
    return values


def _name(kind: str, config: GenerationConfig, base: GenerationConfig) -> str:
    """The kind, and the options that are not those of `base`."""
    options = ((name, getattr(config, name)) for name in STEERING if getattr(config, name) != getattr(base, name))
    return ", ".join([kind, *(f"{name} {value}" for name, value in options)])
