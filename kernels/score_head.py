"""Verifier scores: w . h + b, or w . silu(W h + c) + b with a hidden layer, in float32.

The first kernel computes the hidden layer in tiles of rows and units; the second one dot product per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.linear import accumulate
from llm2_fast.kernels.row_count import row_count

_BLOCK = 1024


@triton.jit
def _units_kernel(
    hidden_states, dense_weight, dense_bias, num_rows, units, max_rows, num_units, num_features, hidden_row, dense_row,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    count = row_count(max_rows, num_rows)
    if tl.program_id(0) * ROWS >= count:
        return
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS)).to(tl.int64)
    in_rows, in_units = rows < count, unit < num_units
    y = accumulate(
        hidden_states, dense_weight, rows, in_rows, unit, in_units, 0, num_features, hidden_row, dense_row,
        ROWS, UNITS, DEPTH,
    )  # fmt: skip
    y += tl.load(dense_bias + unit, mask=in_units, other=0.0)[None, :]
    inside = in_rows[:, None] & in_units[None, :]
    tl.store(units + rows[:, None] * num_units + unit[None, :], y * tl.sigmoid(y), mask=inside)


@triton.jit
def _score_kernel(x, score_weight, num_rows, scores, score_bias, num_features, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_features
        h = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
        products += h * tl.load(score_weight + at, mask=inside, other=0.0)
    tl.store(scores + row, tl.sum(products, axis=0) + score_bias)


def score_head(
    hidden_states: torch.Tensor,
    dense_weight: torch.Tensor | None,
    dense_bias: torch.Tensor | None,
    score_weight: torch.Tensor,
    score_bias: float,
    scores: torch.Tensor,
    units: torch.Tensor | None,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.score_head` within rounding; a row's bits do not depend on the other rows.

    Args:
        hidden_states: [R, features], float32, float16 or bfloat16, rows of any stride; of several layers concatenated.
        dense_weight: float32 [M, features], or None for a linear head.
        dense_bias: float32 [M], with `dense_weight`.
        score_weight: float32 [M], or [features] of a linear head.
        score_bias: Added to every score.
        scores: float32 [R], written.
        units: float32 [R, M], workspace, with `dense_weight`.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides or device.
    """
    check_ndim("hidden_states", hidden_states, 2)
    (rows, features), device = hidden_states.shape, hidden_states.device
    check_tensor("hidden_states", hidden_states, FLOATS, (rows, features), device)
    check_range("columns of hidden_states", features, 1)
    num_inputs = features
    if dense_weight is not None:
        if dense_bias is None or units is None:
            raise ArgumentError("dense_bias and units", "tensors, as there is a dense_weight", None)
        check_ndim("dense_weight", dense_weight, 2)
        num_inputs = dense_weight.shape[0]
        check_tensor("dense_weight", dense_weight, torch.float32, (num_inputs, features), device)
        check_tensor("dense_bias", dense_bias, torch.float32, (num_inputs,), device)
        check_output("units", units, torch.float32, (rows, num_inputs), device)
    check_tensor("score_weight", score_weight, torch.float32, (num_inputs,), device)
    check_output("scores", scores, torch.float32, (rows,), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    inputs = hidden_states
    if dense_weight is not None:
        _units_kernel[(triton.cdiv(rows, 16), triton.cdiv(num_inputs, 32))](
            hidden_states, dense_weight, dense_bias, num_rows, units, rows, num_inputs, features,
            hidden_states.stride(0), dense_weight.stride(0), ROWS=16, UNITS=32, DEPTH=32, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
        inputs = units
    _score_kernel[(rows,)](
        inputs, score_weight, num_rows, scores, score_bias, num_inputs, inputs.stride(0), BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip
