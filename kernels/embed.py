"""What rows bring into the first layer: embeddings, and cosines and sines of their rotary positions.

The angle is the float32 product of position and frequency. Its quarter turns are removed in float64, since float32
would lose the angle of late positions, and what is left, at most pi / 4, goes through the polynomials of Cephes
(Moshier, `sinf.c`), which err by less than two units in the last place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_range, check_tensor

_BLOCK = 1024


@triton.jit
def cosine_and_sine(angle):
    """float32 cosines and sines of float32 angles below 2**30 in magnitude."""
    turns = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)  # quarter turns, 2 / pi
    x = (angle.to(tl.float64) - turns * 1.5707963267948966).to(tl.float32)
    quadrant = turns.to(tl.int32) & 3
    z = x * x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    odd = quadrant % 2 == 1
    rotated_cosine, rotated_sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    negative = (quadrant == 1) | (quadrant == 2)
    return tl.where(negative, -rotated_cosine, rotated_cosine), tl.where(quadrant >= 2, -rotated_sine, rotated_sine)


@triton.jit
def _embed_kernel(
    row_token, row_position, embedding, inv_freq, rotary_scale, num_rows, hidden_states, cosine, sine,
    scale, hidden_size, embedding_row, max_rows, num_blocks,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    if part < num_blocks:
        at = part * BLOCK + tl.arange(0, BLOCK)
        inside = at < hidden_size
        token = tl.load(row_token + row).to(tl.int64)
        h = tl.load(embedding + token * embedding_row + at, mask=inside, other=0.0).to(tl.float32) * scale
        h = h.to(embedding.dtype.element_ty).to(hidden_states.dtype.element_ty)
        tl.store(hidden_states + row * hidden_size + at, h, mask=inside)
    else:
        table, angle = part - num_blocks, tl.arange(0, ANGLES)
        in_half = angle < HALF
        frequency = tl.load(inv_freq + table * HALF + angle, mask=in_half, other=0.0)
        c, s = cosine_and_sine(tl.load(row_position + row).to(tl.float32) * frequency)
        amplitude = tl.load(rotary_scale + table)
        out = (table * max_rows + row) * HALF + angle
        tl.store(cosine + out, c * amplitude, mask=in_half)
        tl.store(sine + out, s * amplitude, mask=in_half)


def embed(
    row_token: torch.Tensor,
    row_position: torch.Tensor,
    embedding: torch.Tensor,
    scale: float,
    inv_freq: torch.Tensor,
    rotary_scale: torch.Tensor,
    hidden_states: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.embed`: embeddings exactly, cosines and sines within rounding.

    Tokens are trusted: one out of range reads foreign memory.

    Args:
        row_token, row_position: int32 [R].
        embedding: [V, hidden_size], float32, float16 or bfloat16, rows of any stride.
        scale: Factor on the embeddings.
        inv_freq: float32 [T, head_dim / 2] for T >= 1 rotary tables, radians per position; no angle reaches 2**30.
        rotary_scale: float32 [T].
        hidden_states: [R, hidden_size], any of the dtypes, written.
        cosine, sine: float32 [T, R, head_dim / 2], written; [t] is what `rope_and_store` takes.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides or device.
    """
    check_ndim("row_token", row_token, 1)
    check_ndim("embedding", embedding, 2)
    check_ndim("inv_freq", inv_freq, 2)
    rows, device, hidden_size = len(row_token), row_token.device, embedding.shape[1]
    tables, half = inv_freq.shape
    check_tensor("row_token", row_token, torch.int32, (rows,), device)
    check_tensor("row_position", row_position, torch.int32, (rows,), device)
    check_tensor("embedding", embedding, FLOATS, embedding.shape, device)
    check_range("columns of embedding", hidden_size, 1)
    check_output("inv_freq", inv_freq, torch.float32, (tables, half), device)
    check_range("rows of inv_freq", tables, 1)
    check_range("columns of inv_freq", half, 1)
    check_tensor("rotary_scale", rotary_scale, torch.float32, (tables,), device)
    check_output("hidden_states", hidden_states, FLOATS, (rows, hidden_size), device)
    check_output("cosine", cosine, torch.float32, (tables, rows, half), device)
    check_output("sine", sine, torch.float32, (tables, rows, half), device)
    check_num_rows(num_rows, device)
    if rows == 0:
        return
    blocks = triton.cdiv(hidden_size, _BLOCK)
    _embed_kernel[(rows, blocks + tables)](
        row_token, row_position, embedding, inv_freq, rotary_scale, num_rows, hidden_states, cosine, sine,
        scale, hidden_size, embedding.stride(0), rows, blocks,
        HALF=half, BLOCK=_BLOCK, ANGLES=triton.next_power_of_2(half), enable_fp_fusion=False,
    )  # fmt: skip
