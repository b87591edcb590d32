"""llm2_fast beside the engines that people decode with on a CPU: tokens per second, greedy, prefill included.

Every engine runs in a process of its own and they take turns prompt by prompt, so that what else the machine does, or
how fast its memory is at the moment, meets all of them. Figures are medians over the turns.
OMP_WAIT_POLICY must not be set: engines whose threads meet in OpenMP barriers are half as fast with "passive".

    python bench/peers/compare.py --peers-python .venv-peers/bin/python --output build/peers

The model is SmolLM2-135M-Instruct, the `head` verifier the one that comes with the package; `lora` (rank 16) and `full`
(the LLM's shape) have random weights: they cost what trained ones cost, but choose other tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import files as files_module
import harness
from client import Client

HERE = Path(__file__).resolve().parent
BATCH_SIZES = (1, 8, 16, 32)
PROMPTS = 32  # all different: what engines keep of one prompt cannot help with another beyond their common beginning
ALONE = 16  # of them at batch size 1
_SLOW = 4
LONGEST = 2048  # tokens of prompt and continuation
QUESTIONS = [
    f"{name} buys {a} boxes with {b} {thing} each and gives {c} of them away. How many {thing} are left?"
    for name, a, b, thing, c in zip(
        ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gia", "Hal") * 4,
        range(3, 35),
        range(40, 8, -1),
        ("pens", "eggs", "cards", "nails") * 8,
        range(1, 33),
        strict=True,
    )
]


@dataclass
class Entry:
    """One engine with one set of options: its process and what it measured.

    Attributes:
        name, verifier: As in the table.
        worker: Stem of the worker's file.
        options: Its argument.
        batch_sizes: Those it is measured at.
        every: It takes part in one of so many turns at batch size 1; for slow ones.
        seconds: By batch size, of each turn.
        facts: What the worker says of itself.
        candidates: Mean number of them per step, of each turn at batch size 1.
        bandwidths: Read bandwidth of each turn at batch size 1, the mean of right before and after; of the first entry.
    """

    name: str
    verifier: str
    worker: str
    options: dict[str, Any]
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    python: str = sys.executable
    every: int = 1
    seconds: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    candidates: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.client = Client(self.worker, self.options, self.python)
        self.facts["engine"] = self.client.engine

    def decode(self, prompts: list[list[int]], new_tokens: int) -> float:
        answer = self.client.ask(prompts=prompts, new_tokens=new_tokens)
        if len(prompts) == 1 and answer.get("mean |C|") is not None:
            self.candidates.append(answer["mean |C|"])
        return answer["seconds"]


def entries(files: files_module.Files, arguments: argparse.Namespace) -> list[Entry]:
    """Everything that is compared."""
    shared = {"num_threads": arguments.threads, "max_batch_size": max(BATCH_SIZES), "max_length": LONGEST}
    ours = {"model": str(files.model), "dtype": "bfloat16", **shared}
    found = [Entry("llm2_fast", "none", "worker_llm2_fast", ours)]
    for kind, path in files.verifiers.items():
        found.append(Entry("llm2_fast", kind, "worker_llm2_fast", {**ours, "verifier": str(path)}))
    for quantization in ("int8", "int8-channel"):
        options = {**ours, "quantization": quantization}
        found.append(Entry(f"llm2_fast {quantization}", "none", "worker_llm2_fast", options))
    found.append(Entry("transformers", "none", "worker_transformers", ours, (1, 8), every=_SLOW))
    for kind in ("head", "full"):
        options = {**ours, "verifier": str(files.verifiers[kind])}
        found.append(Entry("naive LLM2 on transformers", kind, "worker_transformers", options, (1,), every=_SLOW))
    if arguments.peers_python is None:
        return found
    python = arguments.peers_python
    for name, path in files.gguf(python).items():
        options = {"gguf": str(path), **shared}
        found.append(Entry(f"llama.cpp {name}", "none", "worker_llama_cpp", options, python=python))
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode == 0:
        found.append(Entry("vLLM", "none", "worker_vllm", ours, python=python))
    else:
        print("vLLM cannot be imported there and is left out", file=sys.stderr)
    return found


def sizes_of(found: list[Entry]) -> list[int]:
    """All batch sizes that are measured."""
    return sorted({size for entry in found for size in entry.batch_sizes})


def measure(found: list[Entry], prompts: list[list[int]], new_tokens: int, turns: int) -> list[float]:
    """Let the entries take turns, at least `turns`. Returns the read bandwidths around the batch sizes."""
    bandwidth = [harness.measure_read_bandwidth()]
    for batch_size in sizes_of(found):
        measured = [entry for entry in found if batch_size in entry.batch_sizes]
        for entry in measured:
            entry.decode(prompts[:batch_size], 4)  # warm-up: caches of this size exist from here on
            if batch_size == 1:
                entry.candidates.clear()
        chosen = prompts[:ALONE] if batch_size == 1 else prompts
        batches = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
        for turn, batch in enumerate(batches * -(-turns // len(batches))):
            for entry in measured:
                if batch_size == 1 and turn % entry.every:
                    continue
                bounded = batch_size == 1 and entry is found[0]
                before = harness.measure_read_bandwidth() if bounded else None
                seconds = entry.decode(batch, new_tokens)
                entry.seconds.setdefault(batch_size, []).append(seconds)
                if bounded:
                    entry.bandwidths.append(statistics.mean([before, harness.measure_read_bandwidth()]))
        print(f"batch size {batch_size} is done", file=sys.stderr)
        bandwidth.append(harness.measure_read_bandwidth())
    return bandwidth


def report(found: list[Entry], num_prompts: int, arguments: argparse.Namespace, bandwidths: list[float]) -> str:
    """The table, in Markdown."""
    new_tokens, sizes = arguments.new_tokens, sizes_of(found)
    columns = ["engine", "verifier", *(f"batch {size}" for size in sizes), "x plain", "mean |C|"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    plain = speed(found[0], 1, new_tokens)
    for entry in found:
        speeds = [f"{speed(entry, size, new_tokens):.1f}" if size in entry.seconds else "" for size in sizes]
        ratio = f"{speed(entry, 1, new_tokens) / plain:.2f}"
        candidates = f"{statistics.mean(entry.candidates):.2f}" if entry.candidates else "-"
        lines.append(f"| {entry.name} | {entry.verifier} | {' | '.join(speeds)} | {ratio} | {candidates} |")
    bandwidth = statistics.median(bandwidths[:2])  # around batch size 1, which it bounds
    floor = bandwidth / files_module.WEIGHT_BYTES
    shares = [
        new_tokens / seconds * files_module.WEIGHT_BYTES / bandwidth
        for seconds, bandwidth in zip(found[0].seconds[1], found[0].bandwidths, strict=True)
    ]
    turns = ", ".join(f"{len(found[0].seconds[size])} of {size}" for size in sizes)
    versions = ", ".join(sorted({entry.facts["engine"] for entry in found}))
    return "\n".join(
        [
            *lines,
            "",
            f"Tokens per second of all sequences, {new_tokens} new tokens per prompt, prefill included, {num_prompts} "
            f"prompts; medians over the turns ({turns} prompts), of every {_SLOW}th at batch size 1 for transformers. "
            f"How prompts of a batch begin may be computed once for all of them; nothing is kept from one turn to the "
            f"next. "
            f"{harness.describe_machine()}; {arguments.threads} threads. {versions}.",
            f"Read bandwidth {', '.join(f'{value / 1e9:.1f}' for value in bandwidths)} GB/s (before and after each "
            f"batch size). With the {bandwidth / 1e9:.1f} around batch size 1, one sweep over "
            f"the {files_module.WEIGHT_BYTES / 1e6:.0f} MB of bfloat16 weights per token allows {floor:.1f} tokens/s; "
            f"plain decoding at batch size 1 reaches {100 * plain / floor:.0f} % of it. Turn by turn, with the "
            f"bandwidth right before and after: {_percentiles(shares)} % (10th, 50th and 90th percentile), at "
            f"{_percentiles(found[0].bandwidths, 1e-9)} GB/s.",
        ]
    )


def _percentiles(values: list[float], factor: float = 100.0) -> str:
    """The 10th, 50th and 90th."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return ", ".join(f"{factor * deciles[i]:.0f}" for i in (0, 4, 8))


