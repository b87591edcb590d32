"""`Run`: the directory of a training run, which says how the run was made and holds its checkpoints and verifier."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llm2_fast.errors import ArgumentError
from llm2_fast.files import replace_text
from llm2_fast.version import __version__

_RECORD = "training.json"
_TRAINER_STATE = "trainer_state.json"  # the file of a checkpoint that Trainer writes last


class Run:
    """A run and its directory: `training.json`, `checkpoints/` and, at the end, the verifier itself.

    Args:
        directory: Created when the run begins.
        resume: Continue the run that began there, if one did.

    Raises:
        ArgumentError: Something is there, and it is not a run to be continued.
    """

    def __init__(self, directory: str | os.PathLike[str], resume: bool) -> None:
        self.directory = Path(directory)
        self._description: dict[str, Any] = {}
        occupied = self.directory.exists() and not (self.directory.is_dir() and not any(self.directory.iterdir()))
        if occupied and not (resume and self._record.is_file()):
            raise ArgumentError("output_dir", "an empty directory, or one with a run and resume=True", str(directory))

    @property
    def checkpoints(self) -> Path:
        """Directory of Trainer's checkpoints."""
        return self.directory / "checkpoints"

    def describe(self, description: dict[str, Any]) -> None:
        """Say how this run is made. If one was begun, it has to have been made in the same way.

        Args:
            description: By the names that callers know.

        Raises:
            ArgumentError: It was not; the message names what differs.
        """
        self._description = json.loads(json.dumps(description, default=str))
        if not self._record.exists():
            return
        begun = json.loads(self._record.read_text(encoding="utf-8"))["run"]
        for name in sorted(begun.keys() | self._description.keys()):
            if begun.get(name) != self._description.get(name):
                expected = f"{begun.get(name)!r}, as when the run in {str(self.directory)!r} began"
                raise ArgumentError(name, expected, repr(self._description.get(name)))

    def begin(self) -> None:
        """Record the description, unless the run has begun before. Called when nothing can be refused any more."""
        if not self._record.exists():
            self._write({"llm2_fast": __version__, "run": self._description})

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; None if there is none."""
        complete = [path.parent for path in self.checkpoints.glob(f"checkpoint-*/{_TRAINER_STATE}")]
        return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def finish(self, results: dict[str, Any]) -> None:
        """Record what came out beside how; NaN as null."""
        results = json.loads(json.dumps(results), parse_constant=lambda _: None)
        self._write({**json.loads(self._record.read_text(encoding="utf-8")), "results": results})

    @property
    def _record(self) -> Path:
        return self.directory / _RECORD

    def _write(self, record: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_text(self._record, json.dumps(record, indent=2) + "\n")
