"""Where the Triton kernels run in the tests: in Triton's interpreter, or with TRITON_INTERPRET=0 on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def run(op: Callable[..., Any], arguments: Iterable[Any]) -> Any:
    """Outputs on the CPU of `op` on arguments moved to where the kernels run."""
    moved = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
    return to_cpu(op(*moved))


def to_cpu(outputs: Any) -> Any:
    """A tensor, or a tuple of tensors, on the CPU."""
    if isinstance(outputs, torch.Tensor):
        return outputs.cpu()
    fields = map(to_cpu, outputs)
    return type(outputs)(*fields) if hasattr(outputs, "_fields") else tuple(fields)
