"""`llm2-fast train`: train a verifier."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from typing import Any

from llm2_fast.cli.json_lines import print_json
from llm2_fast.cli.options import add_config_options, given_options
from llm2_fast.errors import ArgumentError
from llm2_fast.train.config import KINDS, TrainingConfig

SUMMARY = "train a verifier for a model, on supervision or on problems with reference solutions"
_DEFAULTS = TrainingConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, or the path of a GGUF file")
    parser.add_argument(
        "supervision",
        metavar="SUPERVISION",
        help="JSON lines with messages and samples, or with question and answer; or a directory that exploration wrote",
    )
    parser.add_argument("--kind", choices=KINDS, default="head", help="of verifier; default: head")
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="gets verifier, record and checkpoints")
    parser.add_argument(
        "--heldout",
        metavar="FILE|SHARE",
        default="0.1",
        help="what to measure on: a file like SUPERVISION, or the share of it to hold out; default: 0.1",
    )
    parser.add_argument("--init", metavar="MODEL", help="network that a full verifier starts from; default: MODEL")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR, if one began there")
    parser.add_argument(
        "--trainer-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a further field of transformers.TrainingArguments, for lora and full; the value as JSON or text. "
        "Repeatable.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object with what was measured")
    add_config_options(parser, "training", _DEFAULTS)


def run(options: argparse.Namespace) -> int:
    """Train, then print what was measured on held-out pairs."""
    trainer_options = dict(_parse_pair(text) for text in options.trainer_option)
    from llm2_fast.train.trainer import train_verifier  # brings torch and transformers

    with redirect_stdout(sys.stderr):  # Trainer logs to standard output
        result = train_verifier(
            options.model,
            options.supervision,
            options.kind,
            heldout=_parse_heldout(options.heldout),
            init=options.init,
            output_dir=options.output_dir,
            resume=options.resume,
            progress=sys.stderr.isatty(),
            trainer_options=trainer_options,
            **given_options(options, _DEFAULTS),
        )
    if int(os.environ.get("RANK", "0")) > 0:  # another process of the same run prints
        return 0
    measured = {"num_pairs": result.num_pairs, "heldout": result.heldout, "heldout_plausible": result.heldout_plausible}
    if options.json:
        print_json({"output_dir": options.output_dir, **measured})
        return 0
    print(f"{options.kind} verifier in {options.output_dir}, trained on {result.num_pairs} pairs")
    print(f"{'held-out pairs in order by':<28} {'pairs':>7}  verifier  System 1  combined")
    for label, accuracy in (("all", result.heldout), ("those with plausible truth", result.heldout_plausible)):
        shares = "  ".join(f"{share:>8.1%}" for share in (accuracy.verifier, accuracy.system1, accuracy.combined))
        print(f"{label:<28} {accuracy.num_pairs:>7}  {shares}")
    return 0


def _parse_heldout(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _parse_pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ArgumentError("--trainer-option", "NAME=VALUE", text)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
