"""The CUDA sources in csrc/cuda: compiled for both architectures wherever nvcc is, run where a GPU is.

What the kernels compute is tested without either, on the emulator in tests/cuda (`make cpp-test`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90a")
NVCC = shutil.which("nvcc")

# Kernels of each source, and the registers per thread that leave room for the blocks that hide memory latency: eight of
# 256 threads where the logits are read, four where they are merged, one of 1,024 that picks.
MAX_REGISTERS = {
    "select_candidates.cu": {"reduce_chunks": 32, "merge_chunks": 64},
    "adjust_and_pick.cu": {"pick_rows": 64},
    "commit.cu": {"copy_branches": 64, "count_positions": 64},
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def run(*command: str | Path, timeout: float = 110) -> str:
    """Standard output and error of a command that must succeed."""
    completed = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert completed.returncode == 0, f"{command} exited {completed.returncode}:\n{completed.stdout}"
    return completed.stdout


def nvcc(source: str, output: Path, *options: str) -> str:
    common = ("-std=c++17", "-O3", "-Icsrc/include", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra")
    return run(NVCC, *common, *options, "-c", source, "-o", output)


@needs_nvcc
def test_every_source_is_listed() -> None:
    assert {path.name for path in (ROOT / "csrc/cuda").glob("*.cu")} == set(MAX_REGISTERS)


@needs_nvcc
@pytest.mark.parametrize("source", MAX_REGISTERS)
def test_kernels_compile_and_spill_nothing(source: str, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in ARCHITECTURES]
    report = nvcc(f"csrc/cuda/{source}", tmp_path / "object.o", *targets, "-Xptxas=-v")
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    found = set()
    for symbol, architecture, stack, stores, loads, registers in kernels:
        (name,) = [name for name in MAX_REGISTERS[source] if name in symbol]
        found.add((name, architecture))
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), symbol
        assert int(registers) <= MAX_REGISTERS[source][name], symbol
    assert found == {(name, architecture) for name in MAX_REGISTERS[source] for architecture in ARCHITECTURES}


@needs_nvcc
def test_the_program_for_the_gpu_compiles(tmp_path: Path) -> None:
    """Against CUDA's own headers; the emulator's stand in for them elsewhere."""
    nvcc("tests/cuda/test_cuda_ops.cpp", tmp_path / "object.o")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_nvcc
def test_ops_on_the_gpu(tmp_path: Path) -> None:
    options = ("-DLLM2_FAST_TESTS=ON", "-DLLM2_FAST_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
    run("cmake", "--build", tmp_path, "--target", "test_cuda_ops", timeout=500)
    assert "all checks passed" in run(tmp_path / "tests/cpp/test_cuda_ops")
