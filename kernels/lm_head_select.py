"""`lm_head` and `select_candidates` as one: logits are summarized, tile by tile, where they are computed and are never
written. The merge is that of `select_candidates`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_range, check_tensor
from llm2_fast.kernels.linear import accumulate
from llm2_fast.kernels.row_count import row_count
from llm2_fast.kernels.select_candidates import (
    Partials,
    check_partials,
    check_selection,
    merge_partials,
    store_partials,
)
from llm2_fast.reference import Candidates

_TILE = 64  # tokens per program


@triton.jit
def _lm_head_kernel(
    hidden_states, weight, log_alpha, num_rows, maxima, sums, counts, keys,
    max_rows, vocab_size, hidden_row, weight_row, num_tiles,
    HIDDEN_SIZE: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    count = row_count(max_rows, num_rows)
    if tl.program_id(0) * ROWS >= count:
        return
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_rows = rows < count
    ids = tile * TILE + tl.arange(0, TILE)
    in_vocab = ids < vocab_size
    z = accumulate(
        hidden_states, weight, rows, in_rows, ids.to(tl.int64), in_vocab, 0, HIDDEN_SIZE, hidden_row, weight_row,
        ROWS, TILE, DEPTH,
    )  # fmt: skip
    z = tl.where(in_rows[:, None] & in_vocab[None, :], z, float("-inf"))
    row_log_alpha = tl.load(log_alpha + rows, mask=in_rows, other=0.0)
    store_partials(z, ids[None, :], rows, in_rows, tile, row_log_alpha, maxima, sums, counts, keys, num_tiles, LISTED)


def empty_partials(batch: int, vocab_size: int, max_candidates: int, device: torch.device) -> Partials:
    """Workspace of `lm_head_select`."""
    return Partials.empty(batch, triton.cdiv(vocab_size, _TILE), _TILE, max_candidates, device)


def lm_head_select(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
    outputs: Candidates,
    partials: Partials,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.lm_head_select` within the rounding of the logits; a row's bits do not depend on the others.

    Args:
        hidden_states: [B, hidden_size], float32, float16 or bfloat16. Here and in `weight` rows may have any stride.
        weight: [V, hidden_size], dtype of `hidden_states`. Ids from V on cannot be chosen.
        log_alpha: float32 [B], natural logarithm.
        candidate_top_k: int32 [B]; 0 for no limit.
        max_candidates: K, in [1, 1024].
        outputs: Written.
        partials: Workspace, see `empty_partials`.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or range.
    """
    check_ndim("hidden_states", hidden_states, 2)
    check_ndim("weight", weight, 2)
    (batch, hidden_size), device, vocab_size = hidden_states.shape, hidden_states.device, weight.shape[0]
    check_tensor("hidden_states", hidden_states, FLOATS, (batch, hidden_size), device)
    check_tensor("weight", weight, hidden_states.dtype, (vocab_size, hidden_size), device)
    check_range("hidden_size of hidden_states", hidden_size, 1)
    check_range("rows of weight", vocab_size, 1)
    check_selection(batch, log_alpha, candidate_top_k, max_candidates, outputs, device)
    tiles = triton.cdiv(vocab_size, _TILE)
    check_partials(partials, batch, tiles, _TILE, max_candidates, device)
    check_num_rows(num_rows, device)
    if batch == 0:
        return
    is_float32 = hidden_states.dtype == torch.float32
    tile_rows = 16 if is_float32 or batch <= 16 else 32
    _lm_head_kernel[(triton.cdiv(batch, tile_rows), tiles)](
        hidden_states, weight, log_alpha, num_rows, *partials, batch, vocab_size,
        hidden_states.stride(0), weight.stride(0), tiles,
        HIDDEN_SIZE=hidden_size, LISTED=partials.keys.shape[2], ROWS=tile_rows, TILE=_TILE,
        DEPTH=32 if is_float32 else 128, num_stages=2 if is_float32 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    merge_partials(partials, log_alpha, candidate_top_k, max_candidates, vocab_size, outputs, num_rows)
