"""The Triton kernel of `adjust_and_pick` against the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from llm2_fast import ops, reference, rng
from llm2_fast.kernels import adjust_and_pick as kernel
from llm2_fast.kernels.gumbel import gumbel
from llm2_fast.reference import Picked
from test_ops import assert_same, assert_same_fields, int32, pick_inputs, processors
from triton_device import DEVICE, run, to_cpu

INF, NAN = float("inf"), float("nan")


def check(inputs: dict[str, Any]) -> Picked:
    actual = run(ops._adjust_and_pick_cuda, inputs.values())
    assert_same_fields(actual, reference.adjust_and_pick(**inputs), "adjust_and_pick", torch.float32)
    return actual


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("batch", "width"), [(3, 1), (4, 2), (28, 6), (9, 33)])
def test_matches_reference(batch: int, width: int, scored: bool) -> None:
    """Every processor alone and all together, and counts from 0 to one past the width."""
    inputs = pick_inputs(batch, width, seed=width, **processors(batch, width))
    inputs["count"] = torch.arange(batch, dtype=torch.int32) % (width + 2)
    if not scored:
        inputs["scores"] = None
    result = check(inputs)
    assert (result.index >= 0).equal(inputs["count"] > 0)


def test_long_rows_match_reference() -> None:
    """More candidates than are compared with each other; the first row more than a block of them."""
    inputs = pick_inputs(2, 2100, seed=3, scores=None, temperature=torch.tensor([0.8, 1.0]))
    inputs["count"] = int32(2100, 150)
    inputs["candidate_logits"][1] = (inputs["candidate_logits"][1] / 3).round()
    inputs["top_k"], inputs["top_p"] = int32(0, 5), torch.tensor([0.7, 0.75])
    inputs["seen"] = torch.arange(2100).expand(2, 2100) % 3 == 0
    inputs["repetition_penalty"] = torch.full((2,), 1.2)
    check(inputs)


def test_long_rows_without_cutoffs() -> None:
    inputs = pick_inputs(4, 2100, seed=3, temperature=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    inputs["log_min_p"][2] = -1.0
    inputs["candidate_logits"][3, 2050] = NAN
    result = check(inputs)
    assert (result.index >= 0).tolist() == [True, True, True, False]
    assert (result.index != result.system1_index).any()


def test_empty_batch() -> None:
    check(pick_inputs(0, 7))


def test_ignores_what_is_past_the_count() -> None:
    inputs = pick_inputs(3, 8, **processors(3, 8), count=int32(1, 3, 0))
    inputs["candidate_logits"][:, 3:] = NAN
    inputs["scores"][:, 3:] = INF
    inputs["candidate_ids"][:, 3:] = -1
    assert (check(inputs).index >= 0).tolist() == [True, True, False]


def test_undecided_rows() -> None:
    inputs = pick_inputs(8, 4, temperature=torch.tensor([0.0, 1.0] * 4), eos_token_ids=torch.full((8, 2), -1).int())
    z, scores = inputs["candidate_logits"], inputs["scores"]
    z[0, 1] = NAN
    scores[1, 2] = NAN
    z[2, 3] = INF
    scores[3, 0] = INF
    z[4] = -INF
    scores[5] = -INF
    z[6, 1] = -INF  # one candidate out of the race is no problem
    scores[7, 0] = NAN  # nor is the score of an only candidate
    inputs["count"][7] = 1
    result = check(inputs)
    assert (result.index >= 0).tolist() == [False] * 6 + [True] * 2
    assert not result.finished[:6].any()


def test_zero_beta_times_infinity_is_undecided() -> None:
    inputs = pick_inputs(1, 3, beta=torch.zeros(1))
    inputs["scores"][0, 1] = -INF
    assert check(inputs).index.item() == -1


def test_overflow_at_a_small_temperature() -> None:
    """Logits that become infinite are equal to each other, and the lowest id wins."""
    inputs = pick_inputs(
        3, 4, scores=None, temperature=torch.full((3,), 1e-4), candidate_ids=int32(8, 3, 5, 4).expand(3, 4)
    )
    inputs["candidate_logits"] = torch.tensor([3e37, 2e37, 3e38, -3e38]).expand(3, 4)
    inputs["top_k"], inputs["top_p"] = int32(0, 2, 0), torch.tensor([1.0, 1.0, 0.5])
    assert check(inputs).token.tolist() == [3, 3, 3]


def test_ties_go_to_the_lowest_id() -> None:
    ids = int32(9, 4, 7, 2, 8, 5).expand(3, 6)
    z = torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0, 1.0]).expand(3, 6)
    inputs = pick_inputs(
        3, 6, candidate_ids=ids, candidate_logits=z, scores=None, temperature=torch.tensor([0.0, 1.0, 1.0])
    )
    inputs["top_k"] = int32(0, 1, 0)
    inputs["top_p"] = torch.tensor([1.0, 1.0, 0.01])
    assert check(inputs).token.tolist() == [4, 4, 4]


def test_finished() -> None:
    inputs = pick_inputs(4, 5, eos_token_ids=torch.full((4, 3), -1, dtype=torch.int32))
    tokens = check(inputs).token
    inputs["eos_token_ids"][1, 2] = tokens[1]
    inputs["eos_token_ids"][2, 0] = tokens[1] + 1000
    assert check(inputs).finished.tolist() == [False, True, False, False]
    inputs["eos_token_ids"] = torch.empty(4, 0, dtype=torch.int32)
    assert not check(inputs).finished.any()


def test_strided_rows() -> None:
    """Plain decoding shares one row of ids among all, and views of wider buffers are accepted."""
    wide = pick_inputs(6, 40, **processors(6, 40))
    narrow = {name: x[:, 3:20] if x is not None and x.ndim == 2 else x for name, x in wide.items()}
    narrow["candidate_ids"] = torch.arange(17, dtype=torch.int32).expand(6, 17)
    narrow["count"] = torch.full((6,), 17, dtype=torch.int32)
    check(narrow)


def test_packed_scores() -> None:
    """Scores of ragged rows, one row's after the other's."""
    inputs = pick_inputs(4, 6, **processors(4, 6))
    inputs["count"] = int32(2, 0, 6, 3)
    expected = run(ops._adjust_and_pick_cuda, inputs.values())
    inside = torch.arange(6) < inputs["count"].unsqueeze(1)
    packed = inputs | {"scores": inputs["scores"][inside]}
    arguments = {name: x if x is None else x.to(DEVICE) for name, x in packed.items()}
    outputs = ops._empty_picked(*arguments.values())
    kernel.adjust_and_pick(**arguments, outputs=outputs, first_row=int32(0, 2, 2, 8).to(DEVICE))
    for actual, wanted in zip(to_cpu(outputs), expected, strict=True):
        assert_same("", actual, wanted, "", torch.float32)


def test_rows_beyond_the_count_are_not_touched() -> None:
    inputs = pick_inputs(3, 5)
    expected = run(ops._adjust_and_pick_cuda, inputs.values())
    arguments = {name: x if x is None else x.to(DEVICE) for name, x in inputs.items()}
    outputs = Picked(*(torch.full_like(field, 7, device=DEVICE) for field in expected))
    kernel.adjust_and_pick(**arguments, outputs=outputs, num_rows=int32(2).to(DEVICE))
    for field, whole in zip(to_cpu(outputs), expected, strict=True):
        assert torch.equal(field[:2], whole[:2])
        assert (field[2] == 7).all() or field.dtype == torch.bool


def test_rows_are_independent() -> None:
    inputs = pick_inputs(7, 9, **processors(7, 9))
    together = run(ops._adjust_and_pick_cuda, inputs.values())
    for row in (0, 3, 6):
        one = [x if x is None else x[row : row + 1].clone() for x in inputs.values()]
        for field_together, field_alone in zip(together, run(ops._adjust_and_pick_cuda, one), strict=True):
            assert torch.equal(field_together[row : row + 1], field_alone)


@triton.jit
def _gumbel_kernel(token_ids, step, sample_index, request_id, seed, noise, SIZE: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, SIZE)
    counter = tl.load(step + row), tl.load(sample_index + row), tl.load(request_id + row)
    values = gumbel(tl.load(token_ids + at), counter[0], counter[1], counter[2], tl.load(seed + row))
    tl.store(noise + row * SIZE + at, values)


def test_noise_is_that_of_the_reference() -> None:
    """Over the whole range of every part of the counter and the key."""
    ids = int32(0, 1, 128_255, 2**31 - 1).to(DEVICE)
    parts = [int32(0, 1, 2**31 - 1), int32(5, 2**31 - 1, 0), int32(2**31 - 1, -7, 3)]
    seed = torch.tensor([0, -(2**63), 2**62 + 12345])
    noise = torch.empty(3, 4, device=DEVICE)
    _gumbel_kernel[(3,)](ids, *(x.to(DEVICE) for x in (*parts, seed)), noise, SIZE=4)
    assert_same("", noise.cpu(), rng.gumbel(ids.cpu().expand(3, 4), *parts, seed), "gumbel", torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("candidate_ids", lambda x: x.long(), "candidate_ids: expected int32"),
        ("candidate_ids", lambda x: x[0], r"candidate_ids: expected 2 dimensions, got shape \[5\]"),
        ("candidate_logits", lambda x: x.bfloat16(), "candidate_logits: expected float32 on .*, got bfloat16"),
        ("scores", lambda x: x[:, :4], r"scores: expected shape \[3, 5\], got shape \[3, 4\]"),
        ("seen", lambda x: torch.zeros(3, 5), "seen: expected bool on .*, got float32"),
        ("seed", lambda x: x.int(), "seed: expected int64 on .*, got int32"),
        ("temperature", lambda x: x.unsqueeze(0), r"temperature: expected 1 dimension, got shape \[1, 3\]"),
        ("eos_token_ids", lambda x: x[:1], r"eos_token_ids: expected shape \[3, 1\], got shape \[1, 1\]"),
    ],
)
def test_refuses(name: str, change: Callable, message: str) -> None:
    inputs = pick_inputs(3, 5)
    with pytest.raises(ValueError, match=message):
        run(ops._adjust_and_pick_cuda, (inputs | {name: change(inputs[name])}).values())
