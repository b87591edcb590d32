"""`llm2-fast explore`: supervision for a verifier from problems and a model."""

from __future__ import annotations

import argparse
import sys

from llm2_fast.cli.json_lines import print_json
from llm2_fast.cli.options import add_config_options, add_load_options, given_options, load_options
from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.report import ExplorationReport

SUMMARY = "find out which tokens lead a model's solutions astray, as supervision for a verifier"
_DEFAULTS = ExplorationConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `explore`."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, or the path of a GGUF file")
    parser.add_argument("problems", metavar="PROBLEMS", help="JSON lines with question and answer")
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="directory for the supervision; an interrupted run is taken up where it stopped",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or a Ray cluster")
    parser.add_argument("--num-workers", metavar="N", type=int, help="on a cluster; by default one per GPU or machine")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    add_config_options(parser, "exploration", _DEFAULTS)
    add_load_options(parser)


def run(options: argparse.Namespace) -> int:
    """Explore, with a progress bar on standard error, then print a report."""
    config = _DEFAULTS.merge(**given_options(options, _DEFAULTS))
    loading = load_options(options)
    batch = {"max_batch_size": loading.pop("max_batch_size")} if "max_batch_size" in loading else {}
    from llm2_fast.exploration.run import explore  # brings torch and transformers

    report = explore(
        options.model,
        options.problems,
        options.output,
        config,
        engine=options.engine,
        num_workers=options.num_workers,
        progress=sys.stderr.isatty(),
        load_options=loading,
        **batch,
    )
    if options.json:
        print_json({**vars(report), "tokens_per_second": report.tokens_per_second})
    else:
        _print_report(report)
    return 0


def _print_report(report: ExplorationReport) -> None:
    for name, value in (
        ("problems", f"{report.problems} explored, {report.resumed} there already"),
        *((f"  {count} skipped", reason) for reason, count in report.skipped.items()),
        ("positions", f"{report.explored_positions} explored of {report.positions} in the solutions"),
        ("candidates", f"{report.candidates}, of which {report.pairs} became pairs"),
        (
            "continuations",
            f"{report.rollouts}; {_with_share(report.spared_rollouts, report.rollouts)} spared, verdicts being known",
        ),
        ("generated tokens", f"{report.generated_tokens}, {report.tokens_per_second:.1f} per second"),
        (
            "prefix tokens",
            f"{report.prefilled_tokens} computed; {_with_share(report.shared_tokens, report.prefilled_tokens)} shared",
        ),
        ("seconds", f"{report.seconds:.1f}"),
    ):
        print(f"{name:<17} {value}")


def _with_share(saved: int, done: int) -> str:
    """A number and its share of what there would have been to do."""
    return f"{saved} ({100 * saved / max(1, saved + done):.0f} %)"
