"""The Triton kernels of `linear` and `lm_head_select` against the torch reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm2_fast import kernel_ops, ops, reference
from llm2_fast.kernels import linear as kernel
from llm2_fast.kernels import lm_head_select
from llm2_fast.reference import Candidates
from test_ops import assert_same_fields, generator, int32
from tolerances import TOLERANCES
from triton_device import DEVICE, run, to_cpu

INF, NAN = float("inf"), float("nan")


def inputs_of(
    rows: int,
    weight_rows: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    rank: int = 0,
    residual: bool = False,
    activation: str | None = None,
    output_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Random arguments of `linear` with results of unit variance."""
    rng = generator(rows * 1000 + in_features)

    def randn(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(of)

    out_features = weight_rows if activation is None else weight_rows // 2
    return {
        "x": randn(rows, in_features, of=dtype),
        "weight": (randn(weight_rows, in_features) / math.sqrt(in_features)).to(dtype),
        "bias": randn(weight_rows) if bias else None,
        "lora_hidden": randn(rows, rank, of=dtype) if rank else None,
        "lora_b": (randn(weight_rows, rank) / math.sqrt(rank)).to(dtype) if rank else None,
        "row_adapted": torch.arange(rows) % 3 != 1 if rank else None,
        "residual": randn(rows, out_features) if residual else None,
        "activation": activation,
        "dtype": output_dtype,
    }


def check(inputs: dict[str, Any]) -> torch.Tensor:
    actual = run(kernel_ops._linear_cuda, inputs.values())
    torch.testing.assert_close(actual, reference.linear(**inputs), **TOLERANCES["kernels.rounding", actual.dtype])
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "weight_rows", "in_features"), [(0, 5, 3), (1, 1, 1), (5, 33, 70), (17, 40, 300), (70, 20, 64)]
)
def test_matches_reference(dtype: torch.dtype, rows: int, weight_rows: int, in_features: int) -> None:
    check(inputs_of(rows, weight_rows, in_features, dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "residual": True},
        {"rank": 5, "bias": True},
        {"activation": "silu_mul"},
        {"activation": "gelu_tanh_mul", "bias": True, "rank": 20, "residual": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_features", [40, 600], ids=["one segment", "segments"])
def test_epilogues(in_features: int, options: dict[str, Any]) -> None:
    check(inputs_of(5, 34, in_features, torch.bfloat16, output_dtype=torch.float32, **options))


def normed_pair(inputs: dict[str, Any], num_rows: int | None = None) -> tuple[torch.Tensor, ...]:
    """Two products with a norm between them: what the first leaves, and the second."""
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    rows, (size, _), dtype = len(inputs["x"]), inputs["first"].shape, inputs["first"].dtype
    second, activation = inputs["second"], inputs["activation"]
    count = None if num_rows is None else int32(num_rows).to(DEVICE)
    stream = torch.full((rows, size), 7.0, device=DEVICE)
    weighted = kernel.WeightedRows.empty(rows, size, dtype, DEVICE)
    for tensor in weighted:
        tensor.fill_(7)
    output = torch.full((rows, len(second) // (2 if activation else 1)), 7.0, device=DEVICE)
    partials = [kernel.empty_partial(rows, inputs[name]) for name in ("first", "second")]
    kernel.linear(
        inputs["x"], inputs["first"], None, None, None, None, inputs["residual"], None, stream, partials[0], count,
        norm_weight=inputs["norm_weight"], weighted=weighted,
    )  # fmt: skip
    kernel.linear(
        weighted.values, second, inputs["bias"], None, None, None, None, activation, output, partials[1], count,
        squares=weighted.squares, eps=1e-5,
    )  # fmt: skip
    return to_cpu((stream, *weighted, output))


def pair_inputs(
    rows: int, in_features: int, size: int, weight_rows: int, dtype: torch.dtype, activation: str | None = None
) -> dict[str, Any]:
    """A residual stream of rows of different magnitude."""
    first = inputs_of(rows, size, in_features, dtype, residual=True)
    second = inputs_of(rows, weight_rows, size, dtype, bias=True)
    return {
        "x": first["x"],
        "first": first["weight"],
        "residual": first["residual"] * torch.logspace(-2, 2, rows).unsqueeze(1),
        "norm_weight": 1 + torch.randn(size, generator=generator(size)) / 4,
        "second": second["weight"],
        "bias": second["bias"],
        "activation": activation,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "in_features", "size", "weight_rows", "activation"),
    [
        (0, 3, 5, 3, None),
        (1, 1, 1, 1, None),
        (5, 70, 33, 20, "silu_mul"),
        (17, 30, 300, 33, None),
        (3, 300, 270, 9, None),
    ],
)
def test_norm_between_two_products(
    dtype: torch.dtype, rows: int, in_features: int, size: int, weight_rows: int, activation: str | None
) -> None:
    inputs = pair_inputs(rows, in_features, size, weight_rows, dtype, activation)
    stream, values, squares, output = normed_pair(inputs)
    expected = reference.linear(inputs["x"], inputs["first"], residual=inputs["residual"], dtype=torch.float32)
    rounding = TOLERANCES["kernels.rounding", torch.float32]
    torch.testing.assert_close(stream, expected, **rounding)
    torch.testing.assert_close(squares.sum(dim=1), expected.square().sum(dim=1), **rounding)
    weighted = (expected * inputs["norm_weight"]).to(dtype)
    torch.testing.assert_close(values, weighted, **TOLERANCES["kernels.rounding", dtype])
    normed = reference.rms_norm(expected, inputs["norm_weight"], 1e-5, dtype)
    expected = reference.linear(normed, inputs["second"], inputs["bias"], activation=activation, dtype=torch.float32)
    torch.testing.assert_close(output, expected, **TOLERANCES["kernels.normed_linear", dtype])


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 100), (torch.bfloat16, 40), (torch.bfloat16, 300)], ids=str
)
def test_bits_after_a_norm_do_not_depend_on_the_rows(dtype: torch.dtype, size: int) -> None:
    """With products that are exact, whatever the order in which numpy adds them up."""
    inputs = pair_inputs(70, 20, size, 40, dtype)
    for name in ("x", "first"):
        inputs[name] = (4 * inputs[name].float()).round().to(dtype)
    inputs["second"] = torch.eye(size)[:40].to(dtype)
    together = normed_pair(inputs)
    for rows in (slice(2, 3), slice(60, 70), slice(20, 50)):
        part = normed_pair(inputs | {name: inputs[name][rows] for name in ("x", "residual")})
        for one, other in zip(part, together, strict=True):
            assert torch.equal(one, other[rows])


