"""`write_report`: the results of an experiment as Markdown tables and a plot."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from llm2_fast.evaluation.arms import PLAIN, TRUNCATED
from llm2_fast.evaluation.plots import check_matplotlib
from llm2_fast.evaluation.report import ACCURACY
from recipes.experiment import PAPER_BETA
from recipes.stages import Stages

Report = dict[str, Any]  # of `EvaluationReport.to_json`


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
    sections = [
        _surroundings(result("explore")),
        table(
            ("verifier", "pairs", "held-out pairs", "it ranks right", "System 1 does", "both do, beta 0.25"),
            ((kind, *_pairwise(result(f"train {kind}"))) for kind in kinds),
        ),
        f"Greedy decoding of {result(f'greedy, {kinds[0]}')['num_problems']} test problems; percent, gains in points.",
        table(
            ("System 1", "System 2", "beta", "right", "gain over plain", "McNemar p", "ambiguous steps", "changed"),
            _greedy_rows(stages, kinds),
        ),
        "{num_problems} test problems, {num_samples} samples each, temperature 1.".format(
            **result(f"sampled, {kinds[0]}")
        ),
        table(
            ("System 2", "beta", "pass@1", "maj@n", "maj@n over plain", "maj@n over beta 0", "best@n of plain"),
            _sampled_rows(stages, kinds),
        ),
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


def percent(estimate: Report, sign: str = "") -> str:
    """An estimate with its interval."""
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def find_arm(report: Report, name: str) -> Report:
    """The arm of this name."""
    return next(arm for arm in report["arms"] if arm["name"] == name)


def find_comparison(report: Report, arm: str, other: str, metric: str = ACCURACY) -> Report:
    """Of one arm with another in the same metric."""
    wanted = (arm, metric, other, metric)
    return next(c for c in report["comparisons"] if (c["arm"], c["metric"], c["other"], c["other_metric"]) == wanted)


def steered_arms(report: Report) -> list[Report]:
    """The arms in which the verifier takes part, by beta."""
    arms = [arm for arm in report["arms"] if arm["settings"] and arm["settings"]["beta"] > 0]
    return sorted(arms, key=lambda arm: arm["settings"]["beta"])


def _surroundings(exploration: Report) -> str:
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    counts = (
        "{problems:,} solutions, {positions:,} positions, {explored_positions:,} with a candidate, {candidates:,} "
        "candidates, {rollouts:,} rollouts ({spared_rollouts:,} spared since the verdict was known), {pairs:,} pairs, "
        "{tokens_per_second:,.0f} tokens/s"
    )
    return f"{threads}; {versions}. Exploration: {counts.format(**exploration)}."


def _pairwise(trained: Report) -> tuple[str, ...]:
    shares = (f"{100 * trained[name]:.1f}" for name in ("verifier", "system1", "combined"))
    return f"{trained['training_pairs']:,}", f"{trained['num_pairs']:,}", *shares


def _greedy_rows(stages: Stages, kinds: list[str]) -> Iterator[tuple[str, ...]]:
    yield "as it is", "none", "-", percent(find_arm(stages.result(f"greedy, {kinds[0]}"), PLAIN)["metrics"][ACCURACY])
    for kind in kinds:
        yield from _gains("as it is", kind, stages.result(f"greedy, {kind}"))
    if "greedy, control" in stages.seconds:
        control = stages.result("greedy, control")
        yield "fine-tuned", "none", "-", percent(find_arm(control, PLAIN)["metrics"][ACCURACY])
    if "greedy, full on control" in stages.seconds:
        yield from _gains("fine-tuned", "full", stages.result("greedy, full on control"))


def _gains(model: str, kind: str, report: Report) -> Iterator[tuple[str, ...]]:
    for arm in steered_arms(report):
        comparison = find_comparison(report, arm["name"], PLAIN)
        shares = (f"{100 * arm[name]:.1f} %" for name in ("ambiguous_share", "intervention_share"))
        gain, p_value = percent(comparison["difference"], "+"), f"{comparison['p_value']:.1g}"
        beta = f"{arm['settings']['beta']:g}"
        yield model, kind, beta, percent(arm["metrics"][ACCURACY]), gain, p_value, *shares


def _sampled_rows(stages: Stages, kinds: list[str]) -> Iterator[tuple[str, ...]]:
    first = stages.result(f"sampled, {kinds[0]}")
    metric = f"maj@{first['num_samples']}"
    for name, beta in ((PLAIN, "-"), (TRUNCATED, "0")):
        metrics = find_arm(first, name)["metrics"]
        yield "none", beta, percent(metrics[ACCURACY]), percent(metrics[metric])
    for kind in kinds:
        report = stages.result(f"sampled, {kind}")
        for arm in steered_arms(report):
            metrics, best = arm["metrics"], find_arm(report, PLAIN)["metrics"].get(f"best@{report['num_samples']}")
            gains = (
                percent(find_comparison(report, arm["name"], other, metric)["difference"], "+")
                for other in (PLAIN, arm["baseline"])
            )
            beta = f"{arm['settings']['beta']:g}"
            yield kind, beta, percent(metrics[ACCURACY]), percent(metrics[metric]), *gains, percent(best)


def plot_betas(stages: Stages, kinds: Iterable[str], path: Path) -> None:
    """Accuracy on the validation split against beta, a line per kind of verifier."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind in kinds:
        report = stages.result(f"betas, {kind}")
        arms = [find_arm(report, PLAIN), *steered_arms(report)]
        betas = [0.0, *(arm["settings"]["beta"] for arm in arms[1:])]
        estimates = [arm["metrics"][ACCURACY] for arm in arms]
        axes.plot(betas, [100 * e["mean"] for e in estimates], marker="o", label=kind)
        axes.fill_between(betas, [100 * e["low"] for e in estimates], [100 * e["high"] for e in estimates], alpha=0.1)
    axes.axvline(PAPER_BETA, color="gray", linestyle=":", label="the paper's")
    axes.set(xlabel="beta", ylabel="right answers on the validation split, %")
    axes.legend()
    figure.savefig(path)
