"""Pairwise loss -log sigmoid(s+ - s-), averaged over pairs (LLM2, equation 4), and its gradient.

The first kernel computes the pairs; the second adds up the loss; the third adds up, for each positive, the pairs that
share it, by comparing every pair's position: no atomics, so sums have a fixed order, and pairs may stand in any.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import check_ndim, check_output, check_tensor

_BLOCK = 256
_POSITIVES = 16


@triton.jit
def _pairs_kernel(positive_scores, negative_scores, position, negative_grad, partial, num_pairs, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_pairs
    positive = tl.load(positive_scores + tl.load(position + at, mask=inside, other=0), mask=inside, other=0.0)
    margin = positive - tl.load(negative_scores + at, mask=inside, other=0.0)
    loss = tl.maximum(-margin, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(margin)))
    tl.store(negative_grad + at, tl.sigmoid(-margin) / num_pairs, mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), axis=0))


@triton.jit
def _loss_kernel(partial, loss, num_parts, num_pairs, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < num_parts, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) / num_pairs)


@triton.jit
def _positives_kernel(
    position, negative_grad, positive_grad, num_positives, num_pairs, POSITIVES: tl.constexpr, BLOCK: tl.constexpr
):
    positives = tl.program_id(0) * POSITIVES + tl.arange(0, POSITIVES)
    total = tl.zeros((POSITIVES,), tl.float32)
    for start in range(0, num_pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        of_pair = tl.load(position + at, mask=at < num_pairs, other=-1)
        gradient = tl.load(negative_grad + at, mask=at < num_pairs, other=0.0)
        total += tl.sum(tl.where(of_pair[None, :] == positives[:, None], gradient[None, :], 0.0), axis=1)
    tl.store(positive_grad + positives, -total, mask=positives < num_positives)


def empty_partial(num_pairs: int, device: torch.device) -> torch.Tensor:
    """Workspace of `pairwise_loss`: float32, one sum per block of pairs."""
    return torch.empty(triton.cdiv(num_pairs, _BLOCK), dtype=torch.float32, device=device)


def pairwise_loss(
    positive_scores: torch.Tensor,
    negative_scores: torch.Tensor,
    position: torch.Tensor,
    loss: torch.Tensor,
    positive_grad: torch.Tensor,
    negative_grad: torch.Tensor,
    partial: torch.Tensor,
) -> None:
    """`llm2_fast.reference.pairwise_loss` within rounding, and its gradient.

    Args:
        positive_scores: float32 [P].
        negative_scores: float32 [M].
        position: int64 [M], in [0, P): trusted; a position out of range reads foreign memory.
        loss: float32 [], written.
        positive_grad: float32 [P], written.
        negative_grad: float32 [M], written.
        partial: Workspace, see `empty_partial`.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides or device.
    """
    check_ndim("positive_scores", positive_scores, 1)
    check_ndim("negative_scores", negative_scores, 1)
    num_positives, num_pairs, device = len(positive_scores), len(negative_scores), positive_scores.device
    check_tensor("positive_scores", positive_scores, torch.float32, (num_positives,), device)
    check_tensor("negative_scores", negative_scores, torch.float32, (num_pairs,), device)
    check_tensor("position", position, torch.int64, (num_pairs,), device)
    check_output("loss", loss, torch.float32, (), device)
    check_output("positive_grad", positive_grad, torch.float32, (num_positives,), device)
    check_output("negative_grad", negative_grad, torch.float32, (num_pairs,), device)
    parts = triton.cdiv(num_pairs, _BLOCK)
    check_output("partial", partial, torch.float32, (parts,), device)
    if num_pairs == 0:
        loss.zero_()
        positive_grad.zero_()
        return
    _pairs_kernel[(parts,)](
        positive_scores, negative_scores, position, negative_grad, partial, num_pairs, BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip
    _loss_kernel[(1,)](partial, loss, parts, num_pairs, BLOCK=_BLOCK, enable_fp_fusion=True)
    _positives_kernel[(triton.cdiv(num_positives, _POSITIVES),)](
        position, negative_grad, positive_grad, num_positives, num_pairs, POSITIVES=_POSITIVES, BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip
