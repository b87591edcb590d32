"""Time of one decoding step of the cpu backend against the number of branches and against the length of the prefix.

SmolLM2-135M-Instruct in bfloat16, one sequence. With an alpha of 0 and `candidate_top_k` = k every step has k branches;
the verifiers are the `head` that comes with the package and a `lora` of rank 16 with random weights. Lengths of the
prefix are measured without a verifier, beside the time that reading the prefix's keys and values takes at the measured
bandwidth. What is compared takes turns.

    python bench/step_time.py --output build/step_time
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import files as files_module
import harness
import torch

import llm2_fast
from llm2_fast import Engine, GenerationConfig
from llm2_fast.models.loading import load_model
from llm2_fast.models.smollm2 import model_file

BRANCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PREFIXES = (128, 512, 1024, 2048, 4096)
STEPS = 24


def step_seconds(engine: Engine, prompt: list[int], **options: object) -> float:
    config = GenerationConfig(max_new_tokens=STEPS, ignore_eos=True, **options)
    (result,) = engine.generate([prompt], config)
    return result.stats.decode_seconds / result.stats.steps


def measure_branches(engines: dict[str, Engine], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by verifier, of each number of branches; without a verifier there is one."""
    prompt = list(range(1000, 1064))
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for k in BRANCHES:
            for kind, engine in engines.items():
                options = {} if kind == "none" else {"alpha": 0.0, "candidate_top_k": k}
                times.setdefault((kind, k), []).append(1e3 * step_seconds(engine, prompt, **options))
    return {kind: [statistics.median(times[kind, k]) for k in BRANCHES] for kind in engines}


def measure_prefixes(engine: Engine, rounds: int) -> list[float]:
    """Milliseconds of each length, the middle of the steps counted as the length."""
    times: dict[int, list[float]] = {}
    for _ in range(rounds):
        for length in PREFIXES:
            prompt = list(range(1000, 1000 + length - STEPS // 2))
            times.setdefault(length, []).append(1e3 * step_seconds(engine, prompt))
    return [statistics.median(times[length]) for length in PREFIXES]


def plot(branches: dict[str, list[float]], path: Path) -> None:
    """Step time against the number of branches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, times in branches.items():
        style = "k--" if kind == "none" else "o-"
        axes.plot(BRANCHES, times, style, label="plain decoding" if kind == "none" else kind)
    axes.set(xlabel="branches", ylabel="ms per step", ylim=0)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/step_time"), help="folder for models and results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    files = files_module.prepare(arguments.output)
    loaded = load_model(model_file(), dtype="bfloat16")
    verifiers = {"none": None, "head": files.verifiers["head"], "lora": files.verifiers["lora"]}
    engines = {kind: llm2_fast.load(loaded.model, path, backend="cpu") for kind, path in verifiers.items()}
    branches = measure_branches(engines, arguments.rounds)
    prefixes = measure_prefixes(engines["none"], arguments.rounds)
    bandwidth = harness.measure_read_bandwidth()

    lines = ["| ms per step, branches | " + " | ".join(map(str, BRANCHES)) + " |", "|---" * (len(BRANCHES) + 1) + "|"]
    lines += [f"| {kind} | " + " | ".join(f"{time:.2f}" for time in times) + " |" for kind, times in branches.items()]
    spec = loaded.model.config
    bytes_per_position = 2 * 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim
    floors = [1e3 * length * bytes_per_position / bandwidth for length in PREFIXES]
    lines += [
        "",
        "| prefix | ms per step | more than the shortest | reading the prefix at the floor |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {length} | {time:.2f} | {time - prefixes[0]:.2f} | {floor - floors[0]:.2f} |"
        for length, time, floor in zip(PREFIXES, prefixes, floors, strict=True)
    ]
    lines += ["", f"Read bandwidth {bandwidth / 1e9:.1f} GB/s, {arguments.threads} threads, {arguments.rounds} rounds."]
    print("\n".join(lines))
    (arguments.output / "table.md").write_text("\n".join(lines) + "\n")
    plot(branches, arguments.output / "step_time.svg")


if __name__ == "__main__":
    main()
