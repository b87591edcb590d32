"""The Triton kernels compiled for GPUs that are not here: matrix instructions, registers, spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # per program, at most
# Per thread, of kernels that hold a tile of results; the others need few.
MOST_REGISTERS = {
    "attention_kernel": 255,
    "linear_kernel": 192,
    "project_kernel": 192,
    "merge_kernel": 112,
    "units_kernel": 112,
}
OTHER_REGISTERS = 96
DOTS = {"attention_kernel", "lm_head_kernel", "linear_kernel", "project_kernel"}
DEPENDENT = {"attention_kernel", "linear_kernel", "project_kernel", "rope_kernel", "rms_norm_kernel"}  # of layers
WAITING = "griddepcontrol.wait"
COUNTING = {"atom.global.gpu.acq_rel.add.u32"}  # by which the last program knows that it is

pytestmark = pytest.mark.timeout(600)


def compile_all(arch: int, dtype: str, cache: Path) -> list[dict]:
    """Resources of every kernel at the shapes of Llama-3.2-1B, in an interpreter that compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, ROOT / "bench" / "kernel_resources.py", "--json", f"--arch={arch}", f"--dtype={dtype}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        (90, "bfloat16"),
        (80, "float32"),
        pytest.param(90, "float32", marks=pytest.mark.gpu_compile),
        pytest.param(90, "float16", marks=pytest.mark.gpu_compile),
        pytest.param(80, "bfloat16", marks=pytest.mark.gpu_compile),
        pytest.param(80, "float16", marks=pytest.mark.gpu_compile),
    ],
)
def test_resources(arch: int, dtype: str, tmp_path: Path) -> None:
    compiled = compile_all(arch, dtype, tmp_path)
    every = set().union(*({kernel["launch"].split()[0]} for kernel in compiled))
    assert every >= {"select_candidates", "adjust_and_pick", "branch_attention", "linear", "commit", "pairwise_loss"}
    for kernel in compiled:
        assert kernel["local_bytes"] == 0, kernel  # neither spills nor stack
        assert kernel["registers"] <= MOST_REGISTERS.get(kernel["kernel"], OTHER_REGISTERS), kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES[arch], kernel
        # Matrix units for the dots of 16 bits, full precision (no tf32) for those of 32, and no sums by atomics.
        instructions = set(kernel["instructions"]) - COUNTING - {WAITING}
        assert (WAITING in kernel["instructions"]) == (arch >= 90 and kernel["kernel"] in DEPENDENT), kernel
        is_dot = kernel["kernel"] in DOTS
        allowed = {"mma.sync", "wgmma.mma_async"} if is_dot and dtype != "float32" else set()
        assert instructions <= allowed, kernel
        assert bool(instructions) == bool(allowed), kernel
        # The bits of a row must not depend on how many rows there are, so on the shape of the programs.
        if kernel["kernel"] in ("linear_kernel", "project_kernel") and dtype != "float32":
            assert instructions == {"mma.sync"}, kernel
