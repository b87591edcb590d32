"""The GPU backend: checked against the reference, then timed. Takes at most ten minutes; needs no network.

    python bench/gpu.py [--only engine|kernels] [--checks-only] [--minutes 9] [--output NAME] [--tiny]

1. The engine's tokens against the reference backend's on the CPU, with every kind of verifier, in float32.
2. The engine's times per step beside those of transformers and of LLM2 as one would first write it (`gpu_engine.py`).
3. Every kernel at the shapes of Llama-3.2-1B against `llm2_fast.reference`, in three dtypes, with fresh random inputs.
4. Bits: rows of `linear` and `branch_attention` alone, in batches of several sizes, and twice.
5. Kernels alone: median of CUDA-graph replays over inputs that rotate past the cache, and achieved bandwidth.
6. A joint step of a random model as one CUDA graph, against the time of reading its weights once.

`--output` writes NAME.json and NAME.md. `--tiny` runs the same code on tiny models in Triton's interpreter, without a
GPU, to see that it runs; its figures mean nothing. It needs TRITON_INTERPRET=1.

Not run on a GPU so far. What it writes belongs into docs/results/gpu.md, in place of the estimates.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_engine import FULL, TINY, EngineRows, Sizes, check_engine
from gpu_report import markdown
from kernel_launches import Launch, Load, Maker, Shape, attention_launch, launches, pick_launch, selection_launch

from llm2_fast import ops
from llm2_fast.kernels.adjust_and_pick import adjust_and_pick
from llm2_fast.kernels.branch_attention import Workspace, branch_attention, tile_rows
from llm2_fast.kernels.commit import commit
from llm2_fast.kernels.linear import linear
from llm2_fast.kernels.lm_head_select import empty_partials, lm_head_select
from llm2_fast.kernels.rms_norm import rms_norm
from llm2_fast.kernels.rope_and_store import rope_and_store
from llm2_fast.kernels.row_tiles import plan_row_tiles
from llm2_fast.kernels.score_head import score_head

# ||actual - expected|| / ||expected||, float32 sums of inputs rounded to the dtype. TF32 would show as about 3e-4.
LARGEST_ERROR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_CACHE_BYTES = 128 << 20  # inputs together larger than twice the L2 of an H200
_REPLAYS = 20
_BLOCK_SIZE = 16
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected; infinite where one has NaN and the other has not."""
    actual, expected = actual.cpu().double(), expected.double()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return math.inf
    actual, expected = (x.nan_to_num(0.0, 0.0, 0.0) for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors an op returned."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs or ())


def check_launch(launch: Launch) -> float:
    """Largest relative error of what an op returned and wrote."""
    given = [x.cpu().clone() if isinstance(x, torch.Tensor) else x for x in launch.arguments]
    expected = tensors_of(launch.reference(*given)) + [given[i] for i in launch.mutated]
    actual = tensors_of(launch.run()) + [launch.arguments[i] for i in launch.mutated]
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def run_checks(shape: Shape, loads: tuple[Load, ...]) -> bool:
    """Print a line per kernel and dtype; whether all agree."""
    agree = True
    for dtype, largest in LARGEST_ERROR.items():
        for load in loads:
            for launch in launches(_DEVICE, dtype, shape, load):
                try:
                    error = check_launch(launch)
                except Exception:  # the others may do better
                    traceback.print_exc()
                    error = math.inf
                verdict = "ok" if error <= largest else "WRONG"
                agree &= verdict == "ok"
                print(f"{verdict:5} {launch.name:24} {dtype!s:15} rows {load.rows:3} error {error:.1e}", flush=True)
    return agree


def run_bit_checks(shape: Shape, load: Load) -> bool:
    """Whether rows have the same bits alone and among others, and in a second run."""
    same = True
    for dtype in LARGEST_ERROR:
        for launch in launches(_DEVICE, dtype, shape, load):
            if not launch.name.startswith(("linear", "branch_attention")):
                continue
            together = launch.run()
            verdicts = [torch.equal(launch.run(), together)]
            for rows in (n for n in (1, 16, 17, 64, 65, 333) if n < load.rows):
                part = tuple(
                    x[:rows] if isinstance(x, torch.Tensor) and x.shape[0] == load.rows else x for x in launch.arguments
                )
                verdicts.append(torch.equal(launch.op(*part), together[:rows]))
            same &= all(verdicts)
            print(f"{'ok' if all(verdicts) else 'WRONG':5} bits of {launch.name:24} {dtype}", flush=True)
    return same


def median_seconds(runs: list[Callable[[], Any]]) -> float:
    """Median time of one of `runs`, which are captured one after the other in a CUDA graph."""
    for run in runs:  # compiles
        run()
    if _DEVICE == "cpu":  # only to see that it runs
        return time_of(lambda: [run() for run in runs]) / len(runs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    for _ in range(3):
        graph.replay()
    seconds = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(runs))
    return statistics.median(seconds)


def time_of(run: Callable[[], Any]) -> float:
    """Seconds of one call, on the host."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copy_bandwidth(elements: int) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.randn(elements, device=_DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds([lambda: target.copy_(source)] * 4)


def past_the_cache(launch: Launch) -> list[tuple]:
    """Copies of the arguments that together do not fit the cache."""
    copies = max(2, min(32, _CACHE_BYTES // max(1, launch.bytes))) if _DEVICE == "cuda" else 1
    return [tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in launch.arguments) for _ in range(copies)]


def time_launch(launch: Launch, load: Load, bandwidth: float) -> dict:
    """A kernel alone."""
    row = {"kernel": launch.name, "sequences": load.sequences, "rows": load.rows, "prefix": load.prefix}
    try:
        seconds = median_seconds([functools.partial(launch.op, *arguments) for arguments in past_the_cache(launch)])
    except Exception as error:  # the other kernels may do better
        traceback.print_exc()
        return row | {"left out": f"{type(error).__name__}: {error}"}
    return row | {
        "us": round(1e6 * seconds, 2), "MB": round(launch.bytes / 1e6, 3),
        "GB/s": round(launch.bytes / seconds / 1e9, 1), "% of copy": round(100 * launch.bytes / seconds / bandwidth, 1),
    }  # fmt: skip


def selection_rows(sizes: Sizes, bandwidth: float) -> Iterator[dict]:
    """`select_candidates` over bfloat16 logits by batch, beside what torch takes for top-k and log-sum-exp."""
    for batch in (1, 4, 16, 64, 256) if _DEVICE == "cuda" else (1, 2):
        load = Load(sequences=batch, branches=1)
        launch = selection_launch(Maker(_DEVICE), torch.bfloat16, sizes.shape, load)
        width = min(load.max_candidates + 1, sizes.shape.vocab_size)

        def composition(logits: torch.Tensor, log_alpha: torch.Tensor, *_: Any, width: int = width) -> torch.Tensor:
            z = logits.float()
            values, _ = z.topk(width, dim=-1)  # one more than is kept, which tells whether any is cut
            kept = values >= values[:, :1] + log_alpha[:, None]
            return torch.logsumexp(z, dim=-1) + kept.sum(dim=-1)

        row = time_launch(launch, load, bandwidth)
        if "us" not in row:
            yield row
            continue
        others = median_seconds([functools.partial(composition, *arguments) for arguments in past_the_cache(launch)])
        times = {"x faster than torch": round(1e6 * others / row["us"], 2)}
        yield row | times | {"target": "at least 85 % of copy beyond the L2 cache, at least 4 x torch"}


def attention_rows(sizes: Sizes, bandwidth: float) -> Iterator[dict]:
    """`branch_attention` over a long prefix, 1 and 8 branches."""
    alone = None
    for branches in (1, 8):
        load = Load(branches=branches, prefix=32_768 if _DEVICE == "cuda" else 40)
        row = time_launch(attention_launch(Maker(_DEVICE), sizes.dtype, sizes.shape, load), load, bandwidth)
        alone = alone or row.get("us")
        times = {"x 1 branch": round(row["us"] / alone, 3)} if "us" in row else {}
        yield row | times | {"target": "at least 80 % of copy, 8 branches at most 1.1 x 1"}


class JointStep:
    """Layers, score, pick, commit and selection of a random model, on buffers of its own, as they would be captured."""

    def __init__(self, shape: Shape, load: Load, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.load = shape, load

        def randn(*size: int, scale: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(size, device=_DEVICE) * scale).to(of)

        def int32(values: list) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=_DEVICE)

        hidden, rows, batch = shape.hidden_size, load.rows, load.sequences
        scale, q_size = hidden**-0.5, shape.num_heads * shape.head_dim
        self.layers = [
            {
                "norms": (torch.ones(hidden, device=_DEVICE), torch.ones(hidden, device=_DEVICE)),
                "qkv": randn(shape.qkv_size, hidden, scale=scale),
                "o": randn(hidden, q_size, scale=scale),
                "gate_up": randn(2 * shape.intermediate_size, hidden, scale=scale),
                "down": randn(hidden, shape.intermediate_size, scale=shape.intermediate_size**-0.5),
            }
            for _ in range(shape.num_layers)
        ]
        self.lm_head = randn(shape.vocab_size, hidden, scale=3 * scale)
        self.weight_bytes = 2 * (
            self.lm_head.numel() + sum(x.numel() for y in self.layers for x in list(y.values())[1:])
        )

        blocks = -(-load.prefix // _BLOCK_SIZE) + 1
        cache = (shape.num_layers, batch * blocks, shape.num_kv_heads, _BLOCK_SIZE, shape.head_dim)
        self.key_cache, self.value_cache = randn(*cache), randn(*cache)
        self.block_table = int32([list(range(i, batch * blocks, batch)) for i in range(batch)])
        self.row_sequence = int32([row // load.branches for row in range(rows)])
        self.row_position = int32([load.prefix] * rows)
        self.first_branch = int32(list(range(0, rows, load.branches)))
        self.count = int32([load.branches] * batch)
        self.num_rows = int32([rows])
        self.lengths = int32([load.prefix] * batch)
        self.row_stored, self.row_has_own = (
            torch.zeros(rows, device=_DEVICE) > 0,
            torch.zeros(rows, device=_DEVICE) == 0,
        )
        self.cosine = self.sine = randn(rows, shape.head_dim // 2, of=torch.float32)

        self.embedded = randn(rows, hidden, of=torch.float32)
        self.stream, self.normed = torch.empty_like(self.embedded), randn(rows, hidden)
        self.qkv = randn(rows, shape.qkv_size, of=torch.float32)
        self.query, self.attended = (randn(rows, shape.num_heads, shape.head_dim) for _ in range(2))
        own = (shape.num_layers, rows, shape.num_kv_heads, shape.head_dim)
        self.own_key, self.own_value = randn(*own), randn(*own)
        self.gated = randn(rows, shape.intermediate_size)
        self.score_weight, self.scores = randn(hidden, scale=scale, of=torch.float32), randn(rows, of=torch.float32)
        self.hidden_states = randn(batch, hidden)
        self.attention_workspace = Workspace.empty(rows, shape.num_heads, shape.head_dim, torch.device(_DEVICE))
        tile = tile_rows(shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype)
        self.tile_rows, self.first_row = tile, int32([0] * (batch + rows // tile + 1))
        width = load.max_candidates
        self.options = (torch.full((batch,), math.log(0.1), device=_DEVICE), int32([0] * batch), width)
        self.candidates = ops._empty_candidates(self.hidden_states, *self.options)
        self.partials = empty_partials(batch, shape.vocab_size, width, torch.device(_DEVICE))
        self.pick = pick_launch(Maker(_DEVICE), batch, width)
        self.picked = ops._empty_picked(*self.pick.arguments)

    def run(self) -> None:
        shape, counted = self.shape, self.num_rows
        self.stream.copy_(self.embedded)
        plan_row_tiles(self.row_sequence, self.tile_rows, self.first_row, counted)
        rows = (self.block_table, self.row_sequence, self.row_position)
        for index, layer in enumerate(self.layers):
            caches = self.key_cache[index], self.value_cache[index]
            own = self.own_key[index], self.own_value[index]
            rms_norm(self.stream, layer["norms"][0], 1e-5, None, self.normed, None, counted)
            self._linear(self.normed, layer["qkv"], None, None, self.qkv)
            rope_and_store(
                self.qkv,
                self.cosine,
                self.sine,
                None,
                None,
                1e-5,
                *caches,
                *rows,
                self.row_stored,
                self.query,
                *own,
                counted,
            )
            branch_attention(
                self.query, *caches, *rows, self.row_has_own, *own, shape.head_dim**-0.5, 0, self.attended,
                self.first_row, self.attention_workspace,
            )  # fmt: skip
            self._linear(self.attended.view(len(self.stream), -1), layer["o"], self.stream, None, self.stream)
            rms_norm(self.stream, layer["norms"][1], 1e-5, None, self.normed, None, counted)
            self._linear(self.normed, layer["gate_up"], None, "silu_mul", self.gated)
            self._linear(self.gated, layer["down"], self.stream, None, self.stream)
        rms_norm(self.stream, self.layers[0]["norms"][0], 1e-5, None, self.normed, None, counted)
        score_head(self.normed, None, None, self.score_weight, 0.0, self.scores, None, counted)
        ids, logits, _, _, *others = self.pick.arguments
        adjust_and_pick(ids, logits, self.count, self.scores, *others, outputs=self.picked, first_row=self.first_branch)
        commit(
            self.picked.index, self.first_branch, self.row_sequence, self.row_position, self.own_key, self.own_value,
            self.normed, self.block_table, self.key_cache, self.value_cache, self.hidden_states, self.lengths,
        )  # fmt: skip
        lm_head_select(self.hidden_states, self.lm_head, *self.options, self.candidates, self.partials)

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        activation: str | None,
        output: torch.Tensor,
    ) -> None:
        # One segment at these shapes, so no workspace.
        linear(x, weight, None, None, None, None, residual, activation, output, None, self.num_rows)


def time_step(sizes: Sizes, load: Load, bandwidth: float) -> dict:
    """A joint step as one graph; bytes are those of the weights."""
    step = JointStep(sizes.shape, load, sizes.dtype)
    seconds = median_seconds([step.run])
    if not (step.scores.isfinite().all() and (step.picked.index >= 0).all()):
        raise RuntimeError("the step computed something that is not finite")
    floor = step.weight_bytes / bandwidth
    return {
        "kernel": "joint step", "sequences": load.sequences, "rows": load.rows, "prefix": load.prefix,
        "us": round(1e6 * seconds, 1), "floor us": round(1e6 * floor, 1), "% of copy": round(100 * floor / seconds, 1),
    }  # fmt: skip


def kernel_rows(sizes: Sizes, bandwidth: float) -> Iterator[dict]:
    """Of every kernel, those with targets first."""
    yield from selection_rows(sizes, bandwidth)
    yield from attention_rows(sizes, bandwidth)
    for sequences in (1, 8) if _DEVICE == "cuda" else (1,):
        for prefix in sizes.prefixes:
            width = min(32, sizes.shape.vocab_size)
            load = Load(sequences=sequences, branches=min(8, width), prefix=prefix, max_candidates=width)
            yield time_step(sizes, load, bandwidth)
            for launch in launches(_DEVICE, sizes.dtype, sizes.shape, load):
                yield time_launch(launch, load, bandwidth)


def check_kernels(sizes: Sizes) -> bool:
    """Whether kernels compute what the reference does, each row whatever the others."""
    if _DEVICE == "cuda":
        loads, many = (Load(3, 7, 333), Load(1, 1, 1)), Load(sequences=5, branches=80, prefix=700)
    else:
        loads, many = (Load(1, 2, 20, 4),), Load(sequences=2, branches=10, prefix=20)
    return run_checks(sizes.shape, loads) & run_bit_checks(sizes.shape, many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("engine", "kernels"), help="one half, for two calls")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after so many")
    parser.add_argument("--output", metavar="NAME", help="write NAME.json and NAME.md, after every figure")
    parser.add_argument("--tiny", action="store_true", help="tiny models in Triton's interpreter, without a GPU")
    arguments = parser.parse_args()
    if (_DEVICE == "cpu") != arguments.tiny:
        sys.exit("expected a CUDA device, or --tiny and none (bench/kernel_resources.py needs none either)")
    if arguments.tiny and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("--tiny: expected TRITON_INTERPRET=1 in the environment, since Triton reads it when it is imported")
    start, sizes = time.monotonic(), TINY if arguments.tiny else FULL
    torch.manual_seed(0)
    gpu = "none, Triton's interpreter" if arguments.tiny else torch.cuda.get_device_name()
    machine = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    bandwidth = copy_bandwidth(1 << 28 if _DEVICE == "cuda" else 1 << 10)
    machine["copy GB/s"] = round(bandwidth / 1e9, 1)
    results: dict[str, Any] = {"machine": machine, "checks": {}, "engine": [], "kernels": []}

    def late() -> bool:
        return time.monotonic() > start + 60 * arguments.minutes

    for name, check, rows in (
        ("engine", check_engine, lambda: EngineRows(sizes, bandwidth).run(late)),
        ("kernels", check_kernels, lambda: takewhile(lambda _: not late(), kernel_rows(sizes, bandwidth))),
    ):
        if arguments.only not in (None, name) or late():
            continue
        results["checks"][name] = "ok" if check(sizes) else "WRONG"
        print(f"{name}: {results['checks'][name]} after {time.monotonic() - start:.0f} s", flush=True)
        for row in () if arguments.checks_only else rows():
            results[name].append(row)
            print(json.dumps(row), flush=True)
            if arguments.output:
                write(results, arguments.output)
    print(markdown(results))
    sys.exit("WRONG" in results["checks"].values())


def write(results: dict[str, Any], name: str) -> None:
    """Both files."""
    Path(f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Path(f"{name}.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
