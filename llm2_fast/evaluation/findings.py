"""`find_failures`: the ways in which a verifier fails to help, as the figures of an evaluation show them."""

from __future__ import annotations

from collections.abc import Iterator

from llm2_fast.evaluation.arms import PLAIN
from llm2_fast.evaluation.report import ACCURACY, ArmReport, Comparison, EvaluationReport, Failure

# Docs state these; what is significant is said in `Comparison.significance` and `statistics.CONFIDENCE`.
MIN_PROBLEMS = 30  # fewer say nothing
MINIMAL_GAIN = 0.01  # of a metric
COSTLY = 1.5  # time per token, as a multiple of plain decoding's
FEW_AMBIGUOUS = 0.05  # share of the steps; below it there is hardly anything to choose from


def find_failures(report: EvaluationReport) -> list[Failure]:
    """What is wrong with the arms that System 2 steers; nothing is said about fewer than `MIN_PROBLEMS` problems."""
    if report.num_problems < MIN_PROBLEMS:
        return []
    return [failure for arm in report.steered_arms for failure in _failures(report, arm)]


def has_gain(report: EvaluationReport) -> bool:
    """An arm that System 2 steers is significantly better than its own baseline."""
    return any(
        comparison.significance > 0
        for arm in report.steered_arms
        for comparison in _compared_with(report, arm, arm.baseline)
    )


def _compared_with(report: EvaluationReport, arm: ArmReport, other: str) -> list[Comparison]:
    """In each metric that a verdict looks at."""
    metrics = [ACCURACY] if report.num_samples == 1 else [ACCURACY, f"maj@{report.num_samples}"]
    return [report.comparison(arm.name, other, metric) for metric in metrics]


def _failures(report: EvaluationReport, arm: ArmReport) -> Iterator[Failure]:
    against_plain, gains = (_compared_with(report, arm, other) for other in (PLAIN, arm.baseline))
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
