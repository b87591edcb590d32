"""The command line `llm2-fast`: text from a model and a verifier, a demonstration, and what is installed.

Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from llm2_fast.cli import data, demo, explore, generate, info, trace, train
from llm2_fast.cli import eval as evaluate
from llm2_fast.errors import Llm2FastError
from llm2_fast.version import __version__

_PROGRAM = "llm2-fast"
_EXIT_CODES = """\
exit codes: 0 success; 1 a sample ended with an error, which is reported with its text; 2 wrong usage, or an input that
cannot be used; 130 interrupted
"""


class _UsageError(Llm2FastError):
    """The command line does not parse."""


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as an exception, so that all errors are one line written in one place."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: Without the program's name; `sys.argv` if None.

    Returns:
        The exit code: 0 success, 1 a sample ended with an error, 2 wrong usage or an `Llm2FastError`, 130 Ctrl-C.
    """
    try:
        options = parse(arguments)
        code = options.run(options)
        sys.stdout.flush()
        return code
    except Llm2FastError as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as with `| head`. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a command line, `run` among them.

    argparse takes a list of positional arguments from one place only, so prompts behind an option come back unparsed.
    """
    parser = _make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "prompts") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.prompts = [*options.prompts, *rest]
    return options


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        description="LLM2 decoding: a token-level verifier (System 2) steers an LLM (System 1).",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (generate, trace, demo, explore, data, train, evaluate, info):
        subparser = commands.add_parser(
            command.__name__.rpartition(".")[2], help=command.SUMMARY, description=f"{command.SUMMARY}."
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
