"""`find_failures`: the ways in which a verifier fails to help, as the figures of an evaluation show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llm2_fast.evaluation.arms import PLAIN
from llm2_fast.evaluation.report import ACCURACY, ArmReport, Comparison, EvaluationReport

# Docs state these; what is significant is said in `Comparison.significance` and `statistics.CONFIDENCE`.
MIN_PROBLEMS = 30  # fewer say nothing
MINIMAL_GAIN = 0.01  # of a metric
COSTLY = 1.5  # time per token, as a multiple of plain decoding's
FEW_AMBIGUOUS = 0.05  # share of the steps; below it there is hardly anything to choose from

FailureKind = Literal["harmful", "no_guidance", "costly"]


@dataclass(frozen=True)
class Failure:
    """A sign that a verifier does not help.

    Attributes:
        kind: "harmful": worse than plain decoding. "no_guidance": no better than the baseline. "costly": not clearly
            better, and much slower than plain decoding.
        arm: Name of the arm that shows it.
        message: For people.
    """

    kind: FailureKind
    arm: str
    message: str


def find_failures(report: EvaluationReport) -> list[Failure]:
    """What is wrong with the arms that System 2 steers; nothing is said about fewer than `MIN_PROBLEMS` problems."""
    if report.num_problems < MIN_PROBLEMS:
        return []
    steered = [arm for arm in report.arms if arm.settings and arm.settings["beta"] > 0]
    return [failure for arm in steered for failure in _failures(report, arm)]


def _failures(report: EvaluationReport, arm: ArmReport) -> Iterator[Failure]:
    metrics = [ACCURACY] if report.num_samples == 1 else [ACCURACY, f"maj@{report.num_samples}"]
    against_plain = [report.comparison(arm.name, PLAIN, metric) for metric in metrics]
    gains = [report.comparison(arm.name, arm.baseline, metric) for metric in metrics]
    harmful = [comparison for comparison in against_plain if comparison.significance < 0]
    if harmful:
        yield Failure("harmful", arm.name, f"{arm.name} is worse than plain decoding: {_describe(harmful[0])}")
    if any(comparison.significance > 0 for comparison in gains):
        return
    if not harmful and all(comparison.difference.mean < MINIMAL_GAIN for comparison in gains):
        message = f"{arm.name} gives no useful guidance, hardly a gain over {arm.baseline}: {_describe(gains[0])}"
        yield Failure("no_guidance", arm.name, message)
    plain = report.arm(PLAIN).seconds_per_token
    if plain and (ratio := arm.seconds_per_token / plain) >= COSTLY:
        cause = "the verifier is too slow"
        if arm.ambiguous_share < FEW_AMBIGUOUS:
            cause = f"candidates are filtered too hard, {arm.ambiguous_share:.1%} of the steps are ambiguous"
        message = f"{arm.name} takes {ratio:.1f} times the time of plain decoding per token for no clear gain: {cause}"
        yield Failure("costly", arm.name, message)


def _describe(comparison: Comparison) -> str:
    difference = comparison.difference
    bounds = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"{comparison.metric} {100 * difference.mean:+.1f} points {bounds}"
