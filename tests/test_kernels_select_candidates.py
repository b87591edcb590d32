"""The Triton kernels of `select_candidates` against the torch reference."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from llm2_fast import ops, reference
from llm2_fast.kernels import select_candidates as kernel
from llm2_fast.reference import Candidates
from test_ops import assert_same_fields, generator, int32
from triton_device import DEVICE, run

INF, NAN = float("inf"), float("nan")


def check(logits: torch.Tensor, log_alpha: torch.Tensor, top_k: torch.Tensor, max_candidates: int) -> Candidates:
    arguments = (logits, log_alpha, top_k, max_candidates)
    actual = run(ops._select_candidates_cuda, arguments)
    assert_same_fields(actual, reference.select_candidates(*arguments), "select_candidates", logits.dtype)
    return actual


@pytest.mark.parametrize(
    ("dtype", "batch", "vocab", "max_candidates"),
    [
        (torch.float32, 0, 5, 2),
        (torch.float32, 1, 1, 1),
        (torch.bfloat16, 2, 1, 4),
        (torch.float16, 5, 7, 20),
        (torch.bfloat16, 5, 1023, 32),
        (torch.float32, 5, 1025, 8),
        (torch.float16, 5, 3000, 64),
        (torch.float32, 5, 300, 1024),
    ],
    ids=str,
)
def test_matches_reference(dtype: torch.dtype, batch: int, vocab: int, max_candidates: int) -> None:
    """Rounded logits, so that many are equal, and different options in every row."""
    logits = (torch.randn(batch, vocab, generator=generator(vocab)) * 8).round().div(4).to(dtype)
    log_alpha = torch.tensor([math.log(0.1), 0.0, -INF, -1.0, math.log(0.5)])[:batch]
    result = check(logits, log_alpha, int32(0, 0, 6, 1, vocab + 9)[:batch], max_candidates)
    assert (result.count > 0).all()


@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [(torch.float32, 1), (torch.float16, 33), (torch.float32, 1030), (torch.bfloat16, 1030)],
    ids=str,
)
def test_special_rows(dtype: torch.dtype, vocab: int) -> None:
    rows = torch.randn(10, vocab, generator=generator(vocab))
    rows[0] = -INF
    rows[1] = NAN
    rows[2, -1] = NAN
    rows[3, 0] = INF
    rows[4] = -INF
    rows[4, vocab // 2] = -3.0  # one survivor
    rows[5] = 2.5  # all equal
    rows[6] = -INF
    rows[6, vocab // 2] = NAN  # NaN among nothing but -inf
    rows[7, vocab // 2] = -INF
    rows[8] = torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0)  # equal, though their bits differ
    rows[9] = 1e4 * rows[9].sign()
    for log_alpha, top_k in ((-1.0, 0), (-INF, 2), (-INF, 0)):
        result = check(rows.to(dtype), torch.full((10,), log_alpha), torch.full((10,), top_k).int(), 4)
        assert result.count[[0, 1, 2, 3, 6]].tolist() == [0] * 5
        assert result.count[4] == 1
        assert result.ids[5, : min(2, vocab)].tolist() == list(range(min(2, vocab)))


def test_cut_across_tiles() -> None:
    """Equal logits all over three tiles: exactly the lowest ids are kept, and a cut is noticed wherever it falls."""
    logits = torch.zeros(4, 2500)
    logits[1, 1:] = -9.0
    logits[2, :4] = 1.0
    logits[3, [0, 1500, 2000, 2499]] = 1.0
    result = check(logits, torch.full((4,), -0.5), int32(0, 0, 0, 0), 3)
    assert result.cut.tolist() == [True, False, True, True]
    assert result.ids[3].tolist() == [0, 1500, 2000]


def test_views_limit_the_vocabulary() -> None:
    """Rows of any stride; ids beyond the view are never candidates."""
    wide = torch.randn(4, 100, generator=generator(0))
    wide[:, 90:] = INF
    check(wide[:, 3:90], torch.full((4,), -1.0), int32(0, 0, 0, 0), 8)
    check(wide[::2, 50:90], torch.full((2,), -1.0), int32(0, 0), 8)
    check(wide[:1, :90].expand(4, 90), torch.full((4,), -1.0), int32(0, 0, 0, 0), 8)


@settings(max_examples=25)
@given(
    row=st.lists(
        st.sampled_from([-INF, INF, NAN, 0.0, -0.0]) | st.integers(-6, 6).map(lambda x: x / 2), min_size=1, max_size=70
    ),
    log_alpha=st.sampled_from([0.0, -0.5, -1.0, -2.5, -INF]),
    top_k=st.integers(0, 80),
    max_candidates=st.integers(1, 80),
)
def test_anything(row: list[float], log_alpha: float, top_k: int, max_candidates: int) -> None:
    check(torch.tensor([row]), torch.tensor([log_alpha]), int32(top_k), max_candidates)


def test_rows_are_independent() -> None:
    logits = torch.randn(4, 2500, generator=generator(1))
    log_alpha, top_k = torch.full((4,), -3.0), torch.zeros(4, dtype=torch.int32)
    together = run(ops._select_candidates_cuda, (logits, log_alpha, top_k, 8))
    for row in range(4):
        one = slice(row, row + 1)
        alone = run(ops._select_candidates_cuda, (logits[one].clone(), log_alpha[one], top_k[one], 8))
        for field_together, field_alone in zip(together, alone, strict=True):
            assert torch.equal(field_together[one], field_alone)


def test_rows_beyond_the_count_are_not_touched() -> None:
    logits = torch.randn(3, 1500, device=DEVICE)
    log_alpha, top_k = torch.full((3,), -1.0, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    expected = ops._select_candidates_cuda(logits, log_alpha, top_k, 4)
    outputs = Candidates(*(torch.full_like(field, 7) for field in expected))
    partials = kernel.empty_partials(3, 1500, 4, DEVICE)
    kernel.select_candidates(logits, log_alpha, top_k, 4, outputs, partials, int32(2).to(DEVICE))
    for field, whole in zip(outputs, expected, strict=True):
        assert torch.equal(field[:2], whole[:2])
        assert (field[2] == 7).all() or field.dtype == torch.bool


def test_beyond_int32_offsets(tmp_path: Path) -> None:
    """The second row begins 2**31 elements after the first; the file between them is a hole."""
    vocab = 40
    storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=2**31 + vocab, dtype=torch.bfloat16)
    logits = storage.as_strided((2, vocab), (2**31, 1))
    logits.copy_(torch.randn(2, vocab, generator=generator(2)))
    result = check(logits, torch.full((2,), -2.0), int32(0, 0), 8)
    assert result.logits[1, 0] == logits[1].max()


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(3, 9).double(), "logits: expected float32 or float16 or bfloat16 on .*, got float64"),
        (0, torch.zeros(9), r"logits: expected 2 dimensions, got shape \[9\]"),
        (0, torch.zeros(9, 3).t(), r"logits: expected a contiguous last dimension, got strides \[1, 3\]"),
        (0, torch.zeros(3, 0), "size of the vocabulary in logits: expected >= 1, got 0"),
        (1, torch.zeros(2), r"log_alpha: expected shape \[3\], got shape \[2\]"),
        (2, torch.zeros(3).long(), "candidate_top_k: expected int32 on .*, got int64"),
        (3, 0, "max_candidates: expected >= 1, got 0"),
        (3, 1025, r"max_candidates: expected in \[1, 1024\], got 1025"),
    ],
)
def test_refuses(index: int, value: object, message: str) -> None:
    arguments = [torch.zeros(3, 9), torch.zeros(3), int32(0, 0, 0), 4]
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        run(ops._select_candidates_cuda, arguments)


def test_refuses_a_workspace_of_another_size() -> None:
    arguments = [x.to(DEVICE) for x in (torch.zeros(3, 9), torch.zeros(3), int32(0, 0, 0))]
    outputs = ops._empty_candidates(*arguments, 4)
    with pytest.raises(ValueError, match=r"keys: expected shape \[3, 1, 5\], got shape \[3, 1, 6\]"):
        kernel.select_candidates(*arguments, 4, outputs, kernel.empty_partials(3, 9, 5, DEVICE))
