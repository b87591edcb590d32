"""Matrix products with float32 sums: on the matrix units for float16 and bfloat16, and IEEE, not TF32, for float32."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b, float32 [M, N], of a [M, K] and b [K, N] of one dtype."""
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
