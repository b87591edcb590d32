"""Prompts from arguments, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2_fast.errors import ArgumentError

STANDARD_INPUT = "-"


def read_prompts(arguments: Sequence[str], path: str | None, *, chat: bool) -> list[Any]:
    """The prompts of a command line, in a form that `Engine.generate` takes.

    Args:
        arguments: Prompts given as they are.
        path: A file with one prompt per line, or JSON lines; "-" is standard input, as is None without arguments.
        chat: Make every string a user message.

    Raises:
        ArgumentError: There are prompts from both places, none at all, or some that cannot be read.
    """
    if arguments and path is not None:
        raise ArgumentError("--prompts-file", "either a file or prompts as arguments", "both")
    if arguments:
        prompts: list[Any] = list(arguments)
    elif path is None and sys.stdin.isatty():
        raise ArgumentError("prompt", "arguments, --prompts-file, or text on standard input", "none of these")
    else:
        prompts = _parse(*_read(STANDARD_INPUT if path is None else path))
    return [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in prompts]


def _read(path: str) -> tuple[str, str]:
    """The text of a file and what messages call it."""
    try:
        if path == STANDARD_INPUT:
            return sys.stdin.read(), "standard input"
        return Path(path).read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("--prompts-file", "a readable text file in UTF-8", f"{path!r}: {error}") from error


def _parse(text: str, name: str) -> list[Any]:
    """One prompt per line that is not blank. If the first is a JSON object, all lines must be."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ArgumentError(name, "at least one prompt", "none")
    if _json_object(lines[0][1]) is None:
        return [line for _, line in lines]
    return [_prompt_of(_json_object(line), f"{name}:{number}") for number, line in lines]


def _prompt_of(entry: dict[str, Any] | None, where: str) -> Any:
    if entry is None or len(entry.keys() & {"prompt", "messages"}) != 1:
        keys = "text that is none" if entry is None else f"the keys {sorted(entry)}"
        raise ArgumentError(where, "a JSON object with either prompt or messages", keys)
    return entry["prompt"] if "prompt" in entry else entry["messages"]


def _json_object(line: str) -> dict[str, Any] | None:
    """The object that a line spells, None if it spells none."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
