"""`EvaluationReport`: figures of the arms, their differences, and what these say about the verifier."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llm2_fast.evaluation.arms import PLAIN, Arm
from llm2_fast.evaluation.record import Record, SampleRecord
from llm2_fast.evaluation.statistics import (
    CONFIDENCE,
    bootstrap_means,
    interval,
    majority,
    mcnemar,
    mean_over_groups,
    pass_at_k,
    sample_counts,
)

ACCURACY = "pass@1"

FailureKind = Literal["harmful", "no_guidance", "costly"]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmReport:
    """Figures of one arm over all problems.

    Attributes:
        name, baseline: As of the arm.
        settings: `Arm.settings`.
        metrics: "pass@k", for k > 1 "maj@k", and for reranked plain samples "best@k".
        tokens: Generated.
        seconds: Wall clock of decoding.
        rerank_seconds: Wall clock of scoring plain samples.
        ambiguous_share, intervention_share, cut_share: Of the steps.
        mean_candidates: Per step; 0 without a verifier.
        errors: Samples that ended with an error; they are wrong and do not vote.
        unfinished: Samples that reached `max_new_tokens`.
        unanswered: Samples that ended without an error and state no answer.
        margins: Ambiguous steps by the difference of the two best scores, with `trace`.
        failed_problems: Problems of which all samples ended with an error; they count as wrong.
        taken_over: Problems that an earlier evaluation decoded, which `seconds` tells the time of.
    """

    name: str
    baseline: str | None
    settings: Mapping[str, float | None]
    metrics: Mapping[str, Estimate]
    tokens: int
    seconds: float
    rerank_seconds: float
    ambiguous_share: float
    intervention_share: float
    cut_share: float
    mean_candidates: float
    errors: int
    unfinished: int
    unanswered: int
    margins: Mapping[str, int]
    failed_problems: int = 0  # these two are not in older files
    taken_over: int = 0

    @property
    def seconds_per_token(self) -> float:
        """Of decoding."""
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Comparison:
    """A metric of one arm less one of another, problem by problem.

    Attributes:
        arm, metric: The first.
        other, other_metric: The second.
        difference: Of the means, with its paired bootstrap interval.
        wins, losses: Problems in which the first is larger, or smaller.
        p_value: McNemar's exact test, where each problem has one sample; else None.
    """

    arm: str
    metric: str
    other: str
    other_metric: str
    difference: Estimate
    wins: int
    losses: int
    p_value: float | None

    @property
    def significance(self) -> int:
        """1 if the first is significantly better, -1 if worse, else 0.

        The interval is on one side of 0 and, if there is a p-value, it is at most 1 - `CONFIDENCE`.
        """
        if self.p_value is not None and self.p_value > 1 - CONFIDENCE:
            return 0
        return int(self.difference.low > 0) - int(self.difference.high < 0)


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


@dataclass(frozen=True)
class EvaluationReport:
    """What came out of an evaluation.

    Attributes:
        num_problems: In every arm.
        num_samples: Per problem.
        arms: In the order in which they were decoded.
        comparisons: Of each steered arm with its baseline, with plain decoding and with reranking.
        failures: What `find_failures` found; None if it was not asked.
    """

    num_problems: int
    num_samples: int
    arms: Sequence[ArmReport]
    comparisons: Sequence[Comparison]
    failures: Sequence[Failure] | None = None

    @property
    def steered_arms(self) -> list[ArmReport]:
        """Those in which the verifier takes part: beta > 0."""
        return [arm for arm in self.arms if arm.settings and arm.settings["beta"] > 0]

    def arm(self, name: str) -> ArmReport:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def comparison(self, arm: str, other: str, metric: str = ACCURACY, other_metric: str | None = None) -> Comparison:
        """The comparison of two arms; `other_metric` is `metric` if None."""
        wanted = (arm, metric, other, other_metric or metric)
        return next(c for c in self.comparisons if (c.arm, c.metric, c.other, c.other_metric) == wanted)

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`; without `failures` if these are None."""
        entry = dataclasses.asdict(self)
        if self.failures is None:
            del entry["failures"]
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> EvaluationReport:
        """What `to_json` made."""
        arms = [
            ArmReport(**{**arm, "metrics": {name: Estimate(**e) for name, e in arm["metrics"].items()}})
            for arm in entry["arms"]
        ]
        comparisons = [Comparison(**{**c, "difference": Estimate(**c["difference"])}) for c in entry["comparisons"]]
        failures = entry.get("failures")  # older files have none
        if failures is not None:
            failures = [Failure(**failure) for failure in failures]
        return cls(entry["num_problems"], entry["num_samples"], arms, comparisons, failures)