def test_norm_of_zero_and_nan_rows_and_rows_beyond_the_count() -> None:
    inputs = pair_inputs(5, 20, 100, 40, torch.float32)
    for name in ("x", "residual"):
        inputs[name][0], inputs[name][1, 3] = 0.0, NAN
    stream, values, squares, output = normed_pair(inputs, num_rows=3)
    assert torch.equal(output[0], inputs["bias"])
    assert output[1].isnan().all()
    assert output[2].isfinite().all()
    for tensor in (stream, values, squares, output):
        assert (tensor[3:] == 7).all()


def test_long_rows_have_longer_sums_of_squares() -> None:
    inputs = pair_inputs(2, 3, 5000, 5, torch.bfloat16)
    stream, _, squares, output = normed_pair(inputs)
    assert squares.shape == (2, 157)  # of 32 features each
    torch.testing.assert_close(squares[:, 156], stream[:, 4992:].square().sum(dim=1))
    normed = reference.rms_norm(stream, inputs["norm_weight"], 1e-5, torch.bfloat16)
    expected = reference.linear(normed, inputs["second"], inputs["bias"], dtype=torch.float32)
    torch.testing.assert_close(output, expected, **TOLERANCES["kernels.normed_linear", torch.bfloat16])


def test_rows_that_are_not_adapted_ignore_the_update() -> None:
    inputs = inputs_of(4, 20, 30, rank=4)
    inputs["lora_b"][3, 0] = INF
    actual = check(inputs)
    assert actual.isfinite().all(dim=1).tolist() == [False, True, False, False]


