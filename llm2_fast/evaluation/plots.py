"""Figures of an evaluation, and of the qualities that an exploration measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llm2_fast.errors import ArgumentError, MissingDependencyError
from llm2_fast.evaluation.arms import PLAIN
from llm2_fast.evaluation.report import ACCURACY, ArmReport, EvaluationReport
from llm2_fast.supervision import Supervision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (8.0, 4.2)  # inches, with the legend beside the axes
_DPI = 150
_QUALITY_BINS = 20
_MARGIN_BINS = 40


def check_matplotlib() -> None:
    """Raise `MissingDependencyError` unless `matplotlib` is installed."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("plots need: pip install 'llm2-fast[eval]'")


def plot_report(report: EvaluationReport, directory: Path) -> list[Path]:
    """Draw what the report has figures for: accuracy by beta, by ambiguous steps and by cost, over samples, margins.

    Args:
        report: Of an evaluation.
        directory: Gets PNG files.

    Returns:
        The files.

    Raises:
        MissingDependencyError: `matplotlib` is not installed.
    """
    return [_save(directory / f"{name}.png", draw) for name, draw in _figures(report)]


def plot_quality(supervision: Supervision, path: Path) -> Path:
    """Draw the histogram of the qualities Q that an exploration measured, negatives apart from the rest.

    Args:
        supervision: With qualities.
        path: The PNG file.

    Raises:
        ArgumentError: No quality was recorded.
        MissingDependencyError: `matplotlib` is not installed.
    """
    negatives = [q.quality for e in supervision.examples for q in e.quality or () if q.quality is not None]
    spared = [q.quality for e in supervision.examples for q in e.spared_quality if q.quality is not None]
    if not negatives and not spared:
        raise ArgumentError("supervision", "examples with measured qualities", "none")

    def draw(axes: Axes) -> None:
        labels = [f"negatives ({len(negatives)})", f"others ({len(spared)})"]
        axes.hist([negatives, spared], bins=_QUALITY_BINS, stacked=True, label=labels)
        axes.set(xlabel="quality Q of a candidate", ylabel="candidates")

    return _save(path, draw)


def _figures(report: EvaluationReport) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    """Names and what draws them."""
    steered = [arm for arm in report.arms if arm.settings]
    if len({arm.settings["beta"] for arm in steered}) > 1:
        yield "accuracy_by_beta", lambda axes: _draw_beta(axes, report, steered)
    if steered:
        yield "accuracy_by_ambiguity", lambda axes: _draw_ambiguity(axes, report, steered)
        yield "accuracy_by_cost", lambda axes: _draw_cost(axes, report)
    if report.num_samples > 1:
        yield "accuracy_by_samples", lambda axes: _draw_samples(axes, report)
    if any(arm.margins for arm in steered):
        yield "margins", lambda axes: _draw_margins(axes, steered)


def _draw_beta(axes: Axes, report: EvaluationReport, steered: list[ArmReport]) -> None:
    """A line per truncation of the candidates."""
    lines: dict[tuple[float | None, ...], list[ArmReport]] = {}
    for arm in steered:
        lines.setdefault((arm.settings["alpha"], arm.settings["candidate_top_k"]), []).append(arm)
    for (alpha, top_k), arms in lines.items():
        arms.sort(key=lambda arm: arm.settings["beta"])
        label = f"alpha {alpha:g}" + ("" if top_k is None else f", top {top_k}")
        _errorbar(axes, [arm.settings["beta"] for arm in arms], [(arm, ACCURACY) for arm in arms], label)
    _draw_plain(axes, report)
    axes.set(xlabel="beta", ylabel=f"{ACCURACY}, %")


def _draw_ambiguity(axes: Axes, report: EvaluationReport, steered: list[ArmReport]) -> None:
    """How often each arm had candidates to choose from."""
    for arm in steered:
        _errorbar(axes, [100 * arm.ambiguous_share], [(arm, ACCURACY)], arm.name)
    _draw_plain(axes, report)
    axes.set(xlabel="ambiguous steps, %", ylabel=f"{ACCURACY}, %")


def _draw_plain(axes: Axes, report: EvaluationReport) -> None:
    axes.axhline(100 * report.arm(PLAIN).metrics[ACCURACY].mean, color="gray", linestyle="--", label=PLAIN)


def _draw_cost(axes: Axes, report: EvaluationReport) -> None:
    """Time per token of each arm."""
    for arm in report.arms:
        _errorbar(axes, [1000 * arm.seconds_per_token], [(arm, ACCURACY)], arm.name)
    axes.set(xlabel="milliseconds per token", ylabel=f"{ACCURACY}, %")


def _draw_samples(axes: Axes, report: EvaluationReport) -> None:
    """maj@k of every arm, and best@k of reranked plain samples."""
    for arm in report.arms:
        for kind, label in (("maj", arm.name), ("best", f"{arm.name}, reranked")):
            names = [name for name in arm.metrics if name.startswith(f"{kind}@")]
            if names:
                counts = [1, *(int(name.partition("@")[2]) for name in names)]
                estimates = [arm.metrics[name] for name in (ACCURACY, *names)]
                axes.plot(counts, [100 * e.mean for e in estimates], marker="o", label=label)
                axes.fill_between(
                    counts, [100 * e.low for e in estimates], [100 * e.high for e in estimates], alpha=0.1
                )
                axes.set_xscale("log", base=2)
                axes.set_xticks(counts, labels=map(str, counts))
    axes.set(xlabel="samples", ylabel="chosen answer is right, %")


def _draw_margins(axes: Axes, steered: list[ArmReport]) -> None:
    for arm in steered:
        if total := sum(arm.margins.values()):
            margins = [float(margin) for margin in arm.margins]
            shares = [count / total for count in arm.margins.values()]
            axes.hist(margins, bins=_MARGIN_BINS, weights=shares, histtype="step", label=arm.name)
    axes.set(xlabel="best score less second best", ylabel="share of ambiguous steps")


def _errorbar(axes: Axes, x: list[float], points: list[tuple[ArmReport, str]], label: str) -> None:
    """Means in percent with their intervals."""
    estimates = [arm.metrics[metric] for arm, metric in points]
    below = [100 * (estimate.mean - estimate.low) for estimate in estimates]
    above = [100 * (estimate.high - estimate.mean) for estimate in estimates]
    means = [100 * estimate.mean for estimate in estimates]
    axes.errorbar(x, means, yerr=(below, above), marker="o", capsize=3, label=label)


def _save(path: Path, draw: Callable[[Axes], None]) -> Path:
    check_matplotlib()
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and chooses a display

    figure = Figure(figsize=_SIZE, layout="constrained")
    draw(figure.subplots())
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=_DPI)
    return path
