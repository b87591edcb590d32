"""`llm2-fast eval`: plain and steered decoding side by side on problems with known answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llm2_fast.cli.json_lines import print_json
from llm2_fast.cli.options import add_generation_options, add_load_options, generation_config, load_options
from llm2_fast.config import GenerationConfig, check_number
from llm2_fast.errors import ArgumentError

SUMMARY = "compare answers with and without System 2"
_DEFAULTS = GenerationConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eval`."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, or the path of a GGUF file")
    parser.add_argument("problems", metavar="PROBLEMS", help="JSON lines with question and answer, or as MATH's")
    parser.add_argument(
        "output", metavar="OUTPUT", help="directory for the results; an interrupted run is taken up where it stopped"
    )
    parser.add_argument("--verifier", metavar="VERIFIER", help="directory or hub id; without it, plain decoding")
    parser.add_argument("--examples", metavar="PATH", help="worked examples in front of each problem, as PROBLEMS")
    parser.add_argument("--num-examples", metavar="K", type=int, help="only the first K of the examples")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N problems")
    parser.add_argument(
        "--sweep",
        metavar="OPTION=X,Y",
        action="append",
        default=[],
        help="more steered arms: values of alpha, beta or candidate_top_k; repeatable, in all combinations",
    )
    parser.add_argument("--plain", metavar="PATH", help="take plain decoding over from an earlier evaluation's OUTPUT")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    parser.add_argument("--plots", action="store_true", help="also draw figures into OUTPUT")
    parser.add_argument(
        "--supervision", metavar="PATH", help="with --plots, also the qualities that `explore` measured: its directory"
    )
    add_generation_options(parser, _DEFAULTS)
    add_load_options(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate, with a progress bar on standard error, then print the report."""
    config = generation_config(options, _DEFAULTS)
    sweep = _parse_sweep(options.sweep)
    for name in ("num_examples", "limit"):
        if getattr(options, name) is not None:
            check_number(f"--{name.replace('_', '-')}", getattr(options, name), integer=True, minimum=1)
    if options.supervision is not None and not options.plots:
        raise ArgumentError("--supervision", "together with --plots", options.supervision)
    from llm2_fast.engine import load  # brings torch and transformers
    from llm2_fast.evaluation.markdown import to_markdown
    from llm2_fast.evaluation.plots import check_matplotlib, plot_quality, plot_report
    from llm2_fast.evaluation.run import evaluate
    from llm2_fast.problems import load_problems
    from llm2_fast.supervision import read_supervision

    if options.plots:
        check_matplotlib()
    supervision = None if options.supervision is None else read_supervision(options.supervision)
    problems = load_problems(options.problems)[: options.limit]
    examples = load_problems(options.examples)[: options.num_examples] if options.examples else []
    engine = load(options.model, options.verifier, **load_options(options))
    progress = sys.stderr.isatty()
    report = evaluate(
        engine, problems, options.output, config, examples=examples, sweep=sweep, plain=options.plain, progress=progress
    )
    if options.json:
        print_json(report)
    else:
        print(to_markdown(report), end="")
    if options.plots:
        plot_report(report, Path(options.output))
    if supervision is not None:
        plot_quality(supervision, Path(options.output) / "quality.png")
    return 0


def _parse_sweep(entries: list[str]) -> dict[str, list[Any]]:
    """Values by option from entries like "beta=0,0.5"."""
    sweep: dict[str, list[Any]] = {}
    for entry in entries:
        name, _, values = entry.partition("=")
        name = name.replace("-", "_")
        kind = int if name == "candidate_top_k" else float
        try:
            sweep.setdefault(name, []).extend(kind(value) for value in values.split(","))
        except ValueError as error:
            raise ArgumentError("--sweep", "OPTION=X,Y with numbers", entry) from error
    return sweep