def test_strided_rows() -> None:
    inputs = inputs_of(5, 33, 70, residual=True, rank=4)
    for name in ("x", "weight", "lora_hidden", "lora_b", "residual"):
        wide = torch.zeros(inputs[name].shape[0], 2 * inputs[name].shape[1] + 3)
        wide[:, 3 : 3 + inputs[name].shape[1]] = inputs[name]
        inputs[name] = wide[:, 3 : 3 + inputs[name].shape[1]]
    check(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_rows(dtype: torch.dtype) -> None:
    """Alone, and among so many rows that programs have another shape."""
    inputs = inputs_of(70, 20, 600, dtype, rank=4, bias=True)
    per_row = ("x", "lora_hidden", "row_adapted")
    together = run(kernel_ops._linear_cuda, inputs.values())
    for rows in (slice(2, 3), slice(60, 70), slice(20, 50)):
        part = inputs | {name: inputs[name][rows] for name in per_row}
        assert torch.equal(run(kernel_ops._linear_cuda, part.values()), together[rows])


@pytest.mark.parametrize("in_features", [40, 600], ids=["one segment", "segments"])
def test_residual_in_place_and_row_count(in_features: int) -> None:
    inputs = inputs_of(20, 33, in_features, residual=True)
    expected = run(kernel_ops._linear_cuda, inputs.values())
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in list(inputs.values())[:-1]]
    before, output = inputs["residual"], arguments[6].clone()
    arguments[6] = output
    partial = kernel.empty_partial(20, arguments[1])
    kernel.linear(*arguments, output, partial, int32(7).to(DEVICE))
    assert torch.equal(output[:7].cpu(), expected[:7])
    assert torch.equal(output[7:].cpu(), before[7:])
    assert partial is None or not partial.counters.any()


def test_nan_stays_in_its_row_and_feature() -> None:
    inputs = inputs_of(3, 20, 40)
    clean = check(inputs)
    inputs["x"][1, 3] = NAN
    inputs["weight"][7, 2] = INF
    dirty = run(kernel_ops._linear_cuda, inputs.values())
    assert dirty[1].isnan().all()
    assert dirty[[0, 2], 7].isinf().all()
    others = [feature for feature in range(20) if feature != 7]
    assert torch.equal(dirty[[0, 2]][:, others], clean[[0, 2]][:, others])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x.double(), "x: expected float32 or float16 or bfloat16 on .*, got float64"),
        ("weight", lambda x: x.bfloat16(), "weight: expected float32 on .*, got bfloat16"),
        ("weight", lambda x: x[:, :3], r"weight: expected shape \[8, 6\], got shape \[8, 3\]"),
        ("weight", lambda x: x.t().contiguous().t(), "weight: expected a contiguous last dimension"),
        ("bias", lambda _: torch.zeros(7), r"bias: expected shape \[8\], got shape \[7\]"),
        ("residual", lambda _: torch.zeros(4, 7), r"residual: expected shape \[4, 8\], got shape \[4, 7\]"),
        ("activation", lambda _: "relu", "activation: expected None or one of 'silu_mul', 'gelu_tanh_mul', got 'relu'"),
        ("lora_b", lambda _: None, "expected all or none, got only lora_hidden, row_adapted"),
        ("row_adapted", lambda x: x.int(), "row_adapted: expected bool on .*, got int32"),
    ],
)
def test_refuses(name: str, change: Callable, message: str) -> None:
    inputs = inputs_of(4, 8, 6, rank=2)
    with pytest.raises(ValueError, match=message):
        run(kernel_ops._linear_cuda, (inputs | {name: change(inputs[name])}).values())


def test_refuses_what_does_not_belong_to_a_norm() -> None:
    arguments = (torch.zeros(2, 8), torch.zeros(6, 8), None, None, None, None, None)
    rest = (torch.zeros(2, 6), None)
    weighted = kernel.WeightedRows.empty(2, 6, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="norm_weight and weighted: expected both or none"):
        kernel.linear(*arguments, None, *rest, norm_weight=torch.zeros(6))
    with pytest.raises(ValueError, match="none with an activation"):
        kernel.linear(*arguments, "silu_mul", *rest, norm_weight=torch.zeros(6), weighted=weighted)
    with pytest.raises(ValueError, match=r"norm_weight: expected shape \[6\], got shape \[5\]"):
        kernel.linear(*arguments, None, *rest, norm_weight=torch.zeros(5), weighted=weighted)
    with pytest.raises(ValueError, match=r"squares: expected shape \[2, 1\], got shape \[2, 2\]"):
        kernel.linear(*arguments, None, *rest, squares=torch.zeros(2, 2))


