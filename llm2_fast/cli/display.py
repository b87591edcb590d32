"""`Display`: styled text for people, through `rich` on a terminal that has it, plainly elsewhere."""

from __future__ import annotations

import importlib.util
import shutil
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import NamedTuple, Protocol, TextIO

# What the text is, and how `rich` shows it.
STYLES = {
    "text": "",
    "title": "bold",
    "quiet": "dim",
    "system1": "yellow",
    "system2": "bold green",
    "changed": "bold black on green",  # a token of System 2's own choice inside a text
}
_FALLBACK_SIZE = (100, 24)
_MAX_WIDTH = 120


class Segment(NamedTuple):
    """A piece of text and its style, a key of `STYLES`."""

    text: str
    style: str = "text"


class Display(Protocol):
    """Where a command writes.

    Attributes:
        width: Columns.
    """

    width: int

    def line(self, *segments: Segment) -> None:
        """Write one line. It should fit the width."""

    def paragraph(self, label: Segment, body: Sequence[Segment]) -> None:
        """Write a label and, beside it, text that is wrapped into what is left of the width."""

    def status(self, message: str) -> AbstractContextManager[object]:
        """Show that something takes time, as long as the context lasts."""


class PlainDisplay:
    """Text without colours; changed tokens stand in [brackets]."""

    def __init__(self, file: TextIO, width: int) -> None:
        self._file, self.width = file, width

    def line(self, *segments: Segment) -> None:
        print("".join(segment.text for segment in segments).rstrip(), file=self._file, flush=True)

    def paragraph(self, label: Segment, body: Sequence[Segment]) -> None:
        runs = ((style, "".join(s.text for s in run)) for style, run in groupby(body, key=lambda s: s.style))
        text = "".join(_bracketed(text) if style == "changed" else text for style, text in runs)
        lines = [
            part for line in text.split("\n") for part in textwrap.wrap(line, self.width - len(label.text)) or [""]
        ]
        for number, line in enumerate(lines):
            self.line(Segment(" " * len(label.text) if number else label.text), Segment(line))

    def status(self, message: str) -> AbstractContextManager[object]:
        if self._file.isatty():  # nobody waits in front of a file
            self.line(Segment(message))
        return nullcontext()


class RichDisplay:
    """Text in colours."""

    def __init__(self, file: TextIO, width: int) -> None:
        from rich.console import Console

        self._console = Console(file=file, width=width, highlight=False)
        self.width = width

    def line(self, *segments: Segment) -> None:
        self._console.print(_rich_text(segments), soft_wrap=True)

    def paragraph(self, label: Segment, body: Sequence[Segment]) -> None:
        from rich.table import Table

        grid = Table.grid()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(_rich_text([label]), _rich_text(body))
        self._console.print(grid)

    def status(self, message: str) -> AbstractContextManager[object]:
        return self._console.status(message)


def make_display(file: TextIO) -> Display:
    """The display for a stream: in colours if it is a terminal and `rich` is installed."""
    width = min(shutil.get_terminal_size(_FALLBACK_SIZE).columns, _MAX_WIDTH)
    if not file.isatty():
        return PlainDisplay(file, width)
    if importlib.util.find_spec("rich") is None:
        display = PlainDisplay(file, width)
        display.line(Segment("(in colours with: pip install rich)"))
        return display
    return RichDisplay(file, width)


def _bracketed(text: str) -> str:
    """Brackets around the text, spaces stay outside."""
    core = text.strip()
    return text.replace(core, f"[{core}]", 1) if core else f"[{text}]"


def _rich_text(segments: Sequence[Segment]) -> object:
    from rich.text import Text

    return Text.assemble(*((segment.text, STYLES[segment.style]) for segment in segments))
