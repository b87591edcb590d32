"""Records what a figure depends on beside the machine that pytest-benchmark describes."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add library versions, threads and GPU to the machine description of every result file."""
    machine_info["torch"] = torch.__version__
    machine_info["transformers"] = transformers.__version__
    machine_info["num_threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
