"""The branches of all sequences packed into rows, one sequence's after the other's: what a joint step begins with.

The number of branches is known on the device only. One program per sequence adds up the counts before its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import check_ndim, check_output, check_range, check_tensor

MAX_SEQUENCES = 1024  # every program reads all counts
MAX_BRANCHES = 1024


@triton.jit
def _branch_rows_kernel(
    ids, count, lengths, slots, first_row, row_token, row_sequence, row_position, num_rows,
    num_sequences, max_branches, max_rows, ids_row, SEQUENCES: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    others, branches = tl.arange(0, SEQUENCES), tl.arange(0, BRANCHES)
    counts = tl.load(count + others, mask=others < num_sequences, other=0)
    counts = tl.minimum(tl.maximum(counts, 0), max_branches)
    first = tl.sum(tl.where(others < sequence, counts, 0), axis=0)
    tl.store(first_row + sequence, first)
    if sequence == num_sequences:  # one program more than there are sequences
        tl.store(num_rows, tl.minimum(first, max_rows))
        return
    rows = first + branches
    exists = (branches < tl.sum(tl.where(others == sequence, counts, 0), axis=0)) & (rows < max_rows)
    tokens = tl.load(ids + sequence.to(tl.int64) * ids_row + branches, mask=exists, other=0)
    tl.store(row_token + rows, tokens, mask=exists)
    slot = sequence if slots is None else tl.load(slots + sequence)
    tl.store(row_sequence + rows, slot + tl.zeros((BRANCHES,), tl.int32), mask=exists)
    tl.store(row_position + rows, tl.load(lengths + slot) + tl.zeros((BRANCHES,), tl.int32), mask=exists)


def branch_rows(
    ids: torch.Tensor,
    count: torch.Tensor,
    lengths: torch.Tensor,
    first_row: torch.Tensor,
    row_token: torch.Tensor,
    row_sequence: torch.Tensor,
    row_position: torch.Tensor,
    num_rows: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.branch_rows`, but for what it says about entries from `num_rows` on: they stay as they are.

    Args:
        ids: int32 [B, K], B and K <= 1024, rows of any stride.
        count: int32 [B], branches of each sequence; taken as 0 below 0 and as K above it.
        lengths: int32 [B], committed positions.
        first_row: int32 [B + 1], written: the first row of each sequence, and last the number of all branches.
        row_token, row_sequence, row_position: int32 [R], written. With R < B * K branches may not fit; those from row R
            on are left out, and `first_row[B]` is larger than R.
        num_rows: int32 [1], written: min(first_row[B], R).
        slots: int32 [B]: `lengths` and `row_sequence` are by slot, of which sequence b has `slots[b]`; None for b.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or range.
    """
    check_ndim("ids", ids, 2)
    (batch, width), device = ids.shape, ids.device
    check_tensor("ids", ids, torch.int32, (batch, width), device)
    check_range("rows of ids", batch, 0, MAX_SEQUENCES)
    check_range("columns of ids", width, 1, MAX_BRANCHES)
    check_tensor("count", count, torch.int32, (batch,), device)
    check_ndim("lengths", lengths, 1)
    check_tensor("lengths", lengths, torch.int32, (batch,) if slots is None else lengths.shape, device)
    if slots is not None:
        check_tensor("slots", slots, torch.int32, (batch,), device)
    check_output("first_row", first_row, torch.int32, (batch + 1,), device)
    check_ndim("row_token", row_token, 1)
    for name, tensor in (("row_token", row_token), ("row_sequence", row_sequence), ("row_position", row_position)):
        check_output(name, tensor, torch.int32, row_token.shape, device)
    check_output("num_rows", num_rows, torch.int32, (1,), device)
    _branch_rows_kernel[(batch + 1,)](
        ids, count, lengths, slots, first_row, row_token, row_sequence, row_position, num_rows,
        batch, width, len(row_token), ids.stride(0),
        SEQUENCES=triton.next_power_of_2(max(32, batch)), BRANCHES=triton.next_power_of_2(width),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
