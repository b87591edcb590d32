"""How clearly the reference decides which tokens are candidates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from llm2_fast.backends import plans

# Two orders of summation move a float32 logit of these networks by less.
CLEAR = 1e-4


@contextmanager
def clear_candidates() -> Iterator[None]:
    """Fail when a step of the reference backend has a logit so near the threshold that rounding decides.

    Such a case cannot be compared token by token on every machine: it needs another alpha, prompt or network.
    """
    margins = []

    def select_candidates(logits: torch.Tensor, *, log_alpha: torch.Tensor, **options):
        threshold = logits.max(dim=-1).values + log_alpha
        margins.extend((logits - threshold[:, None]).abs().min(dim=-1).values.tolist())
        return original(logits, log_alpha=log_alpha, **options)

    original = plans.select_candidates
    with mock.patch.object(plans, "select_candidates", select_candidates):
        yield
    nearest = min(margins, default=float("inf"))
    assert nearest > CLEAR, f"a logit is {nearest:.1e} from the threshold: rounding decides, take another alpha"
