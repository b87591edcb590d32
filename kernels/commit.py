"""The picked branch of each sequence becomes its last token: keys and values, hidden state, length.

One program per sequence and layer copies a row of keys and of values; one more per sequence the rest. The position to
write to is that of the picked row, so no program reads a length that another one advances.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_tensor


@triton.jit
def _commit_kernel(
    index, first_row, row_sequence, row_position, own_key, own_value, row_hidden_states, block_table, num_rows,
    key_cache, value_cache, hidden_states, lengths, hidden_size, num_layers, own_layer, own_row, row_hidden_row,
    table_row, key_layer, key_block, key_head, key_position, value_layer, value_block, value_head, value_position,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    batch, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if num_rows is not None and batch >= tl.load(num_rows):
        return
    picked = tl.load(index + batch)
    if picked < 0:
        return
    row = (tl.load(first_row + batch) + picked).to(tl.int64)
    sequence = tl.load(row_sequence + row).to(tl.int64)
    position = tl.load(row_position + row)
    if layer == num_layers:
        tl.store(lengths + sequence, position + 1)
        at = tl.arange(0, HIDDEN)
        hidden = tl.load(row_hidden_states + row * row_hidden_row + at, mask=at < hidden_size)
        tl.store(hidden_states + sequence * hidden_size + at, hidden, mask=at < hidden_size)
    else:
        block = tl.load(block_table + sequence * table_row + position // BLOCK_SIZE).to(tl.int64)
        inner = (position % BLOCK_SIZE).to(tl.int64)
        kv = tl.arange(0, KV)
        inside = kv < NUM_KV_HEADS * HEAD_DIM
        head, dim = (kv // HEAD_DIM).to(tl.int64), kv % HEAD_DIM
        own = layer * own_layer + row * own_row + kv
        key_at = layer * key_layer + block * key_block + head * key_head + inner * key_position + dim
        value_at = layer * value_layer + block * value_block + head * value_head + inner * value_position + dim
        tl.store(key_cache + key_at, tl.load(own_key + own, mask=inside), mask=inside)
        tl.store(value_cache + value_at, tl.load(own_value + own, mask=inside), mask=inside)


def commit(
    index: torch.Tensor,
    first_row: torch.Tensor,
    row_sequence: torch.Tensor,
    row_position: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    row_hidden_states: torch.Tensor,
    block_table: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    hidden_states: torch.Tensor,
    lengths: torch.Tensor,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.commit`, exactly.

    Indices are trusted: rows, sequences, positions and blocks out of range read and write foreign memory.

    Args:
        index: int32 [B], picked branch of each sequence; -1 leaves it as it is.
        first_row: int32 [B], row of the first branch.
        row_sequence, row_position: int32 [R].
        own_key, own_value: [L, R, num_kv_heads, head_dim], float32, float16 or bfloat16, contiguous.
        row_hidden_states: [R, hidden_size], any of the dtypes, rows of any stride.
        block_table: int32 [S, max_blocks].
        key_cache, value_cache: [L, num_blocks, num_kv_heads, block_size, head_dim], dtype of `own_key`, any strides but
            for the last dimension; written.
        hidden_states: [S, hidden_size], dtype of `row_hidden_states`, written.
        lengths: int32 [S], written.
        num_rows: int32 [1]; sequences from it on are left as they are. None for all B.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides or device.
    """
    check_ndim("index", index, 1)
    check_ndim("own_key", own_key, 4)
    check_ndim("row_hidden_states", row_hidden_states, 2)
    check_ndim("key_cache", key_cache, 5)
    check_ndim("block_table", block_table, 2)
    batch, device, dtype = len(index), index.device, own_key.dtype
    layers, rows, num_kv_heads, head_dim = own_key.shape
    hidden_size, sequences = row_hidden_states.shape[1], len(block_table)
    num_blocks, block_size = key_cache.shape[1], key_cache.shape[3]
    check_tensor("index", index, torch.int32, (batch,), device)
    check_tensor("first_row", first_row, torch.int32, (batch,), device)
    check_tensor("row_sequence", row_sequence, torch.int32, (rows,), device)
    check_tensor("row_position", row_position, torch.int32, (rows,), device)
    check_output("own_key", own_key, FLOATS, (layers, rows, num_kv_heads, head_dim), device)
    check_output("own_value", own_value, dtype, own_key.shape, device)
    check_tensor("row_hidden_states", row_hidden_states, FLOATS, (rows, hidden_size), device)
    check_tensor("block_table", block_table, torch.int32, block_table.shape, device)
    check_tensor("key_cache", key_cache, dtype, (layers, num_blocks, num_kv_heads, block_size, head_dim), device)
    check_tensor("value_cache", value_cache, dtype, key_cache.shape, device)
    check_output("hidden_states", hidden_states, row_hidden_states.dtype, (sequences, hidden_size), device)
    check_output("lengths", lengths, torch.int32, (sequences,), device)
    check_num_rows(num_rows, device)
    if batch == 0:
        return
    _commit_kernel[(batch, layers + 1)](
        index, first_row, row_sequence, row_position, own_key, own_value, row_hidden_states, block_table, num_rows,
        key_cache, value_cache, hidden_states, lengths, hidden_size, layers, *own_key.stride()[:2],
        row_hidden_states.stride(0), block_table.stride(0), *key_cache.stride()[:4], *value_cache.stride()[:4],
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        KV=triton.next_power_of_2(num_kv_heads * head_dim), HIDDEN=triton.next_power_of_2(hidden_size),
        enable_fp_fusion=False,
    )  # fmt: skip
