"""Queries, keys and values of a projection: norm of each head if there is one, rotary position, and store to the cache.

The pair (x[i], x[i + D/2]) of a head is rotated by the i-th angle of the row (Su et al., "RoFormer", 2021). One program
per row and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_tensor
from llm2_fast.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from llm2_fast.kernels.rms_norm import inverse_rms


@triton.jit
def _rotate(first, second, norm, eps, cosine, sine, row, at, in_half, HALF: tl.constexpr):
    """The two halves of a head, normalized if there is a `norm`, and rotated."""
    if norm is not None:
        scale = inverse_rms(tl.sum(first * first + second * second, axis=0), 2 * HALF, eps)
        first = tl.load(norm + at, mask=in_half, other=0.0).to(tl.float32) * (first * scale)
        second = tl.load(norm + HALF + at, mask=in_half, other=0.0).to(tl.float32) * (second * scale)
    c = tl.load(cosine + row * HALF + at, mask=in_half, other=0.0)
    s = tl.load(sine + row * HALF + at, mask=in_half, other=0.0)
    return first * c - second * s, second * c + first * s


@triton.jit
def _store_halves(output, at, first, second, in_half, HALF: tl.constexpr):
    tl.store(output + at, first.to(output.dtype.element_ty), mask=in_half)
    tl.store(output + HALF + at, second.to(output.dtype.element_ty), mask=in_half)


@triton.jit
def _rope_kernel(
    qkv, cosine, sine, q_norm, k_norm, block_table, row_sequence, row_position, row_stored, num_rows,
    query, own_key, own_value, key_cache, value_cache, eps, num_heads, num_kv_heads, qkv_row, table_row,
    key_block, key_head, key_position, value_block, value_head, value_position,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    at = tl.arange(0, BLOCK)
    in_half = at < HALF
    source = qkv + row * qkv_row + head * (2 * HALF)
    first = tl.load(source + at, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + at, mask=in_half, other=0.0).to(tl.float32)
    if head < num_heads:
        first, second = _rotate(first, second, q_norm, eps, cosine, sine, row, at, in_half, HALF)
        _store_halves(query + (row * num_heads + head) * (2 * HALF), at, first, second, in_half, HALF)
        return
    is_key = head < num_heads + num_kv_heads
    if is_key:
        first, second = _rotate(first, second, k_norm, eps, cosine, sine, row, at, in_half, HALF)
        head -= num_heads
        _store_halves(own_key + (row * num_kv_heads + head) * (2 * HALF), at, first, second, in_half, HALF)
    else:
        head -= num_heads + num_kv_heads
        _store_halves(own_value + (row * num_kv_heads + head) * (2 * HALF), at, first, second, in_half, HALF)
    if tl.load(row_stored + row) != 0:
        position = tl.load(row_position + row)
        sequence = tl.load(row_sequence + row).to(tl.int64)
        block = tl.load(block_table + sequence * table_row + position // BLOCK_SIZE).to(tl.int64)
        inner, kv_head = (position % BLOCK_SIZE).to(tl.int64), head.to(tl.int64)
        if is_key:
            cached = key_cache + block * key_block + kv_head * key_head + inner * key_position
        else:
            cached = value_cache + block * value_block + kv_head * value_head + inner * value_position
        _store_halves(cached, at, first, second, in_half, HALF)


def rope_and_store(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_sequence: torch.Tensor,
    row_position: torch.Tensor,
    row_stored: torch.Tensor,
    query: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.rope_and_store` within rounding.

    Indices are trusted: sequences, positions and blocks out of range write to foreign memory.

    Args:
        qkv: [R, (num_heads + 2 * num_kv_heads) * head_dim], float32, float16 or bfloat16, rows of any stride.
        cosine, sine: float32 [R, head_dim / 2], of each row's position, scaled.
        q_norm, k_norm: [head_dim], any of the dtypes, or None.
        eps: Of these norms.
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of `query`, any strides but for
            the last dimension; written where `row_stored`.
        block_table: int32 [S, max_blocks].
        row_sequence, row_position: int32 [R].
        row_stored: bool [R].
        query: [R, num_heads, head_dim], float32, float16 or bfloat16, written.
        own_key, own_value: [R, num_kv_heads, head_dim], dtype of `query`, written.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides or device.
    """
    check_ndim("qkv", qkv, 2)
    rows, device = len(qkv), qkv.device
    check_tensor("qkv", qkv, FLOATS, qkv.shape, device)
    check_heads(
        rows, qkv.shape[1], cosine, sine, key_cache, value_cache, block_table, row_sequence, row_position, row_stored,
        query, own_key, own_value,
    )  # fmt: skip
    (_, num_heads, head_dim), (num_kv_heads, block_size) = query.shape, key_cache.shape[1:3]
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, FLOATS, (head_dim,), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    _rope_kernel[(rows, num_heads + 2 * num_kv_heads)](
        qkv, cosine, sine, q_norm, k_norm, block_table, row_sequence, row_position, row_stored.view(torch.uint8),
        num_rows, query, own_key, own_value, key_cache, value_cache, eps, num_heads, num_kv_heads, qkv.stride(0),
        block_table.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3],
        HALF=head_dim // 2, BLOCK_SIZE=block_size, BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1,
        enable_fp_fusion=True, **dependent_launch(),
    )  # fmt: skip


def check_heads(
    rows: int,
    width: int,
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
) -> None:
    """Refuse what does not fit `rows` rows of `width` features of queries, keys and values; see `rope_and_store`."""
    check_ndim("query", query, 3)
    check_ndim("key_cache", key_cache, 4)
    (_, num_heads, head_dim), device, dtype = query.shape, query.device, query.dtype
    num_kv_heads = key_cache.shape[1]
    if head_dim % 2 != 0:
        raise ArgumentError("head_dim of query", "an even number", head_dim)
    if (num_heads + 2 * num_kv_heads) * head_dim != width:
        expected = f"{num_heads} + 2 * {num_kv_heads} heads of {head_dim}"
        raise ArgumentError("features of queries, keys and values", expected, width)
    check_output("cosine", cosine, torch.float32, (rows, head_dim // 2), device)
    check_output("sine", sine, torch.float32, (rows, head_dim // 2), device)
    check_tensor(
        "key_cache", key_cache, dtype, (key_cache.shape[0], num_kv_heads, key_cache.shape[2], head_dim), device
    )
    check_tensor("value_cache", value_cache, dtype, key_cache.shape, device)
    check_ndim("block_table", block_table, 2)
    check_tensor("block_table", block_table, torch.int32, block_table.shape, device)
    check_tensor("row_sequence", row_sequence, torch.int32, (rows,), device)
    check_tensor("row_position", row_position, torch.int32, (rows,), device)
    check_tensor("row_stored", row_stored, torch.bool, (rows,), device)
    check_output("query", query, FLOATS, (rows, num_heads, head_dim), device)
    check_output("own_key", own_key, dtype, (rows, num_kv_heads, head_dim), device)
    check_output("own_value", own_value, dtype, (rows, num_kv_heads, head_dim), device)
