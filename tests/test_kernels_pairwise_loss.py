"""The Triton kernels of `pairwise_loss` against the torch reference and its automatic gradient."""

from __future__ import annotations

import pytest
import torch

from llm2_fast import kernel_ops, reference
from test_ops import generator
from triton_device import run


def scores(num_positives: int, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random scores; the pairs of a position are not consecutive, and some positions have none."""
    rng = generator(num_pairs)
    positive, negative = torch.randn(num_positives, generator=rng) * 5, torch.randn(num_pairs, generator=rng) * 5
    return positive, negative, torch.randint(0, max(1, num_positives - 2), (num_pairs,), generator=rng)


@pytest.mark.parametrize(("num_positives", "num_pairs"), [(0, 0), (3, 0), (1, 1), (20, 7), (5, 300), (40, 700)])
def test_matches_reference(num_positives: int, num_pairs: int) -> None:
    positive, negative, position = scores(num_positives, num_pairs)
    if num_pairs == 700:
        positive[:2] = torch.tensor([1e4, -1e4])  # neither overflows
    loss, positive_grad, negative_grad = run(kernel_ops._pairwise_loss_cuda, (positive, negative, position))

    positive.requires_grad_()
    negative.requires_grad_()
    expected = reference.pairwise_loss(positive, negative, position)
    gradients = torch.autograd.grad(expected, (positive, negative))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(positive_grad, gradients[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(negative_grad, gradients[1], rtol=1e-5, atol=1e-7)


def test_nan_reaches_the_loss() -> None:
    positive, negative, position = scores(4, 5)
    negative[2] = float("nan")
    assert run(kernel_ops._pairwise_loss_cuda, (positive, negative, position))[0].isnan()


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(3).double(), "positive_scores: expected float32 on .*, got float64"),
        (1, torch.zeros(5, 1), r"negative_scores: expected 1 dimension, got shape \[5, 1\]"),
        (2, torch.zeros(5).int(), "position: expected int64 on .*, got int32"),
        (2, torch.zeros(4).long(), r"position: expected shape \[5\], got shape \[4\]"),
    ],
)
def test_refuses(index: int, value: torch.Tensor, message: str) -> None:
    arguments = [torch.zeros(3), torch.zeros(5), torch.zeros(5, dtype=torch.int64)]
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        run(kernel_ops._pairwise_loss_cuda, arguments)
