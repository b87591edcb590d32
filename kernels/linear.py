"""Linear layers of few rows, y = x W^T, with what usually follows fused.

At few rows the time is that of reading W, which every program streams once for its rows. All programs use the same
matrix instruction (mma.sync; Triton takes wgmma for 64 rows and more only) along the input features in the same order,
and the number of segments into which these are split depends on the shape of W alone: the bits of a row do not depend
on the number of rows. Segments are summed in their order by a second kernel.

Epilogue: y += bias; y += B t for the rows marked by `row_adapted` (LoRA, t = A x); activation; y += residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.activation import GATED, gated
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.dot import dot
from llm2_fast.kernels.row_count import row_count

_SEGMENT = 256  # the input features of a segment are a multiple of it, and it is one of every depth
_PROGRAMS = 128  # keep the GPU busy
_MAX_SEGMENTS = 8


class _Tiling(NamedTuple):
    """Shape of a program."""

    rows: int
    features: int  # rows of the weight
    depth: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, rows: int, weight_rows: int, dtype: torch.dtype) -> _Tiling:
        if dtype == torch.float32:  # no matrix units: every product takes registers
            return cls(rows=16, features=32, depth=32, num_warps=4, num_stages=2)
        # At most 32 rows: from 64 on Triton would take another matrix instruction.
        tile_rows, features = (16, 32) if rows <= 16 else (32, 64) if rows <= 64 else (32, 128)
        while features > 16 and triton.cdiv(weight_rows, features) * triton.cdiv(rows, tile_rows) < _PROGRAMS:
            features //= 2
        # Programs with few rows live on the bytes they have in flight.
        depth = 64 if rows > 16 else 128 if features > 16 else 256
        return cls(tile_rows, features, depth, num_warps=4, num_stages=4 if rows <= 64 else 3)


@triton.jit
def accumulate(
    x, weight, rows, in_rows, weight_rows, in_weight, begin, end, x_row, weight_row,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, FEATURES]: sums over the input features [begin, end)."""
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(begin, end, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        in_depth = (depth < end)[None, :]
        a = tl.load(x + rows[:, None] * x_row + depth[None, :], mask=in_rows[:, None] & in_depth, other=0.0)
        b = tl.load(
            weight + weight_rows[:, None] * weight_row + depth[None, :], mask=in_weight[:, None] & in_depth, other=0.0
        )
        total = dot(a.to(b.dtype), tl.trans(b), total)
    return total


@triton.jit
def _weight_rows(tile, out_features, FEATURES: tl.constexpr, IS_GATED: tl.constexpr):
    """Rows of the weight that a tile multiplies, and whether they exist; gate and up of a feature side by side."""
    lanes = tile * FEATURES + tl.arange(0, FEATURES)
    features = lanes // 2 if IS_GATED else lanes
    in_weight = features < out_features
    return (features + lanes % 2 * out_features if IS_GATED else lanes).to(tl.int64), in_weight


@triton.jit
def _finish(
    y, tile, rows, in_rows, weight_rows, in_weight, bias, lora_hidden, lora_b, row_adapted, residual, output,
    out_features, rank, lora_row, lora_b_row, residual_row,
    ACTIVATION: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile and its store."""
    if bias is not None:
        y += tl.load(bias + weight_rows, mask=in_weight, other=0.0).to(tl.float32)[None, :]
    if lora_hidden is not None:
        ranks = tl.arange(0, RANKS)
        in_rank = (ranks < rank)[None, :]
        t = tl.load(lora_hidden + rows[:, None] * lora_row + ranks[None, :], mask=in_rows[:, None] & in_rank, other=0.0)
        b = tl.load(
            lora_b + weight_rows[:, None] * lora_b_row + ranks[None, :], mask=in_weight[:, None] & in_rank, other=0.0
        )
        adapted = dot(t, tl.trans(b), y)
        y = tl.where((tl.load(row_adapted + rows, mask=in_rows, other=0) != 0)[:, None], adapted, y)
    if ACTIVATION is None:
        features = tile * FEATURES + tl.arange(0, FEATURES)
    else:
        gate, up = tl.split(tl.reshape(y, (y.shape[0], FEATURES // 2, 2)))
        y = gated(gate, up, ACTIVATION)
        features = tile * (FEATURES // 2) + tl.arange(0, FEATURES // 2)
    inside = in_rows[:, None] & (features < out_features)[None, :]
    if residual is not None:
        y += tl.load(residual + rows[:, None] * residual_row + features[None, :], mask=inside, other=0.0).to(tl.float32)
    at = rows[:, None] * out_features + features[None, :]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _linear_kernel(
    x, weight, bias, lora_hidden, lora_b, row_adapted, residual, num_rows, output, partial,
    max_rows, out_features, rank, x_row, weight_row, lora_row, lora_b_row, residual_row,
    IN_FEATURES: tl.constexpr, SEGMENT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    tile, segment = tl.program_id(1), tl.program_id(2)
    count = row_count(max_rows, num_rows)
    if tl.program_id(0) * ROWS >= count:
        return
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_rows = rows < count
    weight_rows, in_weight = _weight_rows(tile, out_features, FEATURES, ACTIVATION is not None)
    begin = segment * SEGMENT
    y = accumulate(
        x, weight, rows, in_rows, weight_rows, in_weight, begin, tl.minimum(begin + SEGMENT, IN_FEATURES),
        x_row, weight_row, ROWS, FEATURES, DEPTH,
    )  # fmt: skip
    if partial is None:
        _finish(
            y, tile, rows, in_rows, weight_rows, in_weight, bias, lora_hidden, lora_b, row_adapted, residual, output,
            out_features, rank, lora_row, lora_b_row, residual_row, ACTIVATION, FEATURES, RANKS,
        )  # fmt: skip
    else:
        num_weight_rows = out_features if ACTIVATION is None else 2 * out_features
        at = (segment * max_rows + rows) * num_weight_rows
        tl.store(partial + at[:, None] + weight_rows[None, :], y, mask=in_rows[:, None] & in_weight[None, :])


@triton.jit
def _sum_kernel(
    partial, bias, lora_hidden, lora_b, row_adapted, residual, num_rows, output,
    max_rows, out_features, rank, lora_row, lora_b_row, residual_row,
    SEGMENTS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    count = row_count(max_rows, num_rows)
    if tl.program_id(0) * ROWS >= count:
        return
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_rows = rows < count
    weight_rows, in_weight = _weight_rows(tile, out_features, FEATURES, ACTIVATION is not None)
    num_weight_rows = out_features if ACTIVATION is None else 2 * out_features
    y = tl.zeros((ROWS, FEATURES), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        at = (segment * max_rows + rows) * num_weight_rows
        inside = in_rows[:, None] & in_weight[None, :]
        y += tl.load(partial + at[:, None] + weight_rows[None, :], mask=inside, other=0.0)
    _finish(
        y, tile, rows, in_rows, weight_rows, in_weight, bias, lora_hidden, lora_b, row_adapted, residual, output,
        out_features, rank, lora_row, lora_b_row, residual_row, ACTIVATION, FEATURES, RANKS,
    )  # fmt: skip


def _segment_size(weight_rows: int, in_features: int) -> int:
    """Input features per segment, by the shape of the weight alone."""
    programs = triton.cdiv(weight_rows, 16)
    segments = 1 if programs >= _PROGRAMS else min(_MAX_SEGMENTS, triton.cdiv(_PROGRAMS, programs))
    return triton.cdiv(triton.cdiv(in_features, segments), _SEGMENT) * _SEGMENT


def empty_partial(rows: int, weight: torch.Tensor) -> torch.Tensor | None:
    """Workspace of `linear` for `rows` rows: float32 [segments, R, weight rows], None if one segment holds them all."""
    segments = triton.cdiv(weight.shape[1], _segment_size(*weight.shape))
    return None if segments == 1 else weight.new_empty(segments, rows, weight.shape[0], dtype=torch.float32)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_hidden: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    row_adapted: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    output: torch.Tensor,
    partial: torch.Tensor | None,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.linear` within rounding; a row's bits do not depend on the other rows.

    Args:
        x: [R, in_features], float32, float16 or bfloat16. Here and in all matrices rows may have any stride.
        weight: [N, in_features], dtype of `x`; with an activation N is twice the output features, first all gates.
        bias: [N], any of the dtypes, or None.
        lora_hidden: [R, r], dtype of `x`: A x; or None, and then `lora_b` and `row_adapted` too.
        lora_b: [N, r], dtype of `x`, scaling included.
        row_adapted: bool [R], the rows to update.
        residual: [R, out_features], any of the dtypes, or None. It may be `output`.
        activation: None, "silu_mul" or "gelu_tanh_mul".
        output: [R, out_features], any of the dtypes, written.
        partial: Workspace, see `empty_partial`.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or value.
    """
    check_ndim("x", x, 2)
    check_ndim("weight", weight, 2)
    (rows, in_features), device, dtype = x.shape, x.device, x.dtype
    num_weight_rows = weight.shape[0]
    check_tensor("x", x, FLOATS, (rows, in_features), device)
    check_tensor("weight", weight, dtype, (num_weight_rows, in_features), device)
    check_range("in_features of x", in_features, 1)
    check_range("rows of weight", num_weight_rows, 1)
    if activation is not None and activation not in GATED:
        raise ArgumentError("activation", f"None or one of {', '.join(map(repr, GATED))}", repr(activation))
    if activation is not None and num_weight_rows % 2 != 0:
        raise ArgumentError("rows of weight", f"an even number for {activation}", num_weight_rows)
    out_features = num_weight_rows if activation is None else num_weight_rows // 2
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (num_weight_rows,), device)
    rank = _check_lora(lora_hidden, lora_b, row_adapted, rows, num_weight_rows, dtype, device)
    if residual is not None:
        check_tensor("residual", residual, FLOATS, (rows, out_features), device)
    check_output("output", output, FLOATS, (rows, out_features), device)
    segment = _segment_size(num_weight_rows, in_features)
    segments = triton.cdiv(in_features, segment)
    if segments > 1:
        if partial is None:
            raise ArgumentError("partial", f"a workspace for {segments} segments", None)
        check_output("partial", partial, torch.float32, (segments, rows, num_weight_rows), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    tiling = _Tiling.of(rows, num_weight_rows, dtype)
    epilogue = (bias, lora_hidden, lora_b, None if row_adapted is None else row_adapted.view(torch.uint8), residual)
    lora_strides = (0, 0) if lora_hidden is None else (lora_hidden.stride(0), lora_b.stride(0))
    strides = (*lora_strides, 0 if residual is None else residual.stride(0))
    ranks = max(16, triton.next_power_of_2(rank))
    row_tiles, feature_tiles = triton.cdiv(rows, tiling.rows), triton.cdiv(num_weight_rows, tiling.features)
    _linear_kernel[(row_tiles, feature_tiles, segments)](
        x, weight, *epilogue, num_rows, output, partial if segments > 1 else None,
        rows, out_features, rank, x.stride(0), weight.stride(0), *strides,
        IN_FEATURES=in_features, SEGMENT=segment, ACTIVATION=activation, ROWS=tiling.rows, FEATURES=tiling.features,
        DEPTH=tiling.depth, RANKS=ranks, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    if segments > 1:
        _sum_kernel[(triton.cdiv(rows, 16), triton.cdiv(num_weight_rows, 32))](
            partial, *epilogue, num_rows, output, rows, out_features, rank, *strides,
            SEGMENTS=segments, ACTIVATION=activation, ROWS=16, FEATURES=32, RANKS=ranks, enable_fp_fusion=True,
        )  # fmt: skip


def _check_lora(
    lora_hidden: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    row_adapted: torch.Tensor | None,
    rows: int,
    num_weight_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The rank of the update; 0 without one."""
    given = [
        name
        for name, x in (("lora_hidden", lora_hidden), ("lora_b", lora_b), ("row_adapted", row_adapted))
        if x is not None
    ]
    if not given:
        return 0
    if len(given) < 3:
        raise ArgumentError("lora_hidden, lora_b, row_adapted", "all or none", f"only {', '.join(given)}")
    check_ndim("lora_hidden", lora_hidden, 2)
    rank = lora_hidden.shape[1]
    check_range("rank of lora_hidden", rank, 1, 512)
    check_tensor("lora_hidden", lora_hidden, dtype, (rows, rank), device)
    check_tensor("lora_b", lora_b, dtype, (num_weight_rows, rank), device)
    check_tensor("row_adapted", row_adapted, torch.bool, (rows,), device)
    return rank