def speed(entry: Entry, batch_size: int, new_tokens: int) -> float:
    """Tokens per second."""
    return batch_size * new_tokens / statistics.median(entry.seconds[batch_size])


def plot(found: list[Entry], new_tokens: int, path: Path) -> None:
    """Tokens per second against batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for entry in found:
        sizes = sorted(entry.seconds)
        style = "o-" if entry.name.startswith("llm2_fast") else "x--"
        label = entry.name if entry.verifier == "none" else f"{entry.name}, {entry.verifier}"
        axes.plot(sizes, [speed(entry, size, new_tokens) for size in sizes], style, label=label)
    axes.set(xlabel="sequences together", ylabel="tokens per second", xscale="log", yscale="log")
    axes.set_xticks(sizes_of(found), map(str, sizes_of(found)))
    axes.legend(fontsize="x-small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="interpreter with llama-cpp-python and vLLM; without it, neither")
    parser.add_argument("--problems", type=Path, help='JSON lines with "question"; generated ones by default')
    parser.add_argument("--output", type=Path, default=Path("build/peers"), help="folder for models and results")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3, help="of every engine with each batch size, at least")
    sizes = {"type": int, "nargs": "+", "choices": BATCH_SIZES[1:], "default": BATCH_SIZES[1:]}
    parser.add_argument("--batch-sizes", **sizes, help="besides 1, which all ratios need")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    questions = QUESTIONS
    if arguments.problems is not None:
        questions = [json.loads(line)["question"] for line in arguments.problems.open()][:PROMPTS]
    files = files_module.prepare(arguments.output)
    prompts = [files.tokenize(question) for question in questions]
    found = entries(files, arguments)
    for entry in found:
        entry.batch_sizes = tuple(size for size in entry.batch_sizes if size in (1, *arguments.batch_sizes))
        entry.start()
    bandwidth = measure(found, prompts, arguments.new_tokens, arguments.turns)
    for entry in found:
        entry.client.close()
    table = report(found, len(prompts), arguments, bandwidth)
    print(table)
    (arguments.output / "table.md").write_text(table + "\n")
    rows = [
        {
            **entry.facts,
            "candidates": entry.candidates,
            "name": entry.name,
            "verifier": entry.verifier,
            "seconds": entry.seconds,
            "bandwidths": entry.bandwidths,
        }
        for entry in found
    ]
    (arguments.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(found, arguments.new_tokens, arguments.output / "throughput.svg")


if __name__ == "__main__":
    main()
