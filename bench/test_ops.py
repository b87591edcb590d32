"""Each op on the CPU, the C++ extension beside the torch reference.

`extra_info` holds the bytes the op has to read and write and the rate that follows from the fastest round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm2_fast import ops, reference

BACKENDS = {"c++": ops, "reference": reference}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The C++ ops run on one thread, so the reference does, too."""
    # A fallback to the reference would be measured under the wrong name.
    assert ops.cpu_extension() is not None, ops.cpu_extension_problem()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(benchmark: Any, function: Callable, arguments: tuple, moved: int) -> None:
    """Run `function` for about a third of a second and record `moved` bytes per call."""
    benchmark.extra_info |= {"isa": ops.cpu_extension().cpu_isa(), "threads": 1, "bytes": moved}
    benchmark.pedantic(function, arguments, rounds=rounds(function, arguments), warmup_rounds=2)
    if benchmark.stats is not None:  # not with --benchmark-disable
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.min / 1e9, 3)


def rounds(function: Callable, arguments: tuple) -> int:
    """Calls that take about a third of a second, from 3 to 1,000."""
    function(*arguments)
    start = time.perf_counter()
    function(*arguments)
    return max(3, min(1000, int(0.3 / (time.perf_counter() - start))))


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "vocab"), [(1, 49_152), (8, 49_152), (8, 128_256)])
def test_select_candidates(benchmark: Any, backend: str, dtype: str, batch: int, vocab: int) -> None:
    benchmark.group = f"select_candidates {dtype} B={batch} V={vocab}"
    logits = (torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(DTYPES[dtype])
    arguments = logits, torch.full((batch,), -2.3026), torch.zeros(batch, dtype=torch.int32), 32
    measure(benchmark, BACKENDS[backend].select_candidates, arguments, size(logits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "width", "options"),
    [
        (8, 32, {"temperature": 0.0}),
        (8, 32, {"temperature": 0.8, "top_p": 0.9}),
        (8, 49_152, {"temperature": 0.0}),
        (8, 49_152, {"temperature": 0.8}),
        (8, 49_152, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
        (8, 49_152, {"temperature": 0.8, "top_p": 0.9}),
    ],
    ids=str,
)
def test_adjust_and_pick(benchmark: Any, backend: str, batch: int, width: int, options: dict[str, float]) -> None:
    """Scored candidates, and plain decoding over a whole vocabulary."""
    described = " ".join(f"{name}={value}" for name, value in options.items())
    benchmark.group = f"adjust_and_pick B={batch} K={width} {described}"
    generator = torch.Generator().manual_seed(0)

    def column(name: str, default: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((batch,), options.get(name, default), dtype=dtype)

    ids = torch.arange(width, dtype=torch.int32).expand(batch, width)
    logits = torch.randn(batch, width, generator=generator) * 3
    scores = torch.randn(batch, width, generator=generator) if width <= 32 else None
    zeros = torch.zeros(batch, dtype=torch.int32)
    arguments = (
        ids,
        logits,
        torch.full((batch,), width, dtype=torch.int32),
        scores,
        column("beta", 0.25),
        None,
        column("repetition_penalty", 1.0),
        column("temperature", 1.0),
        column("top_k", 0, torch.int32),
        column("top_p", 1.0),
        column("log_min_p", float("-inf")),
        torch.zeros(batch, dtype=torch.int64),
        zeros,
        zeros,
        zeros,
        torch.full((batch, 1), 2, dtype=torch.int32),
    )
    # The adjusted logits are written, too.
    moved = size(ids, logits, logits) + (size(scores) if scores is not None else 0)
    measure(benchmark, BACKENDS[backend].adjust_and_pick, arguments, moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branches", [1, 4, 16])
def test_branch_attention(benchmark: Any, backend: str, dtype: str, branches: int) -> None:
    """The branches of one sequence, 9 query heads over 3 key/value heads of 64, a prefix of 1,024 positions."""
    prefix, num_heads, num_kv_heads, head_dim, block_size = 1024, 9, 3, 64, 16
    benchmark.group = f"branch_attention {dtype} R={branches} prefix={prefix}"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    blocks = prefix // block_size
    keys, values = (random(blocks, num_kv_heads, block_size, head_dim) for _ in range(2))
    arguments = (
        random(branches, num_heads, head_dim),
        keys,
        values,
        torch.randperm(blocks, generator=generator).int().unsqueeze(0),
        torch.zeros(branches, dtype=torch.int32),
        torch.full((branches,), prefix, dtype=torch.int32),
        torch.ones(branches, dtype=torch.bool),
        random(branches, num_kv_heads, head_dim),
        random(branches, num_kv_heads, head_dim),
        head_dim**-0.5,
        0,
    )
    # The prefix once for all branches, whatever an implementation does.
    measure(benchmark, BACKENDS[backend].branch_attention, arguments, size(keys, values))
