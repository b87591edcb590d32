"""The Triton kernels between the linear layers and attention, and around the layers, against the torch reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2_fast import kernel_ops, reference
from llm2_fast.kernels.branch_rows import branch_rows
from llm2_fast.kernels.commit import commit
from llm2_fast.kernels.embed import embed
from llm2_fast.kernels.gated_activation import gated_activation
from llm2_fast.kernels.rms_norm import rms_norm
from llm2_fast.kernels.rope_and_store import rope_and_store
from llm2_fast.kernels.score_head import score_head
from test_ops import generator, int32
from tolerances import TOLERANCES
from triton_device import DEVICE, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed + len(shape))).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, **options: Any) -> None:
    torch.testing.assert_close(actual.cpu(), expected, **TOLERANCES["kernels.rounding", expected.dtype], **options)


def moved(values: Any) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values]


# --- rows of branches -------------------------------------------------------------------------------------------------


def branch_inputs(batch: int, width: int) -> tuple[torch.Tensor, ...]:
    """Counts from 0 to the width."""
    ids = torch.randint(0, 1000, (batch, width), generator=generator(batch), dtype=torch.int32)
    count = torch.arange(batch, dtype=torch.int32) * 5 % (width + 1)
    return ids, count, torch.randint(0, 9999, (batch,), generator=generator(width), dtype=torch.int32)


@pytest.mark.parametrize(("batch", "width"), [(0, 3), (1, 1), (7, 3), (256, 2), (5, 256)])
def test_branch_rows(batch: int, width: int) -> None:
    arguments = branch_inputs(batch, width)
    for one, other in zip(run(kernel_ops._branch_rows_cuda, arguments), reference.branch_rows(*arguments), strict=True):
        assert torch.equal(one, other)


def test_branch_rows_that_do_not_fit_and_counts_out_of_range() -> None:
    """What is there stays; ids may be columns of a wider tensor."""
    ids, _, lengths = branch_inputs(4, 6)
    wanted = reference.branch_rows(ids[:, 1:5].contiguous(), int32(2, 0, 4, 3), lengths)
    for room in (0, 5, 7, 12):
        rows = [torch.full((room,), -7, dtype=torch.int32, device=DEVICE) for _ in range(3)]
        first_row, num_rows = (torch.full((n,), -7, dtype=torch.int32, device=DEVICE) for n in (5, 1))
        count = int32(2, -3, 9, 3)
        branch_rows(*moved((ids[:, 1:5], count, lengths)), first_row, *rows, num_rows)
        fitting = min(room, 9)
        assert num_rows.item() == fitting
        assert torch.equal(first_row.cpu(), wanted[0])
        for one, other in zip(rows, wanted[1:4], strict=True):
            assert torch.equal(one[:fitting].cpu(), other[:fitting])
            assert (one[fitting:] == -7).all()


def test_branch_rows_of_slots() -> None:
    """Lengths and rows are by slot, in any order, and the last slots of many are in use."""
    ids, count, lengths = branch_inputs(5, 4)
    slots, by_slot = int32(7, 1023, 0, 5, 3), torch.full((1024,), -7, dtype=torch.int32)
    by_slot[slots.long()] = lengths
    first_row, token, sequence, position, total = reference.branch_rows(ids, count, lengths)
    rows = [torch.full((20,), -7, dtype=torch.int32, device=DEVICE) for _ in range(3)]
    first, num_rows = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (6, 1))
    branch_rows(*moved((ids, count, by_slot)), first, *rows, num_rows, slots.to(DEVICE))
    end = total.item()
    assert torch.equal(first.cpu(), first_row)
    assert num_rows.item() == end
    for actual, expected in zip(rows, (token, slots[sequence.long()], position), strict=True):
        assert torch.equal(actual[:end].cpu(), expected[:end])
        assert (actual[end:] == -7).all()


# --- embed ------------------------------------------------------------------------------------------------------------


def embed_inputs(dtype: torch.dtype = torch.float32, hidden_size: int = 33, head_dim: int = 16) -> dict[str, Any]:
    """Two rotary tables, and positions up to a million."""
    half = head_dim // 2
    return {
        "row_token": int32(3, 0, 10, 3, 7),
        "row_position": int32(0, 1, 517, 131_071, 1_000_003),
        "embedding": randn(11, hidden_size, dtype=dtype),
        "scale": 5.65625,
        "inv_freq": torch.stack([base ** -(torch.arange(half) / half) for base in (10_000.0, 500_000.0)]),
        "rotary_scale": torch.tensor([1.0, 1.25]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed(dtype: torch.dtype) -> None:
    for inputs in (embed_inputs(dtype), embed_inputs(dtype, 1100, 2), embed_inputs(dtype, 1, 160)):
        for output_dtype in (None, torch.float32):
            arguments = (*inputs.values(), output_dtype)
            actual, expected = run(kernel_ops._embed_cuda, arguments), reference.embed(*arguments)
            assert actual[0].dtype == expected[0].dtype
            assert_close(actual[0].to(dtype), expected[0].to(dtype))  # values of `dtype` in both
            for one, other in zip(actual[1:], expected[1:], strict=True):
                assert_close(one, other)
    inputs |= {"row_token": int32(), "row_position": int32()}
    assert [x.shape for x in run(kernel_ops._embed_cuda, inputs.values())] == [(0, 1), (2, 0, 80), (2, 0, 80)]


def test_embed_strided_table_and_row_count() -> None:
    arguments = moved(embed_inputs().values())
    expected = kernel_ops._embed_cuda(*arguments)
    arguments[2] = torch.cat([arguments[2], arguments[2]], dim=1)[:, :33]
    outputs = [torch.full_like(x, 7) for x in expected]
    embed(*arguments, *outputs, int32(2).to(DEVICE))
    assert torch.equal(outputs[0][:2], expected[0][:2])
    assert (outputs[0][2:] == 7).all()
    for one, other in zip(outputs[1:], expected[1:], strict=True):
        assert torch.equal(one[:, :2], other[:, :2])
        assert (one[:, 2:] == 7).all()


def test_cosines_and_sines_are_exact_to_rounding() -> None:
    """Against float64, in every quadrant and at positions whose float32 angle exceeds 2**19."""
    inputs = embed_inputs(hidden_size=1, head_dim=2)
    positions = torch.randint(0, 2**20, (300,), generator=generator(0), dtype=torch.int32)
    inputs |= {"row_token": torch.zeros(300, dtype=torch.int32), "row_position": positions}
    _, cosine, sine = run(kernel_ops._embed_cuda, inputs.values())
    torch.testing.assert_close(cosine[0, :, 0].double(), positions.double().cos(), rtol=0, atol=1.2e-7)
    torch.testing.assert_close(sine[0, :, 0].double(), positions.double().sin(), rtol=0, atol=1.2e-7)


# --- rms_norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(0, 3), (1, 1), (3, 33), (2, 600)])
def test_rms_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual, weight = randn(rows, size, dtype=dtype), randn(rows, size, seed=1), randn(size, seed=2)
    for output_dtype in (None, torch.bfloat16):
        arguments = (x, weight, 1e-5, output_dtype)
        assert_close(run(kernel_ops._rms_norm_cuda, arguments), reference.rms_norm(*arguments))
    for stream in (residual, residual.half()):
        arguments = (x, stream, weight, 1e-5)
        actual, expected = run(kernel_ops._add_rms_norm_cuda, arguments), reference.add_rms_norm(*arguments)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_rms_norm_of_extreme_rows() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 1e30), torch.full((8,), NAN)])
    arguments = (x, torch.ones(8), 1e-6)
    assert_close(run(kernel_ops._rms_norm_cuda, arguments), reference.rms_norm(*arguments), equal_nan=True)


def test_rms_norm_in_place_and_row_count() -> None:
    x, residual, weight = moved((randn(4, 20), randn(4, 20, seed=1), randn(20)))
    expected, summed = kernel_ops._add_rms_norm_cuda(x, residual, weight, 1e-5)
    stream, output = residual.clone(), torch.full_like(x, 7)
    rms_norm(x, weight, 1e-5, stream, output, stream, int32(3).to(DEVICE))
    assert torch.equal(output[:3], expected[:3])
    assert torch.equal(stream[:3], summed[:3])
    assert (output[3] == 7).all()
    assert torch.equal(stream[3], residual[3])


# --- gated activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(name: str, dtype: torch.dtype) -> None:
    op, kernel = getattr(reference, name), getattr(kernel_ops, f"_{name}_cuda")
    for rows, size in ((0, 5), (3, 1), (2, 1100)):
        x = (randn(rows, 2 * size) * 3).to(dtype)
        assert_close(run(kernel, (x,)), op(x))
    gate = torch.tensor([[-1e4, -90.0, -0.0, 0.0, 90.0, 1e4, NAN]])
    x = torch.cat([gate, torch.ones_like(gate)], dim=1).to(dtype)
    assert_close(run(kernel, (x,)), op(x), equal_nan=True)


def test_gated_activation_row_count() -> None:
    x, output = randn(3, 8).to(DEVICE), torch.full((3, 4), 7.0, device=DEVICE)
    gated_activation(x, "silu_mul", output, int32(2).to(DEVICE))
    assert torch.equal(output[:2], kernel_ops._silu_mul_cuda(x)[:2])
    assert (output[2] == 7).all()


# --- rope_and_store ---------------------------------------------------------------------------------------------------


def rope_inputs(
    heads: tuple[int, int] = (3, 2), head_dim: int = 16, dtype: torch.dtype = torch.float32, norms: bool = False
) -> dict[str, Any]:
    """Five rows of three sequences in a cache of blocks of 4, three of them stored."""
    num_heads, num_kv_heads = heads
    angles = randn(5, head_dim // 2, seed=4) * 100
    return {
        "qkv": randn(5, (num_heads + 2 * num_kv_heads) * head_dim, seed=1),
        "cosine": angles.cos(),
        "sine": angles.sin(),
        "q_norm": randn(head_dim, seed=2) if norms else None,
        "k_norm": randn(head_dim, seed=3).to(dtype) if norms else None,
        "eps": 1e-6,
        "num_heads": num_heads,
        "key_cache": torch.full((7, num_kv_heads, 4, head_dim), 9.0, dtype=dtype),
        "value_cache": torch.full((7, num_kv_heads, 4, head_dim), 9.0, dtype=dtype),
        "block_table": torch.tensor([[3, 0], [6, 1], [2**31 - 1, 2**31 - 1]], dtype=torch.int32),
        "row_sequence": int32(0, 0, 1, 1, 2),
        "row_position": int32(3, 4, 7, 0, 5),
        "row_stored": torch.tensor([True, True, True, False, False]),
    }


def check_rope(inputs: dict[str, Any]) -> None:
    expected_inputs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    expected = reference.rope_and_store(**expected_inputs)
    arguments = dict(zip(inputs, moved(inputs.values()), strict=True))
    for one, other in zip(kernel_ops._rope_and_store_cuda(*arguments.values()), expected, strict=True):
        assert_close(one, other)
    for name in ("key_cache", "value_cache"):
        assert_close(arguments[name], expected_inputs[name])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 2), (torch.float16, 80), (torch.bfloat16, 64)], ids=str
)
def test_rope_and_store(dtype: torch.dtype, head_dim: int, norms: bool) -> None:
    check_rope(rope_inputs(head_dim=head_dim, dtype=dtype, norms=norms))


def test_rope_and_store_strided_cache() -> None:
    inputs = rope_inputs()
    cache = torch.full((7, 4, 2, 2, 16), 9.0)  # keys beside values, heads inside positions
    inputs["key_cache"], inputs["value_cache"] = cache.permute(3, 0, 2, 1, 4)
    check_rope(inputs)


def test_rope_and_store_row_count() -> None:
    arguments = moved(rope_inputs().values())
    caches = [cache.clone() for cache in arguments[7:9]]
    expected = kernel_ops._rope_and_store_cuda(*arguments)
    outputs = [torch.full_like(x, 7) for x in expected]
    rope_and_store(*arguments[:6], *caches, *arguments[9:], *outputs, int32(1).to(DEVICE))
    for one, other in zip(outputs, expected, strict=True):
        assert torch.equal(one[:1], other[:1])
        assert (one[1:] == 7).all()
    for cache, filled in zip(caches, arguments[7:9], strict=True):
        assert torch.equal(cache[3, :, 3], filled[3, :, 3])
        cache[3, :, 3] = 9.0
        assert (cache == 9).all()


# --- score_head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "num_units"), [(0, 4, 2), (1, 1, 1), (18, 70, 40), (3, 1100, 0)])
def test_score_head(dtype: torch.dtype, rows: int, features: int, num_units: int) -> None:
    hidden_states = randn(rows, features, dtype=dtype)
    dense = (
        (randn(num_units, features, seed=1) / features**0.5, randn(num_units, seed=2)) if num_units else (None, None)
    )
    num_inputs = num_units or features
    arguments = (hidden_states, *dense, randn(num_inputs, seed=3) / num_inputs**0.5, 0.5)
    assert_close(run(kernel_ops._score_head_cuda, arguments), reference.score_head(*arguments))


def test_score_head_rows_are_independent_and_counted() -> None:
    arguments = moved((randn(18, 70, dtype=torch.bfloat16), randn(20, 70), randn(20), randn(20, seed=1), 0.0))
    together = kernel_ops._score_head_cuda(*arguments)
    assert torch.equal(kernel_ops._score_head_cuda(arguments[0][5:6], *arguments[1:]), together[5:6])
    scores, units = torch.full((18,), 7.0, device=DEVICE), torch.empty(18, 20, device=DEVICE)
    score_head(*arguments, scores, units, int32(4).to(DEVICE))
    assert torch.equal(scores[:4], together[:4])
    assert (scores[4:] == 7).all()


# --- commit -----------------------------------------------------------------------------------------------------------


def commit_inputs(dtype: torch.dtype = torch.float32, num_kv_heads: int = 2, head_dim: int = 5) -> dict[str, Any]:
    """Three layers; sequences 2, 0 and 1 with branches of rows 0-1, 2 and 3-5; the second picks none."""
    cache = (3, 6, num_kv_heads, 4, head_dim)
    return {
        "index": int32(1, -1, 2),
        "first_row": int32(0, 2, 3),
        "row_sequence": int32(2, 2, 0, 1, 1, 1),
        "row_position": int32(4, 4, 9, 7, 7, 7),
        "own_key": randn(3, 6, num_kv_heads, head_dim, dtype=dtype),
        "own_value": randn(3, 6, num_kv_heads, head_dim, dtype=dtype, seed=1),
        "row_hidden_states": randn(6, 7, dtype=dtype),
        "block_table": torch.tensor([[-1, -1], [5, 2], [0, 4]], dtype=torch.int32),
        "key_cache": torch.full(cache, 9.0, dtype=dtype),
        "value_cache": torch.full(cache, 9.0, dtype=dtype),
        "hidden_states": torch.full((3, 7), 9.0, dtype=dtype),
        "lengths": int32(9, 7, 4),
    }


def check_commit(inputs: dict[str, Any]) -> None:
    expected = {name: x.clone() for name, x in inputs.items()}
    reference.commit(**expected)
    actual = dict(zip(inputs, moved(inputs.values()), strict=True))
    kernel_ops._commit_cuda(*actual.values())
    for name, tensor in expected.items():
        assert torch.equal(actual[name].cpu(), tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_commit(dtype: torch.dtype) -> None:
    inputs = commit_inputs(dtype)
    check_commit(inputs)
    inputs["index"] = int32(0, 0, 0)
    inputs["block_table"] = torch.tensor([[1, 2, 3], [5, 2, 0], [0, 4, 0]], dtype=torch.int32)
    check_commit(inputs)


def test_commit_without_sequences() -> None:
    inputs = commit_inputs()
    check_commit(inputs | {"index": int32(), "first_row": int32()})


def test_commit_strided_cache() -> None:
    inputs = commit_inputs()
    cache = torch.full((3, 6, 4, 2, 2, 5), 9.0)
    inputs["key_cache"], inputs["value_cache"] = cache.permute(4, 0, 1, 3, 2, 5)
    check_commit(inputs)


def test_commit_row_count() -> None:
    inputs = commit_inputs()
    arguments = dict(zip(inputs, moved(inputs.values()), strict=True))
    commit(**arguments, num_rows=int32(1).to(DEVICE))
    assert arguments["lengths"].tolist() == [9, 7, 5]


def test_commit_beyond_int32_offsets(tmp_path: Path) -> None:
    """The last layer begins 2**31 elements after the one before; the file between them is a hole."""
    inputs = commit_inputs(torch.bfloat16, num_kv_heads=1, head_dim=2)
    for name in ("key_cache", "value_cache"):
        storage = torch.from_file(str(tmp_path / name), shared=True, size=2**32 + 48, dtype=torch.bfloat16)
        inputs[name] = storage.as_strided((3, 6, 1, 4, 2), (2**31, 8, 8, 2, 1))
    expected = [inputs["own_key"][:, row, 0] for row in (1, 5)]
    arguments = dict(zip(inputs, moved(inputs.values()), strict=True))
    commit(**arguments)
    for (block, position), rows in zip(((4, 0), (2, 3)), expected, strict=True):
        assert torch.equal(arguments["key_cache"][:, block, 0, position].cpu(), rows)


# --- arguments that do not fit ----------------------------------------------------------------------------------------

BRANCHES = dict(zip(("ids", "count", "lengths"), branch_inputs(3, 2), strict=True))
NORM = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4), "weight": torch.ones(4), "eps": 1e-5}
SCORE = {
    "hidden_states": torch.zeros(3, 4),
    "dense_weight": torch.zeros(2, 4),
    "dense_bias": torch.zeros(2),
    "score_weight": torch.zeros(2),
}


@pytest.mark.parametrize(
    ("op", "inputs", "name", "change", "message"),
    [
        ("branch_rows", BRANCHES, "count", lambda x: x.long(), "count: expected int32 on .*, got int64"),
        ("branch_rows", BRANCHES, "lengths", lambda x: x[1:], r"lengths: expected shape \[3\], got shape \[2\]"),
        ("branch_rows", BRANCHES, "ids", lambda x: x.new_zeros(3, 2000), r"columns of ids: expected in \[1, 1024\]"),
        ("embed", embed_inputs(), "row_token", lambda x: x.long(), "row_token: expected int32 on .*, got int64"),
        ("embed", embed_inputs(), "embedding", lambda x: x.double(), "embedding: expected float32 or float16 or"),
        ("embed", embed_inputs(), "inv_freq", lambda x: x[:0], "rows of inv_freq: expected >= 1, got 0"),
        ("embed", embed_inputs(), "rotary_scale", lambda x: x[:1], r"rotary_scale: expected shape \[2\], got"),
        ("add_rms_norm", NORM, "x", lambda x: x.double(), "x: expected float32 or float16 or"),
        ("add_rms_norm", NORM, "weight", lambda x: x[:3], r"weight: expected shape \[4\], got shape \[3\]"),
        ("add_rms_norm", NORM, "residual", lambda x: x[:, :1], r"residual: expected shape \[3, 4\], got"),
        ("score_head", SCORE, "dense_bias", lambda _: None, "dense_bias and units: expected tensors"),
        ("score_head", SCORE, "score_weight", lambda x: x[:1], r"score_weight: expected shape \[2\], got shape \[1\]"),
        ("score_head", SCORE, "dense_weight", lambda x: x.half(), "dense_weight: expected float32 on .*, got float16"),
        ("rope_and_store", rope_inputs(), "qkv", lambda x: x[:, 1:], "features of queries, keys and values: expected"),
        ("rope_and_store", rope_inputs(), "cosine", lambda x: x.half(), "cosine: expected float32 on .*, got float16"),
        ("rope_and_store", rope_inputs(), "value_cache", lambda x: x[1:], "value_cache: expected shape"),
        ("rope_and_store", rope_inputs(), "row_stored", lambda x: x.int(), "row_stored: expected bool on .*, got"),
        ("commit", commit_inputs(), "lengths", lambda x: x.long(), "lengths: expected int32 on .*, got int64"),
        ("commit", commit_inputs(), "own_value", lambda x: x[:2], "own_value: expected shape"),
        ("commit", commit_inputs(), "key_cache", lambda x: x.half(), "key_cache: expected float32 on .*, got float16"),
    ],
)  # fmt: skip
def test_refuses(op: str, inputs: dict[str, Any], name: str, change: Callable, message: str) -> None:
    assert name in inspect.signature(getattr(reference, op)).parameters
    with pytest.raises(ValueError, match=message):
        run(getattr(kernel_ops, f"_{op}_cuda"), (inputs | {name: change(inputs[name])}).values())


def test_gated_activation_refuses() -> None:
    with pytest.raises(ValueError, match="columns of x: expected an even number > 0, got 3"):
        run(kernel_ops._silu_mul_cuda, (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match="activation: expected one of 'silu_mul', 'gelu_tanh_mul', got 'relu'"):
        gated_activation(torch.zeros(2, 4), "relu", torch.zeros(2, 2))
