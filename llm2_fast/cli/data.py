"""`llm2-fast data check`: what is wrong with problems or supervision."""

from __future__ import annotations

import argparse
import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from llm2_fast.cli.json_lines import print_json
from llm2_fast.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm2_fast.datacheck import DataCheck

SUMMARY = "check problems and supervision"
_SHOWN = 10  # findings per kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `data`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    summary = "find wrong positions, missing gold answers, duplicates and test questions; 1 if there is any"
    check = commands.add_parser("check", help=summary, description=f"{summary}.")
    check.add_argument(
        "paths", metavar="PATH", nargs="+", help="JSON lines of problems or supervision, or a directory of `explore`"
    )
    check.add_argument("--test", metavar="PATH", action="append", default=[], help="must not be contained; repeatable")
    check.add_argument(
        "--tokenizer", metavar="MODEL", help="directory or hub id; without it, positions are not checked"
    )
    check.add_argument("--json", action="store_true", help="print the findings as a JSON object")


def run(options: argparse.Namespace) -> int:
    """Print what is wrong; 1 if there is anything."""
    from llm2_fast.datacheck import DataCheck  # brings transformers

    tokenizer = None if options.tokenizer is None else _load_tokenizer(options.tokenizer)
    check = DataCheck(tokenizer)
    check.check(options.paths, options.test)
    if options.json:
        result = {"entries": check.num_entries, "positions_checked": tokenizer is not None}
        result["unread_answers"] = check.num_unread_answers
        print_json({**result, "findings": check.findings})
    else:
        _print_findings(check)
    return int(bool(check.findings))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from llm2_fast.models.loading import load_tokenizer

    tokenizer = load_tokenizer(Path(name) if os.path.exists(name) else name)
    if tokenizer is None or not tokenizer.chat_template:
        raise ArgumentError("--tokenizer", "a directory or hub id of a tokenizer with a chat template", name)
    return tokenizer


def _print_findings(check: DataCheck) -> None:
    """By kind, the first few of each."""
    for kind, group in groupby(sorted(check.findings, key=lambda finding: finding.kind), key=lambda f: f.kind):
        findings = list(group)
        print(f"{kind}: {len(findings)}")
        for finding in findings[:_SHOWN]:
            print(f"  {finding.where}: {finding.detail}")
        if len(findings) > _SHOWN:
            print(f"  and {len(findings) - _SHOWN} more")
    notes = [f"{check.num_entries} entries read, {len(check.findings)} findings"]
    if check.tokenizer is None:
        notes.append("positions were not checked, for want of --tokenizer")
    if check.num_unread_answers:
        install = "pip install 'llm2-fast[eval]'"
        notes.append(f"{check.num_unread_answers} gold answers were not checked, for want of math-verify: {install}")
    print("; ".join(notes))
