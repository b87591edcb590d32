"""`Client`: the parent's end of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


class Client:
    """Starts a worker and asks it.

    Args:
        module: Stem of the worker's file.
        options: Its argument.
        python: Interpreter to run it with.

    Attributes:
        engine: Its name and version.
    """

    def __init__(self, module: str, options: dict[str, Any], python: str = sys.executable) -> None:
        command = [python, str(_HERE / f"{module}.py"), json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.engine: str = self._read()["engine"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the worker."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args[1]} ended with status {self._process.wait()}; see above")
        return json.loads(line)
