"""The ops of `kernel_ops`: registration, the reference on the CPU, and what is said without Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2_fast import kernel_ops, reference
from test_kernels_layers import NORM, SCORE, branch_inputs, commit_inputs, embed_inputs, randn, rope_inputs
from test_kernels_linear import inputs_of, selection_inputs
from test_kernels_pairwise_loss import scores
from test_ops import run_python

OPERATORS = torch.ops.llm2_fast
ALL = (
    "branch_rows", "embed", "select_candidates", "adjust_and_pick", "branch_attention", "linear", "silu_mul",
    "gelu_tanh_mul", "rms_norm", "add_rms_norm", "rope_and_store", "score_head", "commit", "lm_head_select",
    "pairwise_loss",
)  # fmt: skip


def samples() -> dict[str, tuple]:
    """Arguments of every op of the module."""
    norm = {**NORM, "x": randn(3, 4)}
    return {
        "branch_rows": branch_inputs(3, 4),
        "embed": (*embed_inputs(torch.bfloat16).values(), torch.float32),
        "linear": tuple(inputs_of(3, 8, 6, bias=True, rank=2, residual=True).values()),
        "silu_mul": (randn(3, 8),),
        "gelu_tanh_mul": (randn(3, 8),),
        "rms_norm": (norm["x"], norm["weight"], 1e-5, torch.bfloat16),
        "add_rms_norm": tuple(norm.values()),
        "rope_and_store": tuple(rope_inputs(norms=True).values()),
        "score_head": (randn(3, 4), *list(SCORE.values())[1:], 0.5),
        "commit": tuple((commit_inputs() | {"block_table": torch.ones(3, 3, dtype=torch.int32)}).values()),
        "lm_head_select": selection_inputs(3, 20, torch.float32),
        "pairwise_loss": scores(4, 6),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPERATORS, name).default, samples()[name])


@pytest.mark.parametrize("name", ALL)
def test_every_op_has_a_cpu_and_a_cuda_implementation(name: str) -> None:
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"llm2_fast::{name}", key)


def test_pairwise_loss_is_differentiable() -> None:
    positive, negative, position = scores(5, 9)
    leaves = positive.requires_grad_(), negative.requires_grad_()
    actual = torch.autograd.grad(3 * kernel_ops.pairwise_loss(*leaves, position), leaves)
    expected = torch.autograd.grad(3 * reference.pairwise_loss(*leaves, position), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_missing_triton_is_reported(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None
from llm2_fast import kernel_ops, ops
from llm2_fast.errors import MissingDependencyError
try:
    with ops.triton_needed():
        import llm2_fast.kernels.linear
except MissingDependencyError as error:
    print(error)
"""
    output = run_python(code, tmp_path)
    assert output.strip() == "ops on CUDA tensors need Triton (to install it: pip install triton)"


def test_kernels_are_not_imported_before_they_are_needed(tmp_path: Path) -> None:
    code = "import sys, llm2_fast.kernel_ops; print([name for name in sys.modules if 'llm2_fast.kernels.' in name])"
    assert run_python(code, tmp_path).strip() == "[]"
