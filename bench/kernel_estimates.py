"""Least time of every Triton kernel on a GPU, from the bytes it must move and its matrix products. Needs no GPU.

    python bench/kernel_estimates.py [--bandwidth 4.3e12] [--flops 790e12] [--launch 1.3e-6]

At the shapes of Llama-3.2-1B in bfloat16; the defaults are the copy bandwidth and matrix rate measured on an H200, and
the usual cost of a small kernel in a CUDA graph. The step's last row adds that for every launch. Estimates are floors:
latency and imperfect overlap come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from kernel_launches import LLAMA_3_2_1B, Launch, Load, launches

# How often a joint step launches each, by layer and besides.
_PER_LAYER = {
    "project_heads": 1, "branch_attention": 1, "linear (o)": 1, "linear (gate_up)": 1, "linear (down)": 1,
}  # fmt: skip
_PER_STEP = {
    "branch_rows": 1, "embed": 1, "rms_norm": 2, "score_head (linear)": 1, "adjust_and_pick": 1, "commit": 1,
    "lm_head_select": 1,
}  # fmt: skip
# What a step launches besides one kernel per call: the row tiles, the merge of `lm_head_select`, and in torch copies of
# ids, counts, winners and hidden states, a fill and a sum.
_OTHER_LAUNCHES = 8


def calls_per_step(name: str) -> int:
    """Launches of a kernel in one joint step."""
    return LLAMA_3_2_1B.num_layers * _PER_LAYER.get(name, 0) + _PER_STEP.get(name, 0)


def print_table(loads: Iterable[Load], bandwidth: float, flops: float, launch_seconds: float) -> None:
    """A row per kernel and load, and one per load for the whole step."""

    def microseconds(launch: Launch) -> float:
        return 1e6 * max(launch.bytes / bandwidth, launch.flops / flops)

    print("| kernel | sequences | prefix | rows | MB moved | floor, µs | per step |")
    print("|---|---|---|---|---|---|---|")
    for load in loads:
        cells = f"{load.sequences} | {load.prefix} | {load.rows}"
        total_bytes, total_us, num_launches = 0.0, 0.0, _OTHER_LAUNCHES
        for launch in launches("meta", torch.bfloat16, LLAMA_3_2_1B, load):
            calls = calls_per_step(launch.name)
            total_bytes += calls * launch.bytes
            total_us += calls * microseconds(launch)
            num_launches += calls
            print(f"| {launch.name} | {cells} | {launch.bytes / 1e6:.3f} | {microseconds(launch):.2f} | {calls} |")
        print(f"| **joint step** | {cells} | {total_bytes / 1e6:.0f} | {total_us:.0f} | |")
        with_launches = total_us + 1e6 * num_launches * launch_seconds
        print(f"| **with launches** | {cells} | | {with_launches:.0f} | {num_launches} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second")
    parser.add_argument("--flops", type=float, default=790e12, help="products and sums per second")
    parser.add_argument("--launch", type=float, default=1.3e-6, help="seconds from kernel to kernel")
    arguments = parser.parse_args()
    loads = [Load(sequences=1, prefix=512), Load(sequences=1, prefix=4096), Load(sequences=8, prefix=4096)]
    print_table(loads, arguments.bandwidth, arguments.flops, arguments.launch)


if __name__ == "__main__":
    main()
