"""`to_markdown`: an evaluation's report as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from llm2_fast.evaluation.arms import PLAIN
from llm2_fast.evaluation.findings import MIN_PROBLEMS, find_failures, has_gain
from llm2_fast.evaluation.report import Estimate, EvaluationReport
from llm2_fast.evaluation.statistics import CONFIDENCE


def to_markdown(report: EvaluationReport) -> str:
    """Accuracy and cost of every arm, the differences, and what they say. Ends with a line end."""
    problems = f"{report.num_problems} problems, {report.num_samples} sample{'s' * (report.num_samples > 1)} each"
    parts = [
        f"{problems}. Percent; in brackets {CONFIDENCE:.0%} bootstrap intervals over problems.",
        "\n".join(_accuracy_table(report)),
        "\n".join(_cost_table(report)),
    ]
    if notes := [*error_notes(report), *_taken_over_notes(report)]:
        parts.append("\n".join(f"- {note}" for note in notes))
    if report.comparisons:
        parts.append("\n".join(_comparison_table(report)))
        parts.append("\n".join(f"- {verdict}" for verdict in verdicts(report)))
    return "\n\n".join(parts) + "\n"


def _accuracy_table(report: EvaluationReport) -> Iterator[str]:
    metrics = list(dict.fromkeys(metric for arm in report.arms for metric in arm.metrics))
    rows = ([arm.name, *(percent(arm.metrics[m]) if m in arm.metrics else "" for m in metrics)] for arm in report.arms)
    return _table(["arm", *metrics], rows)


def _cost_table(report: EvaluationReport) -> Iterator[str]:
    plain = report.arm(PLAIN).seconds_per_token
    rows = []
    for arm in report.arms:
        per_second = f"{1 / arm.seconds_per_token:.1f}" if arm.seconds_per_token else ""
        ratio = f"{arm.seconds_per_token / plain:.2f}" if plain else ""
        shares = ["", "", "", ""]
        if arm.baseline is not None:
            shares = [f"{arm.ambiguous_share:.1%}", f"{arm.intervention_share:.1%}", f"{arm.cut_share:.1%}"]
            shares.append(f"{arm.mean_candidates:.2f}")
        rerank = f"{arm.rerank_seconds:.1f}" if arm.rerank_seconds else ""
        counts = [str(count) for count in (arm.unfinished, arm.unanswered, arm.errors)]
        rows.append([arm.name, *shares, str(arm.tokens), f"{arm.seconds:.1f}", per_second, ratio, rerank, *counts])
    head = ["arm", "ambiguous", "interventions", "cut", "candidates", "tokens", "seconds", "tokens/s", "time/token"]
    return _table([*head, "reranking s", "unfinished", "unanswered", "errors"], rows)


def _comparison_table(report: EvaluationReport) -> Iterator[str]:
    rows = []
    for c in report.comparisons:
        other = c.other if c.metric == c.other_metric else f"{c.other} ({c.other_metric})"
        p_value = "" if c.p_value is None else f"{c.p_value:.3g}"
        verdict = "" if report.num_problems < MIN_PROBLEMS else {1: "better", -1: "worse", 0: ""}[c.significance]
        rows.append([c.arm, c.metric, other, percent(c.difference, "+"), f"{c.wins}:{c.losses}", p_value, verdict])
    return _table(["arm", "metric", "against", "difference", "wins:losses", "McNemar p", "significant"], rows)


def error_notes(report: EvaluationReport) -> Iterator[str]:
    """How many samples of each arm ended with an error, where there are any."""
    for arm in report.arms:
        if arm.errors:
            total = report.num_problems * report.num_samples
            note = f"{arm.name}: {arm.errors} of {total} samples ended with an error: they count as wrong, not as votes"
            failed = f"; all samples of {arm.failed_problems} problem{'s' * (arm.failed_problems > 1)}"
            yield note + failed * (arm.failed_problems > 0)


def _taken_over_notes(report: EvaluationReport) -> Iterator[str]:
    for arm in report.arms:
        if arm.taken_over:
            yield f"{arm.name}: taken over from an earlier evaluation, with its times, for {arm.taken_over} problems"


def verdicts(report: EvaluationReport) -> Iterator[str]:
    """What the figures say about the verifier: a sentence per sign of failure, or that there is none."""
    if report.num_problems < MIN_PROBLEMS:
        yield f"Fewer than {MIN_PROBLEMS} problems: too few for a verdict."
        return
    failures = find_failures(report)
    yield from (f"{failure.kind}: {failure.message}" for failure in failures)
    if not failures and has_gain(report):
        yield "No sign of a failing verifier."
    elif not failures:
        yield "No sign of a failing verifier, and no significant gain either: more problems are needed."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def percent(estimate: Estimate, sign: str = "") -> str:
    """A mean and its interval in percent; `sign` is "+" for differences."""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"
