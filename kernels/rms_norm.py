"""Root-mean-square norm, weight * h / sqrt(mean(h^2) + eps), of h = x or of a residual stream h = residual + x.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. One program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.dependent_launch import dependent_launch, wait_for_predecessor

MAX_SIZE = 16384  # a row is held in registers


@triton.jit
def inverse_rms(sum_of_squares, size, eps):
    """1 / sqrt(mean + eps), correctly rounded at every step."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sum_of_squares, size * 1.0) + eps))


@triton.jit
def _rms_norm_kernel(
    x, weight, residual, num_rows, output, summed, eps, size, x_row, residual_row,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    inside = at < size
    h = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + at, mask=inside, other=0.0).to(tl.float32)
        stored = h.to(summed.dtype.element_ty)
        tl.store(summed + row * size + at, stored, mask=inside)
        h = stored.to(tl.float32)  # what later layers will read
    scale = inverse_rms(tl.sum(h * h, axis=0), size, eps)
    y = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * (h * scale)
    tl.store(output + row * size + at, y.to(output.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    output: torch.Tensor,
    summed: torch.Tensor | None,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.rms_norm` within rounding.

    Args:
        x: [R, size], size <= 16384; here and for the others float32, float16 or bfloat16, rows of any stride.
        weight: [size].
        eps: Added to the mean square.
        residual: [R, size], added to `x`, or None.
        output: [R, size], written.
        summed: [R, size], written: residual + x, whose rounded values are normalized. With `residual` only, and it may
            be `residual`.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides or device.
    """
    check_ndim("x", x, 2)
    (rows, size), device = x.shape, x.device
    check_tensor("x", x, FLOATS, (rows, size), device)
    check_range("size of x", size, 1, MAX_SIZE)
    check_tensor("weight", weight, FLOATS, (size,), device)
    if (residual is None) != (summed is None):
        raise ArgumentError("summed", "a tensor if and only if there is a residual", summed)
    if residual is not None:
        check_tensor("residual", residual, FLOATS, (rows, size), device)
        check_output("summed", summed, FLOATS, (rows, size), device)
    check_output("output", output, FLOATS, (rows, size), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows,)](
        x, weight, residual, num_rows, output, summed, eps, size, x.stride(0),
        0 if residual is None else residual.stride(0),
        BLOCK=block, num_warps=max(1, min(16, block // 512)), enable_fp_fusion=True, **dependent_launch(),
    )  # fmt: skip
