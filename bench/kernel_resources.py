"""What the Triton kernels take of a GPU: registers, local memory, shared memory. Needs no GPU.

    python bench/kernel_resources.py [--arch 90] [--dtype bfloat16] [--json]

Runs the launchers at the shapes of Llama-3.2-1B up to the point where they would start a kernel, compiles each for the
architecture, and reads the resources from the machine code with the cuobjdump that comes with Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET: expected 0 or nothing, since interpreted kernels are not compiled, got 1")

import torch
import triton
from kernel_launches import LLAMA_3_2_1B, Load, launches
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INSTRUCTIONS = r"wgmma\.mma_async|mma\.sync|\btf32|\b(?:atom|red)\.[.\w]+|griddepcontrol\.wait"
_LOADS = (Load(), Load(sequences=8), Load(sequences=64))  # 8, 64 and 512 rows


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. Bytes of local memory (spills and stack) per thread, of shared memory per program."""

    launch: str
    kernel: str
    arch: int
    dtype: str
    rows: int
    num_warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]  # matrix instructions, atomics and waits for the kernel before, in the PTX


class _NoDevice:
    """Stands for a device of an architecture. Nothing can be launched on it."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Launches compile for `arch` and are appended to the list, as (name, compiled kernel), instead of run."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_NoDevice(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resources(arch: int, dtype: str) -> Iterator[Resources]:
    """Of every kernel, once for each number of rows that it is compiled differently for."""
    seen = set()
    for load in _LOADS:
        for launch in launches("meta", DTYPES[dtype], LLAMA_3_2_1B, load):
            with compiling(arch) as compiled:
                launch.run()
            for name, kernel in compiled:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                registers, local_bytes, shared_bytes = _read_usage(kernel.asm["cubin"])
                shared_bytes += kernel.metadata.shared
                instructions = re.findall(_INSTRUCTIONS, kernel.asm["ptx"])
                yield Resources(
                    launch.name, name.strip("_"), arch, dtype, load.rows, kernel.metadata.num_warps,
                    registers, local_bytes, shared_bytes, tuple(sorted(set(instructions))),
                )  # fmt: skip


def _read_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of local memory and bytes of static shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=(80, 90), action="append", help="compute capability, times ten")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of a table")
    arguments = parser.parse_args()
    if not arguments.json:
        print("| launch | kernel | rows | sm | dtype | warps | registers | local B | shared B | instructions |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for arch in arguments.arch or (90,):
        for dtype in arguments.dtype or ("bfloat16",):
            for r in resources(arch, dtype):
                if arguments.json:
                    print(json.dumps(asdict(r)), flush=True)
                    continue
                cells = (
                    r.launch, r.kernel, r.rows, r.arch, r.dtype, r.num_warps, r.registers, r.local_bytes,
                    r.shared_bytes, ", ".join(r.instructions) or "none",
                )  # fmt: skip
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
