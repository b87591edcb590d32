"""Gated activations, silu(gate) * up and gelu_tanh(gate) * up, of [gate, up] (Shazeer, "GLU Variants", 2020)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.activation import GATED, gated
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_tensor

_BLOCK = 1024


@triton.jit
def _gated_kernel(x, num_rows, output, size, x_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * size + at, gated(gate, up, ACTIVATION).to(output.dtype.element_ty), mask=inside)


def gated_activation(
    x: torch.Tensor, activation: str, output: torch.Tensor, num_rows: torch.Tensor | None = None
) -> None:
    """`llm2_fast.reference.silu_mul` or `gelu_tanh_mul` within rounding.

    Args:
        x: [R, 2 * size], float32, float16 or bfloat16: gates, then what they gate; rows of any stride.
        activation: "silu_mul" or "gelu_tanh_mul".
        output: [R, size], any of the dtypes, written.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or value.
    """
    if activation not in GATED:
        raise ArgumentError("activation", f"one of {', '.join(map(repr, GATED))}", repr(activation))
    check_ndim("x", x, 2)
    (rows, width), device = x.shape, x.device
    if width % 2 != 0 or width == 0:
        raise ArgumentError("columns of x", "an even number > 0", width)
    check_tensor("x", x, FLOATS, (rows, width), device)
    check_output("output", output, FLOATS, (rows, width // 2), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    _gated_kernel[(rows, triton.cdiv(width // 2, _BLOCK))](
        x, num_rows, output, width // 2, x.stride(0), ACTIVATION=activation, BLOCK=_BLOCK, enable_fp_fusion=True
    )
