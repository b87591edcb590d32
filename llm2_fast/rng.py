"""Counter-based random numbers: Philox 4x32-10, the same in every backend.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The key is the seed and the counter names the draw: (token id, step, sample index, request id). A draw therefore depends
on nothing else in the batch and can be replayed anywhere.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[torch.Tensor, ...], seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words per counter.

    Args:
        counter: Four broadcastable int64 tensors, each holding values in [0, 2**32).
        seed: int64, broadcastable with the counters; its 64 bits are the key.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 multiplication wraps modulo 2**64, so both halves of the product are exact.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(
    token_ids: torch.Tensor,
    step: torch.Tensor,
    sample_index: torch.Tensor,
    request_id: torch.Tensor,
    seed: torch.Tensor,
) -> torch.Tensor:
    """Standard Gumbel noise, float32, -log(-log(u)) with u = ((word0 >> 9) + 0.5) * 2**-23.

    23 bits keep u strictly inside (0, 1) in float32, so the noise is always finite (between -2.82 and 16.64).

    Args:
        token_ids: int [B, K].
        step, sample_index, request_id, seed: int [B].

    Returns:
        float32 [B, K].
    """
    per_row = [x.unsqueeze(-1) for x in (step, sample_index, request_id)]
    counter = tuple(x.to(torch.int64) & _MASK for x in (token_ids, *per_row))
    words = philox(counter, seed.to(torch.int64).unsqueeze(-1))
    u = ((words[0] >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
