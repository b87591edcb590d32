"""The projection of a layer to queries, keys and values as one kernel with what follows it: `linear`, then
`rope_and_store` without norms of heads.

A program takes rows of the weight in pairs that are rotated together, i and i + D/2 of a head, side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import check_num_rows
from llm2_fast.kernels.dependent_launch import wait_for_predecessor
from llm2_fast.kernels.linear import (
    Partial,
    Product,
    accumulate,
    is_last_segment,
    load_early,
    sum_of_segments,
    updated,
)
from llm2_fast.kernels.rope_and_store import check_heads
from llm2_fast.kernels.row_count import row_count


@triton.jit
def _store_pairs(target, at, first, second, mask, HALF: tl.constexpr):
    """To both halves of a head."""
    tl.store(target + at, first.to(target.dtype.element_ty), mask=mask)
    tl.store(target + at + HALF, second.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _project_kernel(
    x, weight, squares, eps, bias, lora_hidden, lora_b, row_adapted, sums, counters, num_rows,
    cosine, sine, block_table, row_sequence, row_position, row_stored,
    query, own_key, own_value, key_cache, value_cache, max_rows, rank, num_heads, num_kv_heads,
    x_row, weight_row, lora_row, lora_b_row, table_row,
    key_block, key_head, key_position, value_block, value_head, value_position,
    IN_FEATURES: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    DEPTH: tl.constexpr, RANKS: tl.constexpr, NUM_X_SQUARES: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    tile, segment = tl.program_id(1), tl.program_id(2)
    SEGMENTS: tl.constexpr = (IN_FEATURES + SEGMENT - 1) // SEGMENT
    count = row_count(max_rows, num_rows)
    if tl.program_id(0) * ROWS >= count:
        return
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_rows = rows < count
    lanes = tile * FEATURES + tl.arange(0, FEATURES)
    num_weight_rows = (num_heads + 2 * num_kv_heads) * 2 * HALF
    in_weight = lanes < num_weight_rows
    weight_rows = (lanes // 2 // HALF * 2 * HALF + lanes // 2 % HALF + lanes % 2 * HALF).to(tl.int64)

    early_squares = load_early(squares, sums, rows, in_rows, ROWS, NUM_X_SQUARES)
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
        y, early_squares, rows, in_rows, weight_rows, in_weight, squares, eps, bias, lora_hidden, lora_b, row_adapted,
        rank, lora_row, lora_b_row, IN_FEATURES, RANKS, NUM_X_SQUARES,
    )  # fmt: skip

    first, second = tl.split(tl.reshape(y, (ROWS, FEATURES // 2, 2)))
    pairs = tile * (FEATURES // 2) + tl.arange(0, FEATURES // 2)
    head, angle = pairs // HALF, pairs % HALF
    is_query, is_key = head < num_heads, (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    rotates = in_rows[:, None] & (is_query | is_key)[None, :]
    at = rows[:, None] * HALF + angle[None, :]
    c = tl.load(cosine + at, mask=rotates, other=1.0)
    s = tl.load(sine + at, mask=rotates, other=0.0)
    keeps = is_value[None, :]
    first, second = (
        tl.where(keeps, first, first * c - second * s),
        tl.where(keeps, second, second * c + first * s),
    )
    key = tl.where(is_key, head - num_heads, 0)
    value = tl.where(is_value, head - num_heads - num_kv_heads, 0)
    at = (rows[:, None] * num_heads + head[None, :]) * (2 * HALF) + angle[None, :]
    _store_pairs(query, at, first, second, in_rows[:, None] & is_query[None, :], HALF)
    at = (rows[:, None] * num_kv_heads + key[None, :]) * (2 * HALF) + angle[None, :]
    _store_pairs(own_key, at, first, second, in_rows[:, None] & is_key[None, :], HALF)
    at = (rows[:, None] * num_kv_heads + value[None, :]) * (2 * HALF) + angle[None, :]
    _store_pairs(own_value, at, first, second, in_rows[:, None] & is_value[None, :], HALF)

    stored = in_rows & (tl.load(row_stored + rows, mask=in_rows, other=0) != 0)
    position = tl.load(row_position + rows, mask=stored, other=0)
    sequence = tl.load(row_sequence + rows, mask=stored, other=0).to(tl.int64)
    block = tl.load(block_table + sequence * table_row + position // BLOCK_SIZE, mask=stored, other=0).to(tl.int64)
    inner = (position % BLOCK_SIZE).to(tl.int64)
    at = (block * key_block + inner * key_position)[:, None] + (key.to(tl.int64) * key_head + angle)[None, :]
    _store_pairs(key_cache, at, first, second, stored[:, None] & is_key[None, :], HALF)
    at = (block * value_block + inner * value_position)[:, None] + (value.to(tl.int64) * value_head + angle)[None, :]
    _store_pairs(value_cache, at, first, second, stored[:, None] & is_value[None, :], HALF)


def project_heads(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_hidden: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    row_adapted: torch.Tensor | None,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_sequence: torch.Tensor,
    row_position: torch.Tensor,
    row_stored: torch.Tensor,
    query: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    partial: Partial | None,
    num_rows: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`linear` to float32 and `rope_and_store` of that, within rounding; a row's bits do not depend on the other rows.

    Indices are trusted: sequences, positions and blocks out of range write to foreign memory.

    Args:
        x, weight, bias, lora_hidden, lora_b, row_adapted, partial, squares, eps: As for `linear`.
        cosine, sine: float32 [R, head_dim / 2], of each row's position, scaled.
        key_cache, value_cache, block_table, row_sequence, row_position, row_stored: As for `rope_and_store`.
        query, own_key, own_value: Written, as by `rope_and_store`.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or value.
    """
    product = Product.of(x, weight, bias, lora_hidden, lora_b, row_adapted, squares, partial)
    check_heads(
        len(x), len(weight), cosine, sine, key_cache, value_cache, block_table, row_sequence, row_position, row_stored,
        query, own_key, own_value,
    )  # fmt: skip
    check_num_rows(num_rows, x.device)
    if len(x) == 0:
        return
    _, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    tiling = product.tiling(16)
    _project_kernel[product.grid(tiling)](
        x, weight, squares, eps, bias, lora_hidden, lora_b, product.row_adapted, *product.partial, num_rows,
        cosine, sine, block_table, row_sequence, row_position, row_stored.view(torch.uint8),
        query, own_key, own_value, key_cache, value_cache, len(x), product.rank, num_heads, num_kv_heads,
        x.stride(0), weight.stride(0), *product.lora_strides, block_table.stride(0),
        *key_cache.stride()[:3], *value_cache.stride()[:3],
        HALF=head_dim // 2, BLOCK_SIZE=block_size, **product.options(tiling),
    )  # fmt: skip
