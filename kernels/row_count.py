"""The number of rows that a kernel has to compute, which may be known on the device only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_count(max_rows, num_rows):
    """`max_rows`, or what int32 [1] `num_rows` holds if that is less."""
    return max_rows if num_rows is None else tl.minimum(tl.load(num_rows), max_rows)
