"""Time from a prompt of 512 tokens to its first new token, llm2_fast beside the other engines, which take turns.

python bench/peers/prefill.py --peers-python .venv-peers/bin/python --output build/peers
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import compare
import files as files_module

PROMPT_TOKENS = 512
TURNS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="interpreter with llama-cpp-python and vLLM; without it, neither")
    parser.add_argument("--output", type=Path, default=Path("build/peers"), help="folder for models")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    files = files_module.prepare(arguments.output)
    found = [entry for entry in compare.entries(files, arguments) if entry.verifier == "none"]
    for entry in found:
        entry.start()
    milliseconds: dict[str, list[float]] = {entry.name: [] for entry in found}
    for turn in range(TURNS + 1):
        # Another first token each turn: engines that cache prefixes have none to reuse.
        prompt = [1000 + turn, *range(2000, 2000 + PROMPT_TOKENS - 1)]
        for entry in found:
            seconds = entry.decode([prompt], 1)
            if turn > 0:
                milliseconds[entry.name].append(1e3 * seconds)
    print(f"| engine | {PROMPT_TOKENS} tokens, ms (median of {TURNS}) | fastest | slowest |\n|---|---|---|---|")
    for name, times in milliseconds.items():
        print(f"| {name} | {statistics.median(times):.0f} | {min(times):.0f} | {max(times):.0f} |")
    for entry in found:
        entry.client.close()


if __name__ == "__main__":
    main()
