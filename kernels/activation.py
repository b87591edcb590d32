"""Activations of gated linear layers, as device functions."""

from __future__ import annotations

import triton
import triton.language as tl

GATED = ("silu_mul", "gelu_tanh_mul")


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """silu(gate) * up, or gelu(gate) * up with the tanh approximation of GELU; float32."""
    if ACTIVATION == "silu_mul":
        return gate * tl.sigmoid(gate) * up
    # x / 2 * (1 + tanh(u)) = x * sigmoid(2 * u), with u = sqrt(2 / pi) * (x + 0.044715 * x**3)
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
