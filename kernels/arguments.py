"""Checks of the arguments of launchers. They look at shapes, dtypes, strides and devices only, so nothing waits for the
GPU and launches can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm2_fast.errors import ArgumentError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
) -> None:
    """Refuse a tensor of another dtype, shape or device, or whose last dimension is not contiguous."""
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if tensor.dtype not in dtypes or tensor.device != device:
        expected = " or ".join(_name_of(dtype) for dtype in dtypes)
        raise ArgumentError(name, f"{expected} on {device}", f"{_name_of(tensor.dtype)} on {tensor.device}")
    check_ndim(name, tensor, len(shape))
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
    if tensor.ndim > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ArgumentError(name, "a contiguous last dimension", f"strides {list(tensor.stride())}")


def check_output(
    name: str,
    tensor: torch.Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
) -> None:
    """`check_tensor` for what a kernel writes; all of it must be contiguous."""
    check_tensor(name, tensor, dtypes, shape, device)
    if not tensor.is_contiguous():
        raise ArgumentError(name, "a contiguous tensor", f"strides {list(tensor.stride())}")


def check_ndim(name: str, tensor: torch.Tensor, ndim: int) -> None:
    """Refuse a tensor that does not have `ndim` dimensions."""
    if tensor.ndim != ndim:
        raise ArgumentError(name, f"{ndim} dimension{'s' * (ndim != 1)}", f"shape {list(tensor.shape)}")


def check_range(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """Refuse a number below `minimum` or above `maximum`."""
    if value < minimum or (maximum is not None and value > maximum):
        raise ArgumentError(name, f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]", value)


def check_num_rows(num_rows: torch.Tensor | None, device: torch.device) -> None:
    """Refuse a row count that is not int32 [1] on the device; None stands for all rows."""
    if num_rows is not None:
        check_tensor("num_rows", num_rows, torch.int32, (1,), device)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