def test_refuses_odd_gates_and_a_missing_workspace() -> None:
    with pytest.raises(ValueError, match="rows of weight: expected an even number for silu_mul, got 7"):
        run(kernel_ops._linear_cuda, inputs_of(4, 7, 6, activation="silu_mul").values())
    inputs = inputs_of(2, 8, 600)
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in list(inputs.values())[:-1]]
    with pytest.raises(ValueError, match="partial: expected a workspace for 3 segments, got None"):
        kernel.linear(*arguments, torch.empty(2, 8, device=DEVICE), None)


# --- lm_head_select ---------------------------------------------------------------------------------------------------


def selection_inputs(batch: int, vocab: int, dtype: torch.dtype) -> tuple:
    """Small integers, so that logits are exact and many are equal."""
    rng = generator(vocab)
    hidden_states = torch.randint(-2, 3, (batch, 40), generator=rng).to(dtype)
    weight = torch.randint(-1, 2, (vocab, 40), generator=rng).to(dtype)
    log_alpha = torch.tensor([-2.0, 0.0, -INF, -30.0])[torch.arange(batch) % 4]
    return hidden_states, weight, log_alpha, int32(0, 3, 0, 0)[torch.arange(batch) % 4], 6


@pytest.mark.parametrize(
    ("batch", "vocab", "dtype"),
    [
        (0, 9, torch.float32),
        (1, 1, torch.float16),
        (5, 100, torch.bfloat16),
        (4, 200, torch.float32),
        (18, 70, torch.bfloat16),
    ],
    ids=str,
)
def test_lm_head_select_matches_reference(batch: int, vocab: int, dtype: torch.dtype) -> None:
    inputs = selection_inputs(batch, vocab, dtype)
    actual = run(kernel_ops._lm_head_select_cuda, inputs)
    assert_same_fields(actual, reference.lm_head_select(*inputs), "select_candidates", torch.float32)


def test_lm_head_select_bits_do_not_depend_on_the_rows() -> None:
    """Alone, and among so many rows that programs have another shape."""
    inputs = selection_inputs(18, 100, torch.bfloat16)
    hidden_states, weight = torch.randn(18, 40, generator=generator(1)).bfloat16(), inputs[1]
    together = run(kernel_ops._lm_head_select_cuda, (hidden_states, weight, *inputs[2:]))
    one = slice(16, 17)
    alone = run(kernel_ops._lm_head_select_cuda, (hidden_states[one], weight, inputs[2][one], inputs[3][one], 6))
    for field_together, field_alone in zip(together, alone, strict=True):
        assert torch.equal(field_together[one], field_alone)


def test_lm_head_select_equals_its_parts() -> None:
    """The same candidates as from written logits; NaN rows are undecided, and columns beyond the view do not exist."""
    hidden_states, weight, log_alpha, top_k, max_candidates = selection_inputs(4, 150, torch.float32)
    hidden_states[1, 0] = float("nan")
    logits = run(kernel_ops._linear_cuda, (hidden_states, weight))
    for vocab in (150, 90):
        parts = run(ops._select_candidates_cuda, (logits[:, :vocab], log_alpha, top_k, max_candidates))
        fused = run(kernel_ops._lm_head_select_cuda, (hidden_states, weight[:vocab], log_alpha, top_k, max_candidates))
        assert_same_fields(fused, parts, "select_candidates", torch.float32)
        assert fused.count[1] == 0


def test_lm_head_select_rows_beyond_the_count_are_not_touched() -> None:
    inputs = selection_inputs(18, 70, torch.float32)
    expected = run(kernel_ops._lm_head_select_cuda, inputs)
    *tensors, max_candidates = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs)
    outputs = Candidates(*(torch.full_like(field, 7, device=DEVICE) for field in expected))
    partials = lm_head_select.empty_partials(18, 70, max_candidates, DEVICE)
    lm_head_select.lm_head_select(*tensors, max_candidates, outputs, partials, int32(3).to(DEVICE))
    for field, whole in zip(to_cpu(outputs), expected, strict=True):
        assert torch.equal(field[:3], whole[:3])
        assert (field[3:] == 7).all() or field.dtype == torch.bool
