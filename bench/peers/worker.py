"""What the workers of the comparison share: one engine per process, which decodes when it is told to.

A worker is started with one JSON argument, its options, prints {"ready": {...}} and then answers every line
{"prompts": [[token ids]], "new_tokens": n} with {"seconds": ..., "tokens": ..., ...}. So engines can take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Decode = Callable[[list[list[int]], int], dict[str, Any]]  # prompts decoded together, new tokens -> what to report


def serve(start: Callable[[dict[str, Any]], tuple[Decode, dict[str, Any]]]) -> None:
    """Answer requests until the input ends. What the engines print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    decode, facts = start(json.loads(sys.argv[1]))
    answer({"ready": facts})
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        report = decode(request["prompts"], request["new_tokens"])
        seconds = time.perf_counter() - begin
        tokens = request["new_tokens"] * len(request["prompts"])
        assert report.pop("tokens") == tokens, "an engine stopped early"
        answer({"seconds": seconds, "tokens": tokens, **report})
