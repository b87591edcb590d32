"""Linear layers of few rows, y = x W^T, with what usually follows fused.

At few rows the time is that of reading W, which every program streams once for its rows. All programs use the same
matrix instruction (mma.sync; Triton takes wgmma for 64 rows and more only) along the input features in the same order,
and the number of segments into which these are split depends on the shape of W alone: the bits of a row do not depend
on the number of rows. Segments are summed in their order, by the program that finishes last.

Epilogue: y /= rms; y += bias; y += B t for the rows marked by `row_adapted` (LoRA, t = A x); activation; y += residual;
norm_weight * y and y * y for the norm that reads it.

A root-mean-square norm between two products needs no kernel: W (norm_weight * h / rms) = (W (norm_weight * h)) / rms.
The product that makes h leaves norm_weight * h and sums of h * h (`WeightedRows`), the one that reads it divides.
`tl.sum` adds in an order that depends on the shape of a program, so squares are added in pairs of neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.activation import GATED, gated
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from llm2_fast.kernels.dot import dot
from llm2_fast.kernels.last_program import is_last
from llm2_fast.kernels.rms_norm import inverse_rms
from llm2_fast.kernels.row_count import row_count

_SEGMENT = 256  # the input features of a segment are a multiple of it, and it is one of every depth
_PROGRAMS = 128  # keep the GPU busy
_MAX_SEGMENTS = 8
_MAX_SQUARES = 256  # sums of squares of a row


class WeightedRows(NamedTuple):
    """Rows h on their way through a norm: weighted, not yet divided by the root of their mean square."""

    values: torch.Tensor  # [R, size], norm_weight * h
    squares: torch.Tensor  # float32 [R, _num_squares(size)], sums of h * h over as many features each

    @classmethod
    def empty(cls, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> WeightedRows:
        """For `rows` rows."""
        values = torch.empty(rows, size, dtype=dtype, device=device)
        return cls(values, torch.empty(rows, _num_squares(size), dtype=torch.float32, device=device))


def _squares_size(size: int) -> int:
    """Features of one sum of squares: 16, as a program has at least, if rows are not too long."""
    return max(16, triton.next_power_of_2(size) // _MAX_SQUARES)


def _num_squares(size: int) -> int:
    return triton.cdiv(size, _squares_size(size))


class Tiling(NamedTuple):
    """Shape of a program."""

    rows: int
    features: int  # rows of the weight
    depth: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, rows: int, weight_rows: int, dtype: torch.dtype, least_features: int) -> Tiling:
        if dtype == torch.float32:  # no matrix units: every product takes registers
            return cls(rows=16, features=max(32, least_features), depth=32, num_warps=4, num_stages=2)
        # At most 32 rows: from 64 on Triton would take another matrix instruction.
        tile_rows, features = (16, 32) if rows <= 16 else (32, 64) if rows <= 64 else (32, 128)
        features = max(features, least_features)
        row_tiles = triton.cdiv(rows, tile_rows)
        while features > least_features and triton.cdiv(weight_rows, features) * row_tiles < _PROGRAMS:
            features //= 2
        if rows > 64:
            return cls(tile_rows, features, depth=64, num_warps=4, num_stages=3)
        # Few rows live on the bytes of W in flight: at 4.3 TB/s and 0.7 us an H200 needs 23 KB for each of 132 SMs. A
        # program has 8 KB per stage and two stages less on their way than it has; few programs need more stages.
        programs = triton.cdiv(weight_rows, features) * row_tiles
        depth = max(64, min(256, 4096 // features))
        return cls(tile_rows, features, depth, num_warps=4, num_stages=6 if programs <= 2 * _PROGRAMS else 4)


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
def _sum_of_neighbours(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr):
    """[ROWS, SUMS] of [ROWS, COLUMNS]: neighbours are added until so many columns are left; powers of two."""
    for level in tl.static_range(16):
        if COLUMNS >> level > SUMS:
            left, right = tl.split(tl.reshape(x, (ROWS, COLUMNS >> (level + 1), 2)))
            x = left + right
    return x


@triton.jit
def load_squares(squares, rows, in_rows, NUM_SQUARES: tl.constexpr):
    """Those of `WeightedRows`, [ROWS, next power of two]."""
    at = tl.arange(0, triton.next_power_of_2(NUM_SQUARES))
    inside = in_rows[:, None] & (at < NUM_SQUARES)[None, :]
    return tl.load(squares + rows[:, None] * NUM_SQUARES + at[None, :], mask=inside, other=0.0)


@triton.jit
def divided_by_rms(y, squares, eps, SIZE: tl.constexpr):
    """y [ROWS, FEATURES] / sqrt(mean square + eps) of rows of SIZE features."""
    COLUMNS: tl.constexpr = squares.shape[1]
    pair = _sum_of_neighbours(squares, squares.shape[0], COLUMNS, 2) if COLUMNS > 2 else squares
    # Two numbers have one sum; without this reduction the layout of y would spread over all of the squares.
    return y * inverse_rms(tl.sum(pair, axis=1), SIZE, eps)[:, None]


@triton.jit
def _store_weighted(
    h, tile, rows, in_rows, features, in_features, norm_weight, values, squares, out_features,
    NUM_SQUARES: tl.constexpr, SQUARES_SIZE: tl.constexpr,
):  # fmt: skip
    """To `WeightedRows`."""
    weight = tl.load(norm_weight + features, mask=in_features, other=0.0).to(tl.float32)
    at = rows[:, None] * out_features + features[None, :]
    inside = in_rows[:, None] & in_features[None, :]
    tl.store(values + at, (h * weight[None, :]).to(values.dtype.element_ty), mask=inside)
    SUMS: tl.constexpr = h.shape[1] // SQUARES_SIZE
    # Not h * h, which a compiler may round once or twice, as the shape of the program has it.
    sums = _sum_of_neighbours(tl.fma(h, h, tl.zeros_like(h)), h.shape[0], h.shape[1], SUMS)
    column = tile * SUMS + tl.arange(0, SUMS)
    inside = in_rows[:, None] & (column < NUM_SQUARES)[None, :]
    tl.store(squares + rows[:, None] * NUM_SQUARES + column[None, :], sums, mask=inside)


@triton.jit
def load_early(squares, sums, rows, in_rows, ROWS: tl.constexpr, NUM_SQUARES: tl.constexpr):
    """What `updated` takes: squares that are there before they are needed, or None.

    More rows would take too many registers meanwhile, and with segments most programs need none.
    """
    early = None
    if sums is None and squares is not None and ROWS == 16:
        early = load_squares(squares, rows, in_rows, NUM_SQUARES)
    return early


@triton.jit
def updated(
    y, early_squares, rows, in_rows, weight_rows, in_weight, squares, eps, bias, lora_hidden, lora_b, row_adapted,
    rank, lora_row, lora_b_row, IN_FEATURES: tl.constexpr, RANKS: tl.constexpr, NUM_SQUARES: tl.constexpr,
):  # fmt: skip
    """A tile of sums after the division by the root mean square, the bias and the low-rank update."""
    if early_squares is not None:
        y = divided_by_rms(y, early_squares, eps, IN_FEATURES)
    elif squares is not None:
        y = divided_by_rms(y, load_squares(squares, rows, in_rows, NUM_SQUARES), eps, IN_FEATURES)
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
    return y


@triton.jit
def is_last_segment(
    y, sums, counters, tile, segment, rows, in_rows, weight_rows, in_weight, max_rows, num_weight_rows,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Leave the sums of a segment, float32 [ROWS, FEATURES]; whether they were the last ones of their tile."""
    at = (segment * max_rows + rows) * num_weight_rows
    tl.store(sums + at[:, None] + weight_rows[None, :], y, mask=in_rows[:, None] & in_weight[None, :])
    return is_last(counters + tl.program_id(0) * tl.num_programs(1) + tile, SEGMENTS)


