"""Gumbel noise from counters, as `llm2_fast.rng` defines it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(token_ids, step, sample_index, request_id, seed):
    """float32 noise of int32 token ids; `seed` is int64, the other parts of the counter int32 scalars."""
    word, _, _, _ = tl.philox(seed, token_ids, step, sample_index, request_id)
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23: 23 bits stay inside (0, 1)
    return -tl.log(-tl.log(u))
