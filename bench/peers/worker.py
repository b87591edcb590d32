"""What the workers of the comparisons share: one engine per process, which does what it is told, when it is told.

A worker is started with one JSON argument, its options, prints its facts and then answers every line:
{"prompts": [[token ids]], "new_tokens": n} with {"seconds": ..., "tokens": ..., ...}, and
{"prompt": [token ids], "continuation": [token ids]} with {"argmax": [token ids]}. So engines can take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from typing import Any


class Worker(ABC):
    """An engine.

    Attributes:
        name: With its version.
    """

    name: str

    @abstractmethod
    def __init__(self, options: dict[str, Any]) -> None: ...

    @abstractmethod
    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue prompts together, greedily. Returns the number of new `tokens`, and what else to report."""

    def argmax(self, prompt: list[int], continuation: list[int]) -> list[int]:
        """The tokens that the model finds most probable in place of each token of the continuation."""
        raise NotImplementedError

    @classmethod
    def serve(cls) -> None:
        """Answer requests until the input ends. What the engine prints goes to stderr."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        worker = cls(json.loads(sys.argv[1]))
        print(json.dumps({"engine": worker.name}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(worker._answer(json.loads(line))), file=answers, flush=True)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "continuation" in request:
            return {"argmax": self.argmax(**request)}
        begin = time.perf_counter()
        report = self.decode(**request)
        seconds = time.perf_counter() - begin
        if report["tokens"] != request["new_tokens"] * len(request["prompts"]):
            raise RuntimeError(f"{self.name} stopped early: {report['tokens']} tokens")
        return {"seconds": seconds, **report}
