"""Row tiles: consecutive rows of one sequence, as many as a program of `branch_attention` takes at once.

Tile t holds the rows [first_row[t], first_row[t + 1]). A tile ends where the sequence changes and at every multiple of
its size, so B sequences of R rows, each sequence's together, have at most B + R // tile_rows tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.row_count import row_count

MAX_ROWS = 8192  # one program plans all


@triton.jit
def _row_tiles_kernel(
    row_sequence, num_rows, first_row, max_rows, max_tiles, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.arange(0, ROWS)
    count = row_count(max_rows, num_rows)
    sequence = tl.load(row_sequence + rows, mask=rows < count, other=-1)
    previous = tl.load(row_sequence + rows - 1, mask=(rows > 0) & (rows <= count), other=-1)
    begins = ((rows % TILE_ROWS == 0) | (sequence != previous)) & (rows < count)
    tile = tl.cumsum(begins.to(tl.int32), axis=0) - 1
    tl.store(first_row + tile, rows, mask=begins & (tile < max_tiles))
    num_tiles = tl.sum(begins.to(tl.int32), axis=0)
    for start in range(0, max_tiles + 1, ROWS):
        after = start + rows
        tl.store(first_row + after, count, mask=(after >= num_tiles) & (after <= max_tiles))


def plan_row_tiles(
    row_sequence: torch.Tensor, tile_rows: int, first_row: torch.Tensor, num_rows: torch.Tensor | None = None
) -> None:
    """Fill `first_row`.

    Args:
        row_sequence: int32 [R], R <= 8192.
        tile_rows: Rows of a full tile.
        first_row: int32 [T + 1], written; tiles that are not needed are empty. Rows of tiles beyond T are lost.
        num_rows: int32 [1]; rows from it on are in no tile. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, device or range.
    """
    check_ndim("row_sequence", row_sequence, 1)
    rows, device = len(row_sequence), row_sequence.device
    check_tensor("row_sequence", row_sequence, torch.int32, (rows,), device)
    check_range("number of rows in row_sequence", rows, 0, MAX_ROWS)
    check_range("tile_rows", tile_rows, 1)
    check_ndim("first_row", first_row, 1)
    check_output("first_row", first_row, torch.int32, (len(first_row),), device)
    check_range("length of first_row", len(first_row), 2)
    check_num_rows(num_rows, device)
    _row_tiles_kernel[(1,)](
        row_sequence, num_rows, first_row, rows, len(first_row) - 1,
        TILE_ROWS=tile_rows, ROWS=max(32, triton.next_power_of_2(rows)), enable_fp_fusion=False,
    )  # fmt: skip
