"""`write_report`: the results of an experiment as Markdown tables and a plot."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from llm2_fast.evaluation.arms import PLAIN, TRUNCATED
from llm2_fast.evaluation.markdown import error_notes, percent, verdicts
from llm2_fast.evaluation.plots import check_matplotlib
from llm2_fast.evaluation.report import ACCURACY, ArmReport, EvaluationReport
from recipes.experiment import PAPER_BETA
from recipes.stages import Stages


def write_report(stages: Stages, kinds: Iterable[str]) -> str:
    """Write `report.md` and `accuracy_by_beta.svg` into the directory of the stages.

    Args:
        stages: Of a finished `Experiment`.
        kinds: Of its verifiers.

    Returns:
        The Markdown.

    Raises:
        MissingDependencyError: `matplotlib` is not installed.
    """
    kinds, result = list(kinds), stages.result
    greedy, sampled = (evaluation(stages, f"{name}, {kinds[0]}") for name in ("greedy", "sampled"))
    sections = [
        _surroundings(result("explore")),
        table(
            ("verifier", "pairs", "held-out pairs", "it ranks right", "System 1 does", "both do, beta 0.25"),
            ((kind, *_pairwise(result(f"train {kind}"))) for kind in kinds),
        ),
        f"Greedy decoding of {greedy.num_problems} test problems; percent, gains in points.",
        table(
            ("System 1", "System 2", "beta", "right", "gain over plain", "McNemar p", "ambiguous steps", "changed"),
            _greedy_rows(stages, kinds),
        ),
        f"{sampled.num_problems} test problems, {sampled.num_samples} samples each, temperature 1.",
        table(
            ("System 2", "beta", "pass@1", "maj@n", "maj@n over plain", "maj@n over beta 0", "best@n of plain"),
            _sampled_rows(stages, kinds),
        ),
        "\n".join(_verdicts(stages, kinds)),
        table(("stage", "seconds"), ((name, f"{seconds:.0f}") for name, seconds in stages.seconds.items())),
    ]
    text = "\n\n".join(sections) + "\n"
    (stages.directory / "report.md").write_text(text, encoding="utf-8")
    plot_betas(stages, kinds, stages.directory / "accuracy_by_beta.svg")
    return text


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; short rows get empty cells."""
    header = list(header)
    rows = [[*row, *[""] * (len(header) - len(row))] for row in map(list, rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *rows])


def evaluation(stages: Stages, name: str) -> EvaluationReport:
    """The result of a stage that evaluated."""
    return EvaluationReport.from_json(stages.result(name))


def steered_arms(report: EvaluationReport) -> list[ArmReport]:
    """The arms in which the verifier takes part, by beta."""
    return sorted(report.steered_arms, key=lambda arm: arm.settings["beta"])


def _surroundings(exploration: dict[str, Any]) -> str:
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    counts = (
        "{problems:,} solutions, {positions:,} positions, {explored_positions:,} with a candidate, {candidates:,} "
        "candidates, {rollouts:,} rollouts ({spared_rollouts:,} spared since the verdict was known), {pairs:,} pairs, "
        "{tokens_per_second:,.0f} tokens/s"
    )
    return f"{threads}; {versions}. Exploration: {counts.format(**exploration)}."


def _pairwise(trained: dict[str, Any]) -> tuple[str, ...]:
    shares = (f"{100 * trained[name]:.1f}" for name in ("verifier", "system1", "combined"))
    return f"{trained['training_pairs']:,}", f"{trained['num_pairs']:,}", *shares


def _greedy_rows(stages: Stages, kinds: list[str]) -> Iterator[tuple[str, ...]]:
    yield "as it is", "none", "-", percent(evaluation(stages, f"greedy, {kinds[0]}").arm(PLAIN).metrics[ACCURACY])
    for kind in kinds:
        yield from _gains("as it is", kind, evaluation(stages, f"greedy, {kind}"))
    if "greedy, control" in stages.seconds:
        control = evaluation(stages, "greedy, control")
        yield "fine-tuned", "none", "-", percent(control.arm(PLAIN).metrics[ACCURACY])
    if "greedy, full on control" in stages.seconds:
        yield from _gains("fine-tuned", "full", evaluation(stages, "greedy, full on control"))


def _gains(model: str, kind: str, report: EvaluationReport) -> Iterator[tuple[str, ...]]:
    for arm in steered_arms(report):
        comparison = report.comparison(arm.name, PLAIN)
        shares = (f"{100 * share:.1f} %" for share in (arm.ambiguous_share, arm.intervention_share))
        gain, p_value = percent(comparison.difference, "+"), f"{comparison.p_value:.1g}"
        yield model, kind, f"{arm.settings['beta']:g}", percent(arm.metrics[ACCURACY]), gain, p_value, *shares


def _sampled_rows(stages: Stages, kinds: list[str]) -> Iterator[tuple[str, ...]]:
    first = evaluation(stages, f"sampled, {kinds[0]}")
    majority = f"maj@{first.num_samples}"
    for name, beta in ((PLAIN, "-"), (TRUNCATED, "0")):
        metrics = first.arm(name).metrics
        yield "none", beta, percent(metrics[ACCURACY]), percent(metrics[majority])
    for kind in kinds:
        report = evaluation(stages, f"sampled, {kind}")
        best = percent(report.arm(PLAIN).metrics[f"best@{report.num_samples}"])
        for arm in steered_arms(report):
            gains = (
                percent(report.comparison(arm.name, other, majority).difference, "+") for other in (PLAIN, arm.baseline)
            )
            right = (percent(arm.metrics[metric]) for metric in (ACCURACY, majority))
            yield kind, f"{arm.settings['beta']:g}", *right, *gains, best


def _verdicts(stages: Stages, kinds: list[str]) -> Iterator[str]:
    """Of every evaluation on the test split: samples with errors, and whether the verifier shows signs of failing."""
    names = [f"{decoding}, {kind}" for decoding in ("greedy", "sampled") for kind in kinds]
    for name in [*names, "greedy, full on control"]:
        if name in stages.seconds:
            report = evaluation(stages, name)
            yield from (f"- {name}: {said}" for said in [*error_notes(report), *verdicts(report)])


def plot_betas(stages: Stages, kinds: Iterable[str], path: Path) -> None:
    """Accuracy on the validation split against beta, a line per kind of verifier."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind in kinds:
        report = evaluation(stages, f"betas, {kind}")
        arms = [report.arm(PLAIN), *steered_arms(report)]
        betas = [0.0, *(arm.settings["beta"] for arm in arms[1:])]
        estimates = [arm.metrics[ACCURACY] for arm in arms]
        axes.plot(betas, [100 * e.mean for e in estimates], marker="o", label=kind)
        axes.fill_between(betas, [100 * e.low for e in estimates], [100 * e.high for e in estimates], alpha=0.1)
    axes.axvline(PAPER_BETA, color="gray", linestyle=":", label="the paper's")
    axes.set(xlabel="beta", ylabel="right answers on the validation split, %")
    axes.legend()
    figure.savefig(path)
