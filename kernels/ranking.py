"""The order of tokens, (logit descending, id ascending), as one integer per token."""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))  # below the key of every token
_ALL_BUT_SIGN = tl.constexpr(2**31 - 1)


@triton.jit
def ranking_key(logits, ids):
    """int64 keys that are larger for what ranks earlier: the logit's bits in order, then the id, reversed.

    Args:
        logits: float32 [...], no NaN; -0 equals 0.
        ids: int32 [...], >= 0.
    """
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits)
    return (ordered.to(tl.int64) << 32) | (ids ^ _ALL_BUT_SIGN).to(tl.int64)


@triton.jit
def logit_of_key(key):
    """float32 logits of keys."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ _ALL_BUT_SIGN, ordered).to(tl.float32, bitcast=True)


@triton.jit
def id_of_key(key):
    """int32 ids of keys."""
    return (key & _ALL_BUT_SIGN).to(tl.int32) ^ _ALL_BUT_SIGN
