"""What decode benchmarks share: the memory-bandwidth floor, the figures of each, and one closing table."""

from __future__ import annotations

import mmap
import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2_fast import ops

_BUFFER_BYTES = 1 << 30  # larger than any last-level cache
_READS = 5


@dataclass(frozen=True)
class Workload:
    """What one round of a decode benchmark does.

    Attributes:
        steps: Decoding steps, each of which has to read the model's weights once.
        tokens: Tokens generated, of all sequences.
        prompt_tokens: Tokens of the prompts, whose prefill is part of the time.
        weight_bytes: Of the LLM.
        verifier_bytes: Of weights that the verifier has besides the LLM's.
    """

    steps: int
    tokens: int
    prompt_tokens: int
    weight_bytes: int
    verifier_bytes: int


_rows: list[dict[str, Any]] = []


@cache
def read_bandwidth() -> float:
    """`measure_read_bandwidth`, once per process."""
    return measure_read_bandwidth()


def measure_read_bandwidth() -> float:
    """Bytes per second at which this process reads a buffer larger than the last-level cache; best of five.

    Where the system has large pages the buffer is in them, which can be read a third faster than pages of 4 KiB.
    """
    memory = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    seconds = []
    for _ in range(_READS):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return _BUFFER_BYTES / min(seconds)


def describe_machine() -> str:
    """Processor, instruction-set tier and version of torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} x {names[0]}" if names else platform.processor()
    return f"{processor}, {ops.cpu_extension().cpu_isa()}, torch {torch.__version__}"


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def record(benchmark: Any, workload: Workload, **facts: Any) -> None:
    """Add the figures of the median round and `facts` to `extra_info` and to the closing table."""
    benchmark.extra_info |= vars(workload) | facts
    if benchmark.stats is None:  # with --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    bandwidth = workload.weight_bytes * workload.steps / seconds
    benchmark.extra_info |= {
        "tokens/s": round(workload.tokens / seconds, 2),
        "ms/step": round(1e3 * seconds / workload.steps, 2),
        "GB/s": round(bandwidth / 1e9, 2),
        "read GB/s": round(read_bandwidth() / 1e9, 2),
        "% of floor": round(100 * bandwidth / read_bandwidth(), 1),
    }
    _rows.append(benchmark.extra_info)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The closing table: every decode benchmark of this run."""
    if not _rows:
        return
    columns = ("decoder", "verifier", "batch", "tokens/s", "ms/step", "GB/s", "% of floor", "mean |C|")
    lines = [columns, *(tuple(str(row.get(name, "-")) for name in columns) for row in _rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    write = terminalreporter.write_line
    write("")
    for line in lines:
        text = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        write("  ".join([*text, *(cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))]))
    write(
        f"GB/s: one sweep over the LLM's {_rows[0]['weight_bytes'] / 1e6:.0f} MB of weights per step. "
        f"Floor: reading them at {read_bandwidth() / 1e9:.1f} GB/s, measured in this process with "
        f"{torch.get_num_threads()} threads."
    )