def summarize(arms: Sequence[Arm], records: Mapping[str, Sequence[Record]], seed: int) -> EvaluationReport:
    """The report of finished arms.

    Args:
        arms: Plain decoding among them.
        records: By `Arm.key` one per problem, the problems in one order.
        seed: Of the bootstrap.
    """
    outcomes = {(arm.name, metric): values for arm in arms for metric, values in _outcomes(records[arm.key]).items()}
    columns = {key: index for index, key in enumerate(outcomes)}
    values = np.array(list(outcomes.values())).T
    means = bootstrap_means(values, seed)
    estimates = {key: Estimate(float(values[:, i].mean()), *interval(means[:, i])) for key, i in columns.items()}
    n = len(records[PLAIN][0].samples)
    comparisons = []
    for first, second in _pairs(arms, columns, n):
        i, j = columns[first], columns[second]
        bounds = interval(means[:, i] - means[:, j])
        paired = values[:, i] - values[:, j]
        wins, losses = int((paired > 0).sum()), int((paired < 0).sum())
        p_value = mcnemar(wins, losses) if n == 1 else None
        comparisons.append(Comparison(*first, *second, Estimate(float(paired.mean()), *bounds), wins, losses, p_value))
    return EvaluationReport(
        num_problems=len(records[PLAIN]),
        num_samples=n,
        arms=[
            _arm_report(arm, records[arm.key], {m: e for (name, m), e in estimates.items() if name == arm.name})
            for arm in arms
        ],
        comparisons=comparisons,
    )


def _outcomes(records: Sequence[Record]) -> dict[str, list[float]]:
    """By metric, the value of each problem."""
    values: dict[str, list[float]] = {}
    scored = any(sample.score is not None for record in records for sample in record.samples)
    for record in records:
        for metric, value in _metrics(record.samples, scored).items():
            values.setdefault(metric, []).append(value)
    return values


def _metrics(samples: Sequence[SampleRecord], scored: bool) -> dict[str, float]:
    n = len(samples)
    right = sum(sample.right for sample in samples)

    def by_vote(group: range) -> bool:
        chosen = majority([samples[i].vote for i in group])
        return chosen is not None and samples[group[chosen]].right

    def by_score(group: range) -> bool:
        usable = [i for i in group if samples[i].score is not None]
        return bool(usable) and samples[max(usable, key=lambda i: samples[i].score)].right

    values = {f"pass@{k}": pass_at_k(n, right, k) for k in sample_counts(n)}
    values |= {f"maj@{k}": mean_over_groups(n, k, by_vote) for k in sample_counts(n) if k > 1}
    values |= {f"best@{k}": mean_over_groups(n, k, by_score) for k in sample_counts(n) if k > 1 and scored}
    return values


def _pairs(
    arms: Sequence[Arm], columns: Mapping[tuple[str, str], int], n: int
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """What is compared: (arm, metric) twice."""
    majority_metric, best = f"maj@{n}", (PLAIN, f"best@{n}")
    pairs = []
    for arm in arms:
        if not arm.steered:
            continue
        for metric in (ACCURACY, majority_metric) if n > 1 else (ACCURACY,):
            others = dict.fromkeys([arm.baseline, PLAIN])
            pairs += [((arm.name, metric), (other, metric)) for other in others]
        if arm.config.beta > 0 and best in columns:
            pairs.append(((arm.name, majority_metric), best))
    return pairs


def _arm_report(arm: Arm, records: Sequence[Record], metrics: Mapping[str, Estimate]) -> ArmReport:
    samples = [sample for record in records for sample in record.samples]
    steps = max(1, sum(record.steps for record in records))
    margins: Counter[str] = Counter()
    for record in records:
        margins.update(record.margins)
    return ArmReport(
        name=arm.name,
        baseline=arm.baseline,
        settings=arm.settings,
        metrics=metrics,
        tokens=sum(sample.num_tokens for sample in samples),
        seconds=sum(record.seconds for record in records),
        rerank_seconds=sum(record.rerank_seconds for record in records),
        ambiguous_share=sum(record.ambiguous_steps for record in records) / steps,
        intervention_share=sum(record.interventions for record in records) / steps,
        cut_share=sum(record.cut_steps for record in records) / steps,
        mean_candidates=sum(record.num_candidates for record in records) / steps,
        errors=sum(sample.finish_reason == "error" for sample in samples),
        unfinished=sum(sample.finish_reason == "length" for sample in samples),
        unanswered=sum(sample.answer is None and sample.finish_reason != "error" for sample in samples),
        margins=dict(sorted(margins.items(), key=lambda entry: float(entry[0]))),
        failed_problems=sum(all(s.finish_reason == "error" for s in record.samples) for record in records),
        taken_over=sum(record.taken_over for record in records),
    )
