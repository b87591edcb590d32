"""What all tests share: no network, few threads, and a skip for tests that need a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch, transformers or hypothesis.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine down tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; 0 runs them on a GPU
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

# A shared machine makes single examples slow now and then; the timeout of pytest bounds the whole test.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu_compile` tests unless they are asked for, and `gpu` tests on machines without a CUDA device."""
    if "gpu_compile" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("gpu_compile"):
                item.add_marker(pytest.mark.skip(reason="run by make test-gpu-compile"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
