"""Attention of rows to the paged prefix of their sequence and to themselves, split over the prefix.

A program takes a tile of rows of one sequence (`row_tiles`) with all query heads of one key/value head, as one matrix
of queries, so the prefix is read once for all of them. It covers every 16th chunk of 64 positions (32 in float32),
counted from position 0, with an online softmax; the program of chunk 0 begins with the rows' own keys and values. The
one that finishes last merges the 16 parts in their order by their log-sum-exp. Exponentials and logarithms have base 2.
What a row's result is made of, and in which order, depends on its own positions only, never on the other rows of the
call.

Sources: Dao et al., "FlashAttention", 2022; Juravsky et al., "Hydragen", 2024, for the shared prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_output, check_range, check_tensor
from llm2_fast.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from llm2_fast.kernels.dot import dot
from llm2_fast.kernels.last_program import is_last

NUM_SPLITS = 16


class _Tiling(NamedTuple):
    """Shape of a program, by head size and dtype alone."""

    queries: int
    chunk: int
    num_warps: int

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> _Tiling:
        if dtype == torch.float32:  # no matrix units: every product takes registers
            return cls(queries=16, chunk=32, num_warps=8)
        if head_dim <= 64:
            return cls(queries=64, chunk=64, num_warps=4)
        return cls(queries=64 if head_dim <= 128 else 32, chunk=64, num_warps=8)


class Workspace(NamedTuple):
    """What the parts of a row leave for the merge."""

    output: torch.Tensor  # float32 [R, num_heads, NUM_SPLITS, head_dim]
    logsumexp: torch.Tensor  # float32 [R, num_heads, NUM_SPLITS], base 2
    counters: torch.Tensor  # int32 [R, num_heads], zeros; enough for every row tile and key/value head

    @classmethod
    def empty(cls, rows: int, num_heads: int, head_dim: int, device: torch.device) -> Workspace:
        """For `rows` rows."""
        return cls(
            torch.empty(rows, num_heads, NUM_SPLITS, head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, num_heads, NUM_SPLITS, dtype=torch.float32, device=device),
            torch.zeros(rows, num_heads, dtype=torch.int32, device=device),
        )


@triton.jit
def _visible_range(rows, exists, row_prefix_length, row_has_own, sliding_window):
    """First visible position, length of the prefix, and whether there is an own key; 0 and False if not `exists`."""
    length = tl.load(row_prefix_length + rows, mask=exists, other=0)
    has_own = tl.load(row_has_own + rows, mask=exists, other=0) != 0
    position = tl.where(has_own, length, length - 1)
    start = tl.where(sliding_window > 0, tl.maximum(position - sliding_window + 1, 0), 0)
    return start, length, has_own


@triton.jit
def _chunk_of_split(first_chunk, split, NUM_SPLITS: tl.constexpr):
    """The first chunk from `first_chunk` on that belongs to a split."""
    return first_chunk + (split - first_chunk % NUM_SPLITS + NUM_SPLITS) % NUM_SPLITS


@triton.jit
def _merge(
    rows, heads, exists, start, length, has_own, parts, logsumexp, output, num_heads,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, QUERIES: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The result of every row from the splits that hold a chunk of it; others may not have written their part."""
    sees_prefix, first_chunk = start < length, start // CHUNK
    at = (rows * num_heads + heads) * NUM_SPLITS
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        written = sees_prefix & (_chunk_of_split(first_chunk, split, NUM_SPLITS) * CHUNK < length)
        written = exists & (written | (split == 0))
        lse = tl.load(logsumexp + at + split, mask=written, other=float("-inf"), cache_modifier=".cg")
        maximum = tl.maximum(maximum, lse)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    dims = tl.arange(0, DIMS)
    in_head = dims < HEAD_DIM
    total, merged = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, DIMS), tl.float32)
    for split in tl.range(NUM_SPLITS, num_stages=4):  # several parts on their way
        written = sees_prefix & (_chunk_of_split(first_chunk, split, NUM_SPLITS) * CHUNK < length)
        written = exists & (written | (split == 0))
        lse = tl.load(logsumexp + at + split, mask=written, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(lse - base)
        part = tl.load(
            parts + (at + split)[:, None] * HEAD_DIM + dims[None, :], mask=written[:, None] & in_head[None, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        total += weight
        merged += weight[:, None] * part
    merged = tl.where((sees_prefix | has_own)[:, None], merged / total[:, None], 0.0)
    target = output + (rows * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(target, merged.to(output.dtype.element_ty), mask=exists[:, None] & in_head[None, :])


@triton.jit
def _attention_kernel(
    query, key_cache, value_cache, block_table, row_sequence, row_prefix_length, row_has_own, own_key, own_value,
    first_row, parts, logsumexp, counters, output, scale, sliding_window, num_heads,
    query_row, query_head, key_block, key_head, key_position, value_block, value_head, value_position, table_row,
    own_key_row, own_key_head, own_value_row, own_value_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
    NUM_SPLITS: tl.constexpr, QUERIES: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, end = tl.load(first_row + tl.program_id(0)), tl.load(first_row + tl.program_id(0) + 1)
    if first >= end:
        return
    queries, dims = tl.arange(0, QUERIES), tl.arange(0, DIMS)
    rows = (first + queries // GROUP).to(tl.int64)
    heads = tl.program_id(1) * GROUP + queries % GROUP
    exists = rows < end
    start, length, has_own = _visible_range(rows, exists, row_prefix_length, row_has_own, sliding_window)
    sees_prefix = start < length
    end_of_prefix = tl.max(tl.where(sees_prefix, length, 0), axis=0)
    first_chunk = tl.min(tl.where(sees_prefix, start, end_of_prefix), axis=0) // CHUNK
    chunk_of_split = _chunk_of_split(first_chunk, split, NUM_SPLITS)
    if (split > 0) & (chunk_of_split * CHUNK >= end_of_prefix):
        return

    in_head = dims < HEAD_DIM
    q = tl.load(
        query + (rows * query_row + heads * query_head)[:, None] + dims[None, :],
        mask=exists[:, None] & in_head[None, :], other=0.0,
    )  # fmt: skip
    scale *= 1.4426950408889634  # log2(e)
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    attended = tl.zeros((QUERIES, DIMS), tl.float32)
    if split == 0:
        is_own = has_own[:, None] & in_head[None, :]
        key_at = own_key + (rows * own_key_row + kv_head * own_key_head)[:, None] + dims[None, :]
        value_at = own_value + (rows * own_value_row + kv_head * own_value_head)[:, None] + dims[None, :]
        k = tl.load(key_at, mask=is_own, other=0.0).to(tl.float32)
        v = tl.load(value_at, mask=is_own, other=0.0).to(tl.float32)
        maximum = tl.where(has_own, tl.sum(q.to(tl.float32) * k, axis=1) * scale, float("-inf"))
        total = tl.where(has_own, tl.exp2(maximum - tl.where(maximum == float("-inf"), 0.0, maximum)), 0.0)
        attended = total[:, None] * v

    sequence = tl.load(row_sequence + first).to(tl.int64)
    for chunk in range(chunk_of_split, tl.cdiv(end_of_prefix, CHUNK), NUM_SPLITS):
        positions = chunk * CHUNK + tl.arange(0, CHUNK)
        visible = (positions[None, :] >= start[:, None]) & (positions[None, :] < length[:, None])
        # Blocks between the windows of two rows may be absent.
        needed = tl.max(visible.to(tl.int32), axis=0) > 0 if WINDOWED else positions < end_of_prefix
        block = tl.load(block_table + sequence * table_row + positions // BLOCK_SIZE, mask=needed, other=0).to(tl.int64)
        inner = (positions % BLOCK_SIZE).to(tl.int64)
        is_needed = needed[:, None] & in_head[None, :]
        key_at = key_cache + (block * key_block + kv_head * key_head + inner * key_position)[:, None] + dims[None, :]
        k = tl.load(key_at, mask=is_needed, other=0.0)
        value_at = value_block * block + kv_head * value_head + inner * value_position
        v = tl.load(value_cache + value_at[:, None] + dims[None, :], mask=is_needed, other=0.0)

        weights = dot(q, tl.trans(k), tl.zeros((QUERIES, CHUNK), tl.float32)) * scale
        weights = tl.where(visible, weights, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(weights, axis=1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # nothing but -inf so far
        weights = tl.exp2(weights - base[:, None])
        rescale = tl.exp2(maximum - base)
        total = total * rescale + tl.sum(weights, axis=1)
        attended = dot(weights.to(v.dtype), v, attended * rescale[:, None])
        maximum = new_maximum

    nothing = total == 0
    at = (rows * num_heads + heads) * NUM_SPLITS + split
    tl.store(logsumexp + at, tl.where(nothing, float("-inf"), maximum + tl.log2(total)), mask=exists)
    normalized = attended / tl.where(nothing, 1.0, total)[:, None]
    tl.store(parts + at[:, None] * HEAD_DIM + dims[None, :], normalized, mask=exists[:, None] & in_head[None, :])
    num_chunks = tl.maximum(tl.cdiv(end_of_prefix, CHUNK) - first_chunk, 0)
    zero_has_chunk = _chunk_of_split(first_chunk, 0, NUM_SPLITS) * CHUNK < end_of_prefix
    num_programs = tl.minimum(num_chunks, NUM_SPLITS) + tl.where(zero_has_chunk, 0, 1)
    if is_last(counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), num_programs):
        _merge(
            rows, heads, exists, start, length, has_own, parts, logsumexp, output, num_heads,
            HEAD_DIM, NUM_SPLITS, QUERIES, DIMS, CHUNK,
        )  # fmt: skip


def tile_rows(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a full row tile, for `plan_row_tiles`."""
    return _Tiling.of(head_dim, dtype).queries // _group_size(num_heads, num_kv_heads)


def branch_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_sequence: torch.Tensor,
    row_prefix_length: torch.Tensor,
    row_has_own: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    scale: float,
    sliding_window: int,
    output: torch.Tensor,
    first_row: torch.Tensor,
    workspace: Workspace,
) -> None:
    """`llm2_fast.reference.branch_attention` within rounding; a row's bits do not depend on the other rows.

    Indices are trusted: rows, sequences, positions and blocks out of range read and write foreign memory. A NaN or
    infinite value at a position may reach rows of the same sequence that do not see it, if others in their tile do.

    Args:
        query: [R, num_heads, head_dim], float32, float16 or bfloat16; `num_heads` is a multiple of `num_kv_heads`, at
            most 16 times as large. Here and in all tensors of heads, any strides but for the last dimension.
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of `query`.
        block_table: int32 [S, max_blocks]; only entries that hold a position some row sees are read.
        row_sequence, row_prefix_length: int32 [R].
        row_has_own: bool [R].
        own_key, own_value: [R, num_kv_heads, head_dim], dtype of `query`; read only where `row_has_own`.
        scale: Factor on the dot products.
        sliding_window: 0 for none.
        output: [R, num_heads, head_dim], dtype of `query`, written.
        first_row: int32 [T + 1], from `plan_row_tiles` with `tile_rows`; layers share it. Rows in no tile are not
            touched.
        workspace: See `Workspace.empty`.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or range.
    """
    check_ndim("query", query, 3)
    check_ndim("key_cache", key_cache, 4)
    (rows, num_heads, head_dim), device, dtype = query.shape, query.device, query.dtype
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    check_tensor("query", query, FLOATS, query.shape, device)
    check_tensor("key_cache", key_cache, dtype, (num_blocks, num_kv_heads, block_size, head_dim), device)
    check_tensor("value_cache", value_cache, dtype, key_cache.shape, device)
    group_size = _group_size(num_heads, num_kv_heads)
    check_range("head_dim of query", head_dim, 1, 256)
    check_ndim("block_table", block_table, 2)
    check_tensor("block_table", block_table, torch.int32, block_table.shape, device)
    check_tensor("row_sequence", row_sequence, torch.int32, (rows,), device)
    check_tensor("row_prefix_length", row_prefix_length, torch.int32, (rows,), device)
    check_tensor("row_has_own", row_has_own, torch.bool, (rows,), device)
    check_tensor("own_key", own_key, dtype, (rows, num_kv_heads, head_dim), device)
    check_tensor("own_value", own_value, dtype, (rows, num_kv_heads, head_dim), device)
    check_range("sliding_window", sliding_window, 0)
    check_output("output", output, dtype, query.shape, device)
    check_ndim("first_row", first_row, 1)
    check_tensor("first_row", first_row, torch.int32, first_row.shape, device)
    check_output("workspace.output", workspace.output, torch.float32, (rows, num_heads, NUM_SPLITS, head_dim), device)
    check_output("workspace.logsumexp", workspace.logsumexp, torch.float32, (rows, num_heads, NUM_SPLITS), device)
    check_output("workspace.counters", workspace.counters, torch.int32, (rows, num_heads), device)
    if rows == 0:
        return
    dims, tiling = max(16, triton.next_power_of_2(head_dim)), _Tiling.of(head_dim, dtype)
    row_has_own = row_has_own.view(torch.uint8)
    _attention_kernel[(len(first_row) - 1, num_kv_heads, NUM_SPLITS)](
        query, key_cache, value_cache, block_table, row_sequence, row_prefix_length, row_has_own, own_key, own_value,
        first_row, *workspace, output, scale, sliding_window, num_heads,
        *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0),
        *own_key.stride()[:2], *own_value.stride()[:2],
        GROUP=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, WINDOWED=sliding_window > 0,
        NUM_SPLITS=NUM_SPLITS, QUERIES=tiling.queries, DIMS=dims, CHUNK=tiling.chunk,
        num_warps=tiling.num_warps, num_stages=3, enable_fp_fusion=True, **dependent_launch(),
    )  # fmt: skip


def _group_size(num_heads: int, num_kv_heads: int) -> int:
    """Query heads per key/value head."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads != 0 or num_heads > 16 * num_kv_heads:
        expected = f"a multiple of num_kv_heads = {num_kv_heads}, up to 16 times as large"
        raise ArgumentError("num_heads of query", expected, num_heads)
    return num_heads // num_kv_heads
