"""`Stages`: steps of a recipe in an output directory, each done once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2_fast.errors import ArgumentError
from llm2_fast.files import replace_text

_MANIFEST = "recipe.json"


class Stages:
    """Runs stages and remembers their results, so that the same command goes on where it was interrupted.

    Args:
        directory: Made if it is not there.
        options: What every result depends on.

    Attributes:
        directory, options: As given.

    Raises:
        ArgumentError: The directory was begun with other options.
    """

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _MANIFEST
        self.options = options = json.loads(json.dumps(options))
        self._manifest: dict[str, Any] = {"options": options, "stages": {}}
        if self._path.exists():
            self._manifest = json.loads(self._path.read_text(encoding="utf-8"))
            if self._manifest["options"] != options:
                raise ArgumentError("output", f"a directory begun with {options}", self._manifest["options"])

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a stage, which is JSON; computed unless an earlier run has.

        Args:
            name: Of the stage.
            work: Computes it. If it is interrupted it is called again by a later run.
        """
        done = self._manifest["stages"]
        if name not in done:
            print(f"==> {name}", flush=True)
            start = time.perf_counter()
            result = work()
            done[name] = {"seconds": round(time.perf_counter() - start, 1), "result": result}
            replace_text(self._path, json.dumps(self._manifest, indent=1))
        return self.result(name)

    def result(self, name: str) -> Any:
        """The result of a stage that has run."""
        return json.loads(json.dumps(self._manifest["stages"][name]["result"]))

    @property
    def seconds(self) -> dict[str, float]:
        """Wall clock by stage; of a stage that was interrupted, only of its last run."""
        return {name: entry["seconds"] for name, entry in self._manifest["stages"].items()}