@triton.jit
def sum_of_segments(
    sums, rows, in_rows, weight_rows, in_weight, max_rows, num_weight_rows,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, FEATURES]."""
    y = tl.zeros((ROWS, FEATURES), tl.float32)
    inside = in_rows[:, None] & in_weight[None, :]
    for segment in tl.static_range(SEGMENTS):
        at = (segment * max_rows + rows) * num_weight_rows
        y += tl.load(sums + at[:, None] + weight_rows[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    return y


@triton.jit
def _linear_kernel(
    x, weight, x_squares, eps, bias, lora_hidden, lora_b, row_adapted, residual, output, norm_weight, values, squares,
    num_rows, sums, counters, max_rows, out_features, rank, x_row, weight_row, lora_row, lora_b_row, residual_row,
    IN_FEATURES: tl.constexpr, SEGMENT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr, NUM_X_SQUARES: tl.constexpr,
    NUM_SQUARES: tl.constexpr, SQUARES_SIZE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    tile, segment = tl.program_id(1), tl.program_id(2)
    SEGMENTS: tl.constexpr = (IN_FEATURES + SEGMENT - 1) // SEGMENT
    num_weight_rows = out_features if ACTIVATION is None else 2 * out_features
    count = row_count(max_rows, num_rows)
    if tl.program_id(0) * ROWS >= count:
        return
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_rows = rows < count
    weight_rows, in_weight = _weight_rows(tile, out_features, FEATURES, ACTIVATION is not None)
    early_squares = load_early(x_squares, sums, rows, in_rows, ROWS, NUM_X_SQUARES)
    begin = segment * SEGMENT
    y = accumulate(
        x, weight, rows, in_rows, weight_rows, in_weight, begin, tl.minimum(begin + SEGMENT, IN_FEATURES),
        x_row, weight_row, ROWS, FEATURES, DEPTH,
    )  # fmt: skip
    if sums is not None:
        if not is_last_segment(
            y, sums, counters, tile, segment, rows, in_rows, weight_rows, in_weight, max_rows, num_weight_rows, SEGMENTS
        ):
            return
        y = sum_of_segments(
            sums, rows, in_rows, weight_rows, in_weight, max_rows, num_weight_rows, SEGMENTS, ROWS, FEATURES
        )
    y = updated(
        y, early_squares, rows, in_rows, weight_rows, in_weight, x_squares, eps, bias, lora_hidden, lora_b, row_adapted,
        rank, lora_row, lora_b_row, IN_FEATURES, RANKS, NUM_X_SQUARES,
    )  # fmt: skip
    if ACTIVATION is None:
        features = tile * FEATURES + tl.arange(0, FEATURES)
    else:
        gate, up = tl.split(tl.reshape(y, (ROWS, FEATURES // 2, 2)))
        y = gated(gate, up, ACTIVATION)
        features = tile * (FEATURES // 2) + tl.arange(0, FEATURES // 2)
    in_features = features < out_features
    inside = in_rows[:, None] & in_features[None, :]
    if residual is not None:
        y += tl.load(residual + rows[:, None] * residual_row + features[None, :], mask=inside, other=0.0).to(tl.float32)
    stored = y.to(output.dtype.element_ty)
    tl.store(output + rows[:, None] * out_features + features[None, :], stored, mask=inside)
    if norm_weight is not None:
        _store_weighted(
            stored.to(tl.float32), tile, rows, in_rows, features, in_features, norm_weight, values, squares,
            out_features, NUM_SQUARES, SQUARES_SIZE,
        )  # fmt: skip


def _segment_size(weight_rows: int, in_features: int) -> int:
    """Input features per segment, by the shape of the weight alone."""
    programs = triton.cdiv(weight_rows, 16)
    segments = 1 if programs >= _PROGRAMS else min(_MAX_SEGMENTS, triton.cdiv(_PROGRAMS, programs))
    return triton.cdiv(triton.cdiv(in_features, segments), _SEGMENT) * _SEGMENT


class Partial(NamedTuple):
    """Workspace: what the segments of a product leave for the program that sums them."""

    sums: torch.Tensor  # float32 [segments, R, weight rows]
    counters: torch.Tensor  # int32 [programs], zeros


def empty_partial(rows: int, weight: torch.Tensor) -> Partial | None:
    """Workspace of `linear` for `rows` rows, None if one segment holds all input features."""
    segments = triton.cdiv(weight.shape[1], _segment_size(*weight.shape))
    if segments == 1:
        return None
    sums = weight.new_empty(segments, rows, weight.shape[0], dtype=torch.float32)
    return Partial(sums, weight.new_zeros(_num_counters(rows, weight.shape[0]), dtype=torch.int32))


def _num_counters(rows: int, num_weight_rows: int) -> int:
    """One for each of the smallest tiles."""
    return triton.cdiv(rows, 16) * triton.cdiv(num_weight_rows, 16)


class Product(NamedTuple):
    """Checked arguments of a product as kernels take them."""

    rows: int
    num_weight_rows: int
    in_features: int
    dtype: torch.dtype
    rank: int  # 0 without a low-rank update
    lora_strides: tuple[int, int]
    row_adapted: torch.Tensor | None  # uint8
    partial: tuple[torch.Tensor | None, torch.Tensor | None]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_hidden: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        row_adapted: torch.Tensor | None,
        squares: torch.Tensor | None,
        partial: Partial | None,
    ) -> Product:
        """See `linear`."""
        check_ndim("x", x, 2)
        check_ndim("weight", weight, 2)
        (rows, in_features), device, dtype = x.shape, x.device, x.dtype
        num_weight_rows = weight.shape[0]
        check_tensor("x", x, FLOATS, (rows, in_features), device)
        check_tensor("weight", weight, dtype, (num_weight_rows, in_features), device)
        check_range("in_features of x", in_features, 1)
        check_range("rows of weight", num_weight_rows, 1)
        if bias is not None:
            check_tensor("bias", bias, FLOATS, (num_weight_rows,), device)
        rank = _check_lora(lora_hidden, lora_b, row_adapted, rows, num_weight_rows, dtype, device)
        if squares is not None:
            check_output("squares", squares, torch.float32, (rows, _num_squares(in_features)), device)
        segments = triton.cdiv(in_features, _segment_size(num_weight_rows, in_features))
        if segments > 1:
            if partial is None:
                raise ArgumentError("partial", f"a workspace for {segments} segments", None)
            check_output("partial.sums", partial.sums, torch.float32, (segments, rows, num_weight_rows), device)
            counters = (_num_counters(rows, num_weight_rows),)
            check_output("partial.counters", partial.counters, torch.int32, counters, device)
        return cls(
            rows, num_weight_rows, in_features, dtype, rank,
            (0, 0) if rank == 0 else (lora_hidden.stride(0), lora_b.stride(0)),
            None if row_adapted is None else row_adapted.view(torch.uint8),
            (None, None) if segments == 1 else tuple(partial),
        )  # fmt: skip

    @property
    def segment(self) -> int:
        """Input features of a segment."""
        return _segment_size(self.num_weight_rows, self.in_features)

    def tiling(self, least_features: int) -> Tiling:
        """The shape of the programs, with no fewer features each."""
        return Tiling.of(self.rows, self.num_weight_rows, self.dtype, least_features)

    def grid(self, tiling: Tiling) -> tuple[int, int, int]:
        """Row tiles, feature tiles, segments."""
        tiles = triton.cdiv(self.rows, tiling.rows), triton.cdiv(self.num_weight_rows, tiling.features)
        return *tiles, triton.cdiv(self.in_features, self.segment)

    def options(self, tiling: Tiling) -> dict[str, int]:
        """What is constant in a compiled kernel, and how to launch it."""
        return {
            "IN_FEATURES": self.in_features, "SEGMENT": self.segment, "ROWS": tiling.rows, "FEATURES": tiling.features,
            "DEPTH": tiling.depth, "RANKS": max(16, triton.next_power_of_2(self.rank)),
            "NUM_X_SQUARES": _num_squares(self.in_features), "num_warps": tiling.num_warps,
            "num_stages": tiling.num_stages, "enable_fp_fusion": True, **dependent_launch(),
        }  # fmt: skip


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
    partial: Partial | None,
    num_rows: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_weight: torch.Tensor | None = None,
    weighted: WeightedRows | None = None,
) -> None:
    """`llm2_fast.reference.linear` within rounding; a row's bits do not depend on the other rows.

    Two calls make `linear(rms_norm(linear(...), norm_weight, eps), ...)`: the first with `norm_weight` and `weighted`,
    the second with x = weighted.values and weighted.squares. What is rounded to the dtype of x is then norm_weight * h,
    not norm_weight * h / rms; in float16 it must not overflow.

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
        squares: float32, of `WeightedRows` whose values are `x`; None if x is to be multiplied as it is.
        eps: Of the norm that divides them.
        norm_weight: [out_features], any of the dtypes, of the norm of the output; with `weighted`, without activation.
        weighted: Written.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or value.
    """
    product = Product.of(x, weight, bias, lora_hidden, lora_b, row_adapted, squares, partial)
    rows, device, num_weight_rows = len(x), x.device, len(weight)
    if activation is not None and activation not in GATED:
        raise ArgumentError("activation", f"None or one of {', '.join(map(repr, GATED))}", repr(activation))
    if activation is not None and num_weight_rows % 2 != 0:
        raise ArgumentError("rows of weight", f"an even number for {activation}", num_weight_rows)
    out_features = num_weight_rows if activation is None else num_weight_rows // 2
    _check_weighted(norm_weight, weighted, activation, rows, out_features, device)
    if residual is not None:
        check_tensor("residual", residual, FLOATS, (rows, out_features), device)
    check_output("output", output, FLOATS, (rows, out_features), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    size = 16 if weighted is None else _squares_size(out_features)
    tiling = product.tiling(size)
    _linear_kernel[product.grid(tiling)](
        x, weight, squares, eps, bias, lora_hidden, lora_b, product.row_adapted, residual, output, norm_weight,
        *(weighted or (None, None)), num_rows, *product.partial, rows, out_features, product.rank,
        x.stride(0), weight.stride(0), *product.lora_strides, 0 if residual is None else residual.stride(0),
        ACTIVATION=activation, NUM_SQUARES=_num_squares(out_features), SQUARES_SIZE=size, **product.options(tiling),
    )  # fmt: skip


def _check_weighted(
    norm_weight: torch.Tensor | None,
    weighted: WeightedRows | None,
    activation: str | None,
    rows: int,
    out_features: int,
    device: torch.device,
) -> None:
    if (norm_weight is None) != (weighted is None) or (norm_weight is not None and activation is not None):
        raise ArgumentError("norm_weight and weighted", "both or none, and none with an activation", "something else")
    if weighted is None:
        return
    check_tensor("norm_weight", norm_weight, FLOATS, (out_features,), device)
    check_output("weighted.values", weighted.values, FLOATS, (rows, out_features), device)
    check_output("weighted.squares", weighted.squares, torch.float32, (rows, _num_squares(out_features)), device)


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
