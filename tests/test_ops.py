"""The CPU ops, on every instruction-set tier of this machine, against the torch reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import llm2_fast
import llm2_fast_C  # without the extension there is nothing to test: fail, do not skip
from llm2_fast import ops, reference
from llm2_fast.reference import Candidates, Picked
from llm2_fast.rng import gumbel
from tolerances import TOLERANCES

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a fallback to the reference would warn


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in llm2_fast_C.cpu_isas():
        pytest.skip(f"this machine runs {', '.join(llm2_fast_C.cpu_isas())}")
    return request.param


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(name: str, actual: torch.Tensor, expected: torch.Tensor, op: str, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES.get((f"{op}.{name}" if name else op, dtype), {"rtol": 0.0, "atol": 0.0})
    torch.testing.assert_close(actual, expected, **tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}")


def assert_same_fields(actual: tuple, expected: tuple, op: str, dtype: torch.dtype) -> None:
    for name, actual_field, expected_field in zip(expected._fields, actual, expected, strict=True):
        assert_same(name, actual_field, expected_field, op, dtype)


# --- select_candidates ------------------------------------------------------------------------------------------------


def check_select(
    logits: torch.Tensor, log_alpha: torch.Tensor, top_k: torch.Tensor, max_candidates: int, isa: str | None = None
) -> Candidates:
    actual = ops._select_candidates_cpu(logits, log_alpha, top_k, max_candidates, isa)
    expected = reference.select_candidates(logits, log_alpha, top_k, max_candidates)
    assert_same_fields(actual, expected, "select_candidates", logits.dtype)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "vocab", "max_candidates"),
    [
        (0, 5, 2),
        (1, 1, 1),
        (2, 1, 4),
        (5, 7, 20),
        (5, 17, 3),
        (5, 63, 63),
        (5, 1023, 32),
        (5, 1025, 8),
        (5, 4099, 5000),
        (2, 300_001, 32),  # more than 256 blocks of 1,024
    ],
)
def test_select_matches_reference(isa: str, dtype: torch.dtype, batch: int, vocab: int, max_candidates: int) -> None:
    """Rounded logits, so that many are equal, and different options in every row."""
    logits = (torch.randn(batch, vocab, generator=generator(vocab)) * 8).round().div(4).to(dtype)
    log_alpha = torch.tensor([math.log(0.1), 0.0, -INF, -1.0, math.log(0.5)])[:batch]
    top_k = int32(0, 0, 6, 1, vocab + 9)[:batch]
    result = check_select(logits, log_alpha, top_k, max_candidates, isa)
    assert (result.count > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 1024, 3000])
def test_select_special_rows(isa: str, dtype: torch.dtype, vocab: int) -> None:
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
    rows[9] = 1e30 * rows[9].sign()
    logits = rows.to(dtype)
    for log_alpha in (0.0, -1.0, -INF):
        for top_k in (0, 2):
            result = check_select(logits, torch.full((10,), log_alpha), torch.full((10,), top_k).int(), 4, isa)
            assert result.count[[0, 1, 2, 3, 6]].tolist() == [0] * 5
            assert result.logsumexp[[0, 1, 2, 3, 6]].isnan().all()
            assert result.count[4] == 1
            assert result.ids[5, : min(2, vocab)].tolist() == list(range(min(2, vocab)))


def test_select_strided_rows(isa: str) -> None:
    wide = torch.randn(4, 100, generator=generator(0))
    log_alpha, top_k = torch.full((4,), -1.0), int32(0, 0, 0, 0)
    check_select(wide[:, 3:90], log_alpha, top_k, 8, isa)
    check_select(wide[::2, 50:], log_alpha[:2], top_k[:2], 8, isa)
    check_select(wide[:1].expand(4, 100), log_alpha, top_k, 8, isa)


_LOGIT = st.sampled_from([-INF, INF, NAN, 0.0, -0.0]) | st.integers(-6, 6).map(lambda x: x / 2)


@given(
    row=st.lists(_LOGIT, min_size=1, max_size=70),
    log_alpha=st.sampled_from([0.0, -0.5, -1.0, -2.5, -INF]),
    top_k=st.integers(0, 80),
    max_candidates=st.integers(1, 80),
)
def test_select_anything(row: list[float], log_alpha: float, top_k: int, max_candidates: int) -> None:
    for isa in llm2_fast_C.cpu_isas():
        check_select(torch.tensor([row]), torch.tensor([log_alpha]), int32(top_k), max_candidates, isa)


@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 300), log_alpha=st.floats(-8, 0, width=32))
def test_select_threshold(seed: int, vocab: int, log_alpha: float) -> None:
    """A token is selected if and only if it is within `log_alpha` of the maximum."""
    logits = torch.randn(1, vocab, generator=generator(seed))
    result = ops.select_candidates(logits, torch.tensor([log_alpha]), int32(0), vocab)
    selected = set(result.ids[0, : result.count].tolist())
    threshold = logits.max() + torch.tensor(log_alpha)
    assert selected == set((logits[0] >= threshold).nonzero().flatten().tolist())
    assert not result.cut


@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 300), max_candidates=st.integers(1, 20))
def test_select_follows_a_permutation(seed: int, vocab: int, max_candidates: int) -> None:
    logits = torch.randperm(vocab, generator=generator(seed)).unsqueeze(0) / 16  # no two are equal
    order = torch.randperm(vocab, generator=generator(seed + 1))
    plain = ops.select_candidates(logits, torch.tensor([-3.0]), int32(0), max_candidates)
    permuted = ops.select_candidates(logits[:, order].contiguous(), torch.tensor([-3.0]), int32(0), max_candidates)
    count = int(plain.count)
    assert torch.equal(order[permuted.ids[0, :count].long()].int(), plain.ids[0, :count])
    assert torch.equal(plain.logits, permuted.logits)


def test_select_rows_are_independent(isa: str) -> None:
    logits = torch.randn(6, 2500, generator=generator(1))
    log_alpha, top_k = torch.full((6,), -3.0), torch.zeros(6, dtype=torch.int32)
    together = ops._select_candidates_cpu(logits, log_alpha, top_k, 8, isa)
    for row in range(6):
        one = slice(row, row + 1)
        alone = ops._select_candidates_cpu(logits[one].clone(), log_alpha[one], top_k[one], 8, isa)
        for field_together, field_alone in zip(together, alone, strict=True):
            assert torch.equal(field_together[one], field_alone)


def test_select_beyond_int32_offsets(isa: str, tmp_path: Path) -> None:
    """The second row begins 2**31 elements after the first; the file between them is a hole."""
    vocab = 40
    storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=2**31 + vocab, dtype=torch.bfloat16)
    logits = storage.as_strided((2, vocab), (2**31, 1))
    logits.copy_(torch.randn(2, vocab, generator=generator(2)))
    result = check_select(logits, torch.full((2,), -2.0), int32(0, 0), 8, isa)
    assert result.logits[1, 0] == logits[1].max()


# --- adjust_and_pick --------------------------------------------------------------------------------------------------


def pick_inputs(batch: int, width: int, seed: int = 0, **replaced: torch.Tensor | None) -> dict[str, Any]:
    """Random arguments of `adjust_and_pick` with all candidates valid and every processor off."""
    rng = generator(seed)
    ids = torch.rand(batch, 3 * width, generator=rng).argsort(dim=-1)[:, :width]
    inputs = {
        "candidate_ids": ids.int(),
        "candidate_logits": torch.randn(batch, width, generator=rng) * 3,
        "count": torch.full((batch,), width, dtype=torch.int32),
        "scores": torch.randn(batch, width, generator=rng) * 4,
        "beta": torch.full((batch,), 0.25),
        "seen": None,
        "repetition_penalty": torch.ones(batch),
        "temperature": torch.zeros(batch),
        "top_k": torch.zeros(batch, dtype=torch.int32),
        "top_p": torch.ones(batch),
        "log_min_p": torch.full((batch,), -INF),
        "seed": torch.randint(-(2**62), 2**62, (batch,), generator=rng),
        "step": torch.randint(0, 2**31, (batch,), generator=rng).int(),
        "sample_index": torch.randint(0, 2**31, (batch,), generator=rng).int(),
        "request_id": torch.randint(0, 2**31, (batch,), generator=rng).int(),
        "eos_token_ids": torch.full((batch, 1), -1, dtype=torch.int32),
    }
    return inputs | replaced


def run_pick(inputs: dict[str, Any], isa: str | None = None) -> Picked:
    return ops._adjust_and_pick_cpu(*inputs.values(), isa=isa)


def check_pick(inputs: dict[str, Any], isa: str | None = None) -> Picked:
    actual = run_pick(inputs, isa)
    assert_same_fields(actual, reference.adjust_and_pick(**inputs), "adjust_and_pick", torch.float32)
    return actual


def processors(batch: int, width: int) -> dict[str, torch.Tensor]:
    """Every processor alone, all together, and none, row after row; half of the rows sampled."""

    def cycle(*values: float) -> torch.Tensor:
        return torch.tensor([values[row % len(values)] for row in range(batch)])

    return {
        "seen": torch.rand(batch, width, generator=generator(width)) < 0.5,
        "repetition_penalty": cycle(1.0, 1.0, 1.0, 1.0, 1.3, 1.1, 1.0),
        "temperature": cycle(0.7, 0.0, 1.0, 1.9),
        "top_k": cycle(0, 3, 0, 0, 0, 5, 0).int(),
        "top_p": cycle(1.0, 1.0, 0.8, 1.0, 1.0, 0.9, 1.0),
        "log_min_p": cycle(-INF, -INF, -INF, -2.0, -INF, -3.0, -INF),
    }


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("width", [1, 2, 5, 16, 33, 3000])
def test_pick_matches_reference(isa: str, width: int, scored: bool) -> None:
    batch = 56
    inputs = pick_inputs(batch, width, seed=width, **processors(batch, width))
    inputs["count"] = torch.randint(0, width + 2, (batch,), generator=generator(1)).int()  # 0, and one past the width
    if not scored:
        inputs["scores"] = None
    result = check_pick(inputs, isa)
    assert (result.index >= 0).equal(inputs["count"] > 0)
    if scored and width > 1:
        assert (result.index != result.system1_index).any()


@pytest.mark.parametrize("width", [1, 7])
def test_pick_empty_batch(isa: str, width: int) -> None:
    check_pick(pick_inputs(0, width), isa)


def test_pick_ignores_what_is_past_the_count(isa: str) -> None:
    inputs = pick_inputs(3, 8, **processors(3, 8), count=int32(1, 3, 0))
    inputs["candidate_logits"][:, 3:] = NAN
    inputs["scores"][:, 3:] = INF
    inputs["candidate_ids"][:, 3:] = -1
    result = check_pick(inputs, isa)
    assert result.index.tolist()[0] == 0
    assert result.index.tolist()[2] == -1


def test_pick_undecided_rows(isa: str) -> None:
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
    result = check_pick(inputs, isa)
    assert (result.index >= 0).tolist() == [False] * 6 + [True] * 2
    assert not result.finished[:6].any()


def test_pick_zero_beta_times_infinity_is_undecided(isa: str) -> None:
    inputs = pick_inputs(1, 3, beta=torch.zeros(1))
    inputs["scores"][0, 1] = -INF
    assert check_pick(inputs, isa).index.item() == -1


def test_pick_ties_go_to_the_lowest_id(isa: str) -> None:
    ids = int32(9, 4, 7, 2, 8, 5).expand(3, 6)
    z = torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0, 1.0]).expand(3, 6)
    inputs = pick_inputs(
        3, 6, candidate_ids=ids, candidate_logits=z, scores=None, temperature=torch.tensor([0.0, 1.0, 1.0])
    )
    inputs["top_k"] = int32(0, 1, 0)
    inputs["top_p"] = torch.tensor([1.0, 1.0, 0.01])
    assert check_pick(inputs, isa).token.tolist() == [4, 4, 4]


def test_pick_finished(isa: str) -> None:
    inputs = pick_inputs(4, 5, eos_token_ids=torch.full((4, 3), -1, dtype=torch.int32))
    tokens = run_pick(inputs, isa).token
    inputs["eos_token_ids"][1, 2] = tokens[1]
    inputs["eos_token_ids"][2, 0] = tokens[1] + 1000
    assert check_pick(inputs, isa).finished.tolist() == [False, True, False, False]
    inputs["eos_token_ids"] = torch.empty(4, 0, dtype=torch.int32)
    assert not check_pick(inputs, isa).finished.any()


def test_pick_strided_rows(isa: str) -> None:
    """Plain decoding shares one row of ids among all, and views of wider buffers are accepted."""
    wide = pick_inputs(6, 40, **processors(6, 40))
    narrow = {name: x[:, 3:20] if x is not None and x.ndim == 2 else x for name, x in wide.items()}
    narrow["candidate_ids"] = torch.arange(17, dtype=torch.int32).expand(6, 17)
    narrow["count"] = torch.full((6,), 17, dtype=torch.int32)
    check_pick(narrow, isa)


def test_pick_over_a_whole_vocabulary(isa: str) -> None:
    vocab, batch = 30_000, 8
    inputs = pick_inputs(batch, 1, **processors(batch, vocab), scores=None)
    inputs["candidate_ids"] = torch.arange(vocab, dtype=torch.int32).expand(batch, vocab)
    inputs["candidate_logits"] = torch.randn(batch, vocab, generator=generator(3)) * 2
    inputs["count"] = torch.full((batch,), vocab, dtype=torch.int32)
    check_pick(inputs, isa)


def test_pick_rows_are_independent(isa: str) -> None:
    inputs = pick_inputs(14, 50, **processors(14, 50))
    together = run_pick(inputs, isa)
    for row in range(14):
        one = {name: x if x is None else x[row : row + 1].clone() for name, x in inputs.items()}
        for field_together, field_alone in zip(together, run_pick(one, isa), strict=True):
            assert torch.equal(field_together[row : row + 1], field_alone)


@given(
    seed=st.integers(0, 10**6),
    rows=st.lists(st.lists(st.integers(-4, 4), min_size=9, max_size=9), min_size=1, max_size=6),
    count=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 0.5]),
    top_k=st.integers(0, 10),
    log_min_p=st.sampled_from([-INF, -1.0, 0.0]),
)
def test_picked_token_is_a_candidate(
    seed: int, rows: list[list[int]], count: int, temperature: float, top_k: int, log_min_p: float
) -> None:
    batch = len(rows)
    inputs = pick_inputs(batch, 9, seed, candidate_logits=torch.tensor(rows, dtype=torch.float32))
    inputs["scores"] = inputs["scores"].round()
    inputs |= {"count": torch.full((batch,), count).int(), "temperature": torch.full((batch,), temperature)}
    inputs |= {"top_k": torch.full((batch,), top_k).int(), "log_min_p": torch.full((batch,), log_min_p)}
    result = check_pick(inputs)
    for row in range(batch):
        index = int(result.index[row])
        assert -1 <= index < count or (count == 0 and index == -1)
        assert result.token[row] == (inputs["candidate_ids"][row, index] if index >= 0 else -1)


def draws(logits: torch.Tensor, count: int, **options: float) -> torch.Tensor:
    """How often each token is drawn in `count` draws that differ in their step only."""
    width = len(logits)
    inputs = pick_inputs(count, 1, scores=None, temperature=torch.ones(count))
    inputs |= {name: torch.full((count,), value, dtype=inputs[name].dtype) for name, value in options.items()}
    inputs["candidate_ids"] = torch.arange(width, dtype=torch.int32).expand(count, width)
    inputs["candidate_logits"] = logits.expand(count, width)
    inputs["count"] = torch.full((count,), width, dtype=torch.int32)
    inputs |= {"seed": torch.full((count,), 1234), "step": torch.arange(count, dtype=torch.int32)}
    inputs |= {name: torch.zeros(count, dtype=torch.int32) for name in ("sample_index", "request_id")}
    return ops.adjust_and_pick(**inputs).index.bincount(minlength=width)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.7}, {"log_min_p": -1.0}, {"top_k": 12, "top_p": 0.9}],
    ids=str,
)
def test_sampling_frequencies(options: dict[str, float]) -> None:
    """Chi-square of the drawn tokens against the softmax of what the processors leave."""
    count, logits = 20_000, torch.randn(24, generator=generator(4)) * 0.7
    drawn = draws(logits, count, **options).double()

    ids = torch.arange(24).unsqueeze(0)
    given_options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "log_min_p": -INF} | options
    columns = {name: torch.tensor([value]) for name, value in given_options.items()}
    kept = reference.process_logits(logits.unsqueeze(0), ids, None, torch.ones(1), **columns)[0]
    expected = kept.double().softmax(dim=-1) * count
    support = expected > 0
    assert drawn[~support].sum() == 0
    freedom = int(support.sum()) - 1
    chi_square = ((drawn - expected)[support] ** 2 / expected[support]).sum().item()
    assert expected[support].min() > 5  # or the bound would not hold
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("top_k", [1, 2, 7, 30])
def test_top_k_leaves_exactly_k(top_k: int) -> None:
    """Equal logits: every token that is left turns up, the lowest ids are left."""
    drawn = draws(torch.zeros(20), 3000, top_k=top_k)
    assert drawn.nonzero().flatten().tolist() == list(range(min(top_k, 20)))


def test_noise_is_that_of_the_reference(isa: str) -> None:
    """Read the noise of one token against another, whose logit is moved until the pick changes."""
    ids = torch.tensor([[5, 6]], dtype=torch.int32)
    inputs = pick_inputs(1, 2, candidate_ids=ids, scores=None, temperature=torch.ones(1))
    noise = gumbel(ids, *(inputs[name] for name in ("step", "sample_index", "request_id", "seed")))[0]
    gap = (noise[0] - noise[1]).item()
    tolerance = 10 * TOLERANCES["gumbel", torch.float32]["atol"]
    for shift, index in ((gap - tolerance, 0), (gap + tolerance, 1)):
        inputs["candidate_logits"] = torch.tensor([[0.0, shift]])
        assert run_pick(inputs, isa).index.item() == index


# --- branch_attention -------------------------------------------------------------------------------------------------


def attention_inputs(
    lengths: list[int],
    own: list[bool],
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    block_size: int = 16,
    sliding_window: int = 0,
    dtype: torch.dtype = torch.float32,
    sequences: list[int] | None = None,
) -> dict[str, Any]:
    """Random arguments of `branch_attention`: rows in sequence order, blocks shuffled, unused blocks out of range."""
    rng = generator(len(lengths) * 1000 + head_dim)
    rows, (num_heads, num_kv_heads) = len(lengths), heads
    sequences = [row // 3 for row in range(rows)] if sequences is None else sequences
    num_sequences = max(sequences, default=0) + 1
    max_blocks = max((-(-length // block_size) for length in lengths), default=0) + 1
    num_blocks = num_sequences * max_blocks + 2
    cache = (2, num_blocks, num_kv_heads, block_size, head_dim)
    table = (
        torch.randperm(num_blocks, generator=rng)[: num_sequences * max_blocks].view(num_sequences, max_blocks).int()
    )
    for sequence in range(num_sequences):
        longest = max((length for s, length in zip(sequences, lengths, strict=True) if s == sequence), default=0)
        table[sequence, -(-longest // block_size) :] = 2**31 - 1
    keys, values = torch.randn(cache, generator=rng).to(dtype)
    own_keys, own_values = torch.randn(2, rows, num_kv_heads, head_dim, generator=rng).to(dtype)
    return {
        "query": torch.randn(rows, num_heads, head_dim, generator=rng).to(dtype),
        "key_cache": keys,
        "value_cache": values,
        "block_table": table,
        "row_sequence": int32(*sequences),
        "row_prefix_length": int32(*lengths),
        "row_has_own": torch.tensor(own, dtype=torch.bool),
        "own_key": own_keys,
        "own_value": own_values,
        "scale": head_dim**-0.5,
        "sliding_window": sliding_window,
    }


def run_attention(inputs: dict[str, Any], isa: str | None = None) -> torch.Tensor:
    return ops._branch_attention_cpu(*inputs.values(), isa=isa)


def check_attention(inputs: dict[str, Any], isa: str | None = None) -> torch.Tensor:
    actual = run_attention(inputs, isa)
    assert_same("", actual, reference.branch_attention(**inputs), "branch_attention", inputs["query"].dtype)
    return actual


LENGTHS = [0, 0, 5, 63, 64, 65, 130, 128, 1]
OWN = [True, False, True, False, True, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (7, 1), (10, 2)])
@pytest.mark.parametrize("head_dim", [1, 5, 16, 33, 64, 80, 128])
def test_attention_matches_reference(isa: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    output = check_attention(attention_inputs(LENGTHS, OWN, heads, head_dim, dtype=dtype), isa)
    assert not output[1].any()  # it sees nothing


@pytest.mark.parametrize("block_size", [1, 3, 16, 100])
@pytest.mark.parametrize("sliding_window", [0, 1, 2, 50, 64, 1000])
def test_attention_blocks_and_windows(isa: str, block_size: int, sliding_window: int) -> None:
    check_attention(attention_inputs(LENGTHS, OWN, block_size=block_size, sliding_window=sliding_window), isa)


def test_attention_without_rows(isa: str) -> None:
    assert check_attention(attention_inputs([], []), isa).shape == (0, 6, 16)


def test_attention_strided_arguments(isa: str) -> None:
    """Query, key and value as parts of one projection, and a cache with keys beside values."""
    inputs = attention_inputs(LENGTHS, OWN)
    projected = torch.randn(9, 6 + 2 + 2, 16, generator=generator(5))
    inputs["query"], inputs["own_key"], inputs["own_value"] = projected.split([6, 2, 2], dim=1)
    cache = torch.stack([inputs["key_cache"], inputs["value_cache"]], dim=3).transpose(1, 2)
    cache = cache.contiguous().transpose(1, 2)
    inputs["key_cache"], inputs["value_cache"] = cache.unbind(3)
    assert not inputs["key_cache"].is_contiguous()
    check_attention(inputs, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window", [0, 40])
def test_attention_rows_are_independent(isa: str, dtype: torch.dtype, sliding_window: int) -> None:
    """Bitwise the same alone, in reverse order and among many rows of the same sequence."""
    lengths = [length + row for row, length in enumerate([130, 130, 200, 17, 60, 90, 3, 130] * 5)]
    own = [row % 3 != 0 for row in range(40)]
    inputs = attention_inputs(lengths, own, head_dim=24, dtype=dtype, sequences=[0] * 40, sliding_window=sliding_window)
    per_row = ["query", "row_sequence", "row_prefix_length", "row_has_own", "own_key", "own_value"]
    together = run_attention(inputs, isa)
    reverse = run_attention(inputs | {name: inputs[name].flip(0) for name in per_row}, isa)
    assert torch.equal(reverse.flip(0), together)
    for row in range(40):
        alone = run_attention(inputs | {name: inputs[name][row : row + 1] for name in per_row}, isa)
        assert torch.equal(alone[0], together[row])


def test_attention_reads_visible_positions_only(isa: str) -> None:
    """NaN at every invisible position, and blocks without a visible one out of range."""
    inputs = attention_inputs([100, 100, 10], [True, False, True], sliding_window=20, sequences=[0, 0, 0])
    expected = reference.branch_attention(**inputs)
    for position in [*range(10, 80), *range(100, 112)]:
        block = inputs["block_table"][0, position // 16]
        inputs["key_cache"][block, :, position % 16] = NAN
        inputs["value_cache"][block, :, position % 16] = NAN
    inputs["own_key"][1] = NAN
    inputs["own_value"][1] = NAN
    inputs["block_table"][0, 1:5] = -1
    tolerance = TOLERANCES["branch_attention", torch.float32]
    torch.testing.assert_close(run_attention(inputs, isa), expected, **tolerance)


def test_attention_of_extreme_scores(isa: str) -> None:
    """Scores that are NaN, infinite or far apart, over several chunks of positions."""
    inputs = attention_inputs([150] * 5, [True] * 5, heads=(1, 1), head_dim=2, sequences=[0, 1, 2, 3, 4])
    inputs["query"][:] = torch.tensor([1.0, 0.0])
    inputs["scale"] = 1.0
    blocks = inputs["block_table"].long()
    inputs["key_cache"][blocks[0, 0], 0, 3, 0] = NAN
    inputs["key_cache"][blocks[1, 5], 0, 0, 0] = INF
    inputs["key_cache"][blocks[2, :5], 0, :, 0] = -INF  # the first chunk has nothing finite
    inputs["key_cache"][blocks[3, :10], 0, :, 0] = -INF
    inputs["own_key"][3, 0, 0] = -INF  # nothing finite at all
    inputs["key_cache"][blocks[4, 2], 0, 1, 0] = 1e30
    output = check_attention(inputs, isa)
    assert output[:, 0, 0].isnan().tolist() == [True, True, False, True, False]


def test_attention_beyond_int32_offsets(isa: str, tmp_path: Path) -> None:
    """The second block begins 2**31 elements after the first; the file between them is a hole."""
    inputs = attention_inputs([30], [True], heads=(2, 1), dtype=torch.bfloat16)
    for name in ("key_cache", "value_cache"):
        storage = torch.from_file(str(tmp_path / name), shared=True, size=2**31 + 256, dtype=torch.bfloat16)
        far = storage.as_strided((2, 1, 16, 16), (2**31, 256, 16, 1))
        inputs[name] = far.copy_(inputs[name][:2])
    inputs["block_table"] = torch.tensor([[1, 0]], dtype=torch.int32)
    check_attention(inputs, isa)


# --- arguments that do not fit ----------------------------------------------------------------------------------------

BAD_SELECT = [
    ("logits", lambda x: x.half(), "logits: expected float32 or bfloat16 on the CPU, got float16"),
    ("logits", lambda x: x[0], r"logits: expected 2 dimensions, got shape \[9\]"),
    ("logits", lambda x: x.t().contiguous().t(), r"logits: expected a contiguous last dimension, got strides \[1, 3\]"),
    ("logits", lambda x: x[:, :0], "size of the vocabulary in logits: expected >= 1, got 0"),
    ("log_alpha", lambda x: x.double(), "log_alpha: expected float32 on the CPU, got float64"),
    ("log_alpha", lambda x: x[:2], r"log_alpha: expected shape \[3\], got shape \[2\]"),
    ("log_alpha", lambda x: x[0].expand(3), r"log_alpha: expected a contiguous last dimension, got strides \[0\]"),
    ("candidate_top_k", lambda x: x.long(), "candidate_top_k: expected int32 on the CPU, got int64"),
    ("max_candidates", lambda x: 0, "max_candidates: expected >= 1, got 0"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_SELECT)
def test_select_refuses(name: str, change: Callable, message: str) -> None:
    inputs = {"logits": torch.zeros(3, 9), "log_alpha": torch.zeros(3), "candidate_top_k": int32(0, 0, 0)}
    inputs |= {"max_candidates": 4}
    with pytest.raises(ValueError, match=message):
        ops.select_candidates(**inputs | {name: change(inputs[name])})


BAD_PICK = [
    ("candidate_ids", lambda x: x.long(), "candidate_ids: expected int32"),
    ("candidate_ids", lambda x: x[0], r"candidate_ids: expected 2 dimensions, got shape \[5\]"),
    ("candidate_logits", lambda x: x.bfloat16(), "candidate_logits: expected float32 on the CPU, got bfloat16"),
    ("scores", lambda x: x[:, :4], r"scores: expected shape \[3, 5\], got shape \[3, 4\]"),
    ("seen", lambda x: torch.zeros(3, 5), "seen: expected bool on the CPU, got float32"),
    ("seed", lambda x: x.int(), "seed: expected int64 on the CPU, got int32"),
    ("temperature", lambda x: x.unsqueeze(0), r"temperature: expected 1 dimension, got shape \[1, 3\]"),
    ("eos_token_ids", lambda x: x[:1], r"eos_token_ids: expected shape \[3, 1\], got shape \[1, 1\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_PICK)
def test_pick_refuses(name: str, change: Callable, message: str) -> None:
    inputs = pick_inputs(3, 5)
    with pytest.raises(ValueError, match=message):
        ops.adjust_and_pick(**inputs | {name: change(inputs[name])})


BAD_ATTENTION = [
    ("query", lambda x: x.half(), "query: expected float32 or bfloat16 on the CPU, got float16"),
    ("query", lambda x: x[:, :5], "num_heads of query: expected a multiple of num_kv_heads = 2, got 5"),
    ("key_cache", lambda x: x.bfloat16(), "key_cache: expected float32 on the CPU, got bfloat16"),
    ("key_cache", lambda x: x[..., :8], r"key_cache: expected shape \[8, 2, 16, 16\], got shape \[8, 2, 16, 8\]"),
    ("value_cache", lambda x: x[1:], r"value_cache: expected shape \[8, 2, 16, 16\], got shape \[7, 2, 16, 16\]"),
    ("own_value", lambda x: x[:, :1], r"own_value: expected shape \[4, 2, 16\], got shape \[4, 1, 16\]"),
    ("block_table", lambda x: x.long(), "block_table: expected int32 on the CPU, got int64"),
    ("block_table", lambda x: x + 8, r"block_table\[0\]\[0\]: expected an index in \[0, 8\), got"),
    ("block_table", lambda x: -1 - x, r"block_table\[0\]\[0\]: expected an index in \[0, 8\), got -"),
    ("block_table", lambda x: x[:, :1], r"row_prefix_length\[0\]: expected a length in \[0, 16\], got 20"),
    ("row_sequence", lambda x: x + 2, r"row_sequence\[0\]: expected an index in \[0, 2\), got 2"),
    ("row_sequence", lambda x: x - 1, r"row_sequence\[0\]: expected an index in \[0, 2\), got -1"),
    ("row_prefix_length", lambda x: -x, r"row_prefix_length\[0\]: expected a length in \[0, 48\], got -20"),
    ("sliding_window", lambda x: -1, "sliding_window: expected >= 0, got -1"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_ATTENTION)
def test_attention_refuses(name: str, change: Callable, message: str) -> None:
    inputs = attention_inputs([20, 20, 20, 20], [True] * 4)
    with pytest.raises(ValueError, match=message):
        ops.branch_attention(**inputs | {name: change(inputs[name])})


# --- the extension module ---------------------------------------------------------------------------------------------


def module_arguments() -> list[Any]:
    """Arguments of `llm2_fast_C.select_candidates` as numpy arrays that are not yet capsules."""
    arrays = [np.zeros((2, 9), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int32), 4]
    arrays += [np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float32), np.zeros(2, np.int32), np.zeros(2, np.float32)]
    return [*arrays, np.zeros(2, bool)]


def as_capsules(arrays: list[Any], **options: Any) -> list[Any]:
    return [array.__dlpack__(**options) if isinstance(array, np.ndarray) else array for array in arrays]


@pytest.mark.parametrize("options", [{}, {"max_version": (1, 0)}], ids=["unversioned", "versioned"])
def test_capsules_are_released(options: dict[str, Any]) -> None:
    """After a call, and after one that raised, nobody else holds the arrays."""
    arrays = module_arguments()
    references = [sys.getrefcount(array) for array in arrays]
    capsules = as_capsules(arrays, **options)
    kind = '"dltensor_versioned"' if options else '"dltensor"'
    assert kind in repr(capsules[0])
    llm2_fast_C.select_candidates(*capsules)
    assert arrays[4].tolist() == [[0, 1, 2, 3]] * 2
    bad = as_capsules(arrays, **options)
    bad[-1] = arrays[-1].astype(np.int32).__dlpack__(**options)
    with pytest.raises(ValueError, match="cut: expected bool on the CPU, got int32"):
        llm2_fast_C.select_candidates(*bad)
    del capsules, bad
    assert [sys.getrefcount(array) for array in arrays] == references


def test_capsules_are_used_once() -> None:
    capsules = as_capsules(module_arguments())
    llm2_fast_C.select_candidates(*capsules)
    with pytest.raises(ValueError, match="logits: expected an unused DLPack capsule, got PyCapsule"):
        llm2_fast_C.select_candidates(*capsules)
    with pytest.raises(ValueError, match="logits: expected an unused DLPack capsule, got list"):
        llm2_fast_C.select_candidates([], *capsules[1:])


def test_read_only_outputs_are_refused() -> None:
    arrays = module_arguments()
    arrays[4].flags.writeable = False
    with pytest.raises(ValueError, match="ids: expected a tensor that can be written to, got a read-only one"):
        llm2_fast_C.select_candidates(*as_capsules(arrays, max_version=(1, 0)))


def test_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa: expected a tier that this build and CPU can run \(portable.*'sse9'"):
        ops._select_candidates_cpu(torch.zeros(1, 3), torch.zeros(1), int32(0), 2, "sse9")


# --- registration -----------------------------------------------------------------------------------------------------

OPERATORS = torch.ops.llm2_fast


def samples() -> list[tuple[Any, tuple]]:
    select = (torch.randn(3, 50), torch.full((3,), -2.0), int32(0, 3, 0), 8)
    pick = pick_inputs(5, 6, **processors(5, 6))
    without_scores = pick | {"scores": None, "seen": None}
    return [
        (OPERATORS.select_candidates, select),
        (OPERATORS.select_candidates, (select[0].bfloat16(), *select[1:])),
        (OPERATORS.adjust_and_pick, tuple(pick.values())),
        (OPERATORS.adjust_and_pick, tuple(without_scores.values())),
        (OPERATORS.branch_attention, tuple(attention_inputs(LENGTHS, OWN).values())),
        (OPERATORS.branch_attention, tuple(attention_inputs(LENGTHS, OWN, dtype=torch.bfloat16).values())),
    ]


@pytest.mark.parametrize("index", range(6))
def test_opcheck(index: int) -> None:
    operator, inputs = samples()[index]
    torch.library.opcheck(operator.default, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    """One graph for a whole step, the same results."""
    logits, rest = torch.randn(4, 60, generator=generator(6)), (torch.full((4,), -3.0), int32(0, 0, 3, 1), 8)
    options = pick_inputs(4, 8, **processors(4, 8))
    attention = attention_inputs(LENGTHS[:4], OWN[:4])

    def step(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        candidates = ops.select_candidates(logits, *rest)
        chosen = {"candidate_ids": candidates.ids, "candidate_logits": candidates.logits, "count": candidates.count}
        picked = ops.adjust_and_pick(**{**options, **chosen})
        return picked.token, picked.logprob, ops.branch_attention(**attention) + picked.token.view(-1, 1, 1)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for actual, expected in zip(compiled(logits), step(logits), strict=True):
        assert torch.equal(actual, expected)


def test_ops_run_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    for name in ("select_candidates", "adjust_and_pick", "branch_attention"):
        monkeypatch.setattr(reference, name, refuse)
    for operator, inputs in samples():
        operator.default(*inputs)


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter that finds this package first."""
    path = os.pathsep.join([str(cwd), str(Path(llm2_fast.__file__).parents[1]), str(Path(llm2_fast_C.__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path} | environment
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_tier_can_be_capped(tmp_path: Path, isa: str) -> None:
    code = "import llm2_fast_C; print(llm2_fast_C.cpu_isa())"
    assert run_python(code, tmp_path, LLM2_FAST_CPU_ISA=isa).strip() == isa


def test_unknown_cap_is_an_error_at_every_use(tmp_path: Path) -> None:
    code = """
import torch
from llm2_fast import ops
for _ in range(2):
    try:
        ops.select_candidates(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, dtype=torch.int32), 2)
    except ValueError as error:
        print(error)
"""
    lines = run_python(code, tmp_path, LLM2_FAST_CPU_ISA="avx1024").splitlines()
    expected = f"can run ({', '.join(llm2_fast_C.cpu_isas())}), got 'avx1024'"
    assert lines == [f"LLM2_FAST_CPU_ISA: expected a tier that this build and CPU {expected}"] * 2


FALLBACK = """
import sys, warnings
{hide}
import torch
from llm2_fast import ops, reference
arguments = torch.randn(2, 9), torch.full((2,), -1.0), torch.zeros(2, dtype=torch.int32), 4
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        result = ops.select_candidates(*arguments)
for one, other in zip(result, reference.select_candidates(*arguments)):
    assert torch.equal(one, other)
assert ops.cpu_extension() is None
assert [w.category for w in caught] == [RuntimeWarning], caught
print(caught[0].message)
"""


def test_missing_extension_is_reported_once(tmp_path: Path) -> None:
    output = run_python(FALLBACK.format(hide="sys.modules['llm2_fast_C'] = None"), tmp_path)
    assert "llm2_fast_C is not built" in output
    assert "build_ext --inplace" in output
    assert "torch reference" in output


def test_broken_extension_is_reported_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "llm2_fast_C.py").write_text("raise ImportError('undefined symbol: frobnicate')")
    output = run_python(FALLBACK.format(hide=""), tmp_path)
    assert "failed to load (undefined symbol: frobnicate)" in output
    assert "torch reference" in output
