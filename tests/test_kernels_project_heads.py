"""The Triton kernel of `project_heads` against the reference of its parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llm2_fast import reference
from llm2_fast.kernels.linear import empty_partial, linear
from llm2_fast.kernels.project_heads import project_heads
from llm2_fast.kernels.rope_and_store import rope_and_store
from test_kernels_layers import moved, rope_inputs
from test_ops import generator, int32
from tolerances import TOLERANCES
from triton_device import DEVICE, to_cpu

EPS = 1e-5
HEADS = ("cosine", "sine", "key_cache", "value_cache", "block_table", "row_sequence", "row_position", "row_stored")


def inputs_of(
    in_features: int, head_dim: int, dtype: torch.dtype, bias: bool = False, rank: int = 0, norm: bool = False
) -> dict[str, Any]:
    """Five rows of three sequences, three query heads and two key/value heads."""
    rng = generator(in_features + head_dim)

    def randn(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(of)

    rope = rope_inputs(head_dim=head_dim, dtype=dtype)
    num_weight_rows = rope["qkv"].shape[1]
    return {
        "x": randn(5, in_features, of=dtype),
        "weight": (randn(num_weight_rows, in_features) / math.sqrt(in_features)).to(dtype),
        "bias": randn(num_weight_rows) if bias else None,
        "lora_hidden": randn(5, rank, of=dtype) if rank else None,
        "lora_b": (randn(num_weight_rows, rank) / math.sqrt(rank)).to(dtype) if rank else None,
        "row_adapted": torch.arange(5) % 3 != 1 if rank else None,
        **{name: rope[name] for name in HEADS},
        "squares": torch.rand(5, -(-in_features // 16), generator=rng) * in_features if norm else None,
    }


def launch(inputs: dict[str, Any], num_rows: int | None = None) -> tuple[torch.Tensor, ...]:
    """Queries, own keys and values, and the caches."""
    arguments = dict(
        zip(inputs, moved(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs.values()), strict=True)
    )
    squares, (_, num_kv_heads, _, head_dim) = arguments.pop("squares"), inputs["key_cache"].shape
    rows, num_heads = len(inputs["x"]), len(inputs["weight"]) // head_dim - 2 * num_kv_heads
    outputs = [
        torch.full((rows, heads, head_dim), 7.0, dtype=inputs["x"].dtype, device=DEVICE)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    count = None if num_rows is None else int32(num_rows).to(DEVICE)
    project_heads(*arguments.values(), *outputs, empty_partial(rows, arguments["weight"]), count, squares, EPS)
    return to_cpu((*outputs, arguments["key_cache"], arguments["value_cache"]))


def composed(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The same of the reference."""
    x, (_, num_kv_heads, _, head_dim) = inputs["x"].float(), inputs["key_cache"].shape
    if inputs["squares"] is not None:
        x = x / (inputs["squares"].sum(dim=1, keepdim=True) / x.shape[1] + EPS).sqrt()
    update = (inputs["lora_hidden"], inputs["lora_b"], inputs["row_adapted"])
    qkv = reference.linear(x, inputs["weight"], inputs["bias"], *update, dtype=torch.float32)
    caches = [inputs[name].clone() for name in ("key_cache", "value_cache")]
    num_heads = len(inputs["weight"]) // head_dim - 2 * num_kv_heads
    where = [inputs[name] for name in HEADS[4:]]
    heads = reference.rope_and_store(
        qkv, inputs["cosine"], inputs["sine"], None, None, EPS, num_heads, *caches, *where
    )  # fmt: skip
    return *heads, *caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("in_features", "head_dim", "options"),
    [
        (1, 2, {}),
        (70, 10, {"bias": True, "norm": True}),
        (40, 64, {"rank": 5}),
        (300, 34, {"bias": True, "rank": 3, "norm": True}),
    ],
    ids=str,
)
def test_matches_reference(dtype: torch.dtype, in_features: int, head_dim: int, options: dict[str, Any]) -> None:
    inputs = inputs_of(in_features, head_dim, dtype, **options)
    for actual, expected in zip(launch(inputs), composed(inputs), strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCES["kernels.rounding", dtype])


def test_equals_its_parts() -> None:
    """Bit by bit, with a cache that holds keys beside values."""
    inputs = inputs_of(70, 10, torch.float32, bias=True)
    cache = torch.full((7, 4, 2, 2, 10), 9.0)
    inputs["key_cache"], inputs["value_cache"] = cache.permute(3, 0, 2, 1, 4)
    arguments = dict(zip(inputs, moved(inputs.values()), strict=True))
    caches = [arguments[name].clone() for name in ("key_cache", "value_cache")]
    qkv = torch.empty(5, 70, device=DEVICE)
    linear(*(arguments[name] for name in ("x", "weight", "bias")), *[None] * 5, qkv, None)
    outputs = [torch.empty(5, heads, 10, device=DEVICE) for heads in (3, 2, 2)]
    rope_and_store(
        qkv, arguments["cosine"], arguments["sine"], None, None, EPS, *caches,
        *(arguments[name] for name in HEADS[4:]), *outputs,
    )  # fmt: skip
    for one, other in zip(launch(inputs), to_cpu((*outputs, *caches)), strict=True):
        assert torch.equal(one, other)


def test_rows_are_independent_and_counted() -> None:
    inputs = inputs_of(300, 10, torch.float32, bias=True, rank=3, norm=True)
    together = launch(inputs)
    per_row = ("x", "lora_hidden", "row_adapted", "squares", "cosine", "sine", *HEADS[5:])
    alone = launch(inputs | {name: inputs[name][2:3] for name in per_row})
    for one, other in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(one[0], other[2])
    many = launch(inputs | {name: torch.cat([inputs[name]] * 14) for name in per_row})  # of another shape of program
    for one, other in zip(many[:3], together[:3], strict=True):
        assert torch.equal(one[65:], other)
    counted = launch(inputs, num_rows=1)
    for one, other in zip(counted[:3], together[:3], strict=True):
        assert torch.equal(one[0], other[0])
        assert (one[1:] == 7).all()
    assert torch.equal(counted[3][3, :, 3], together[3][3, :, 3])
    assert (counted[3] == 9).sum() == counted[3].numel() - 2 * 10


def test_infinite_values_stay_where_they_are() -> None:
    """Values are not rotated, so one of them does not reach the other of its pair."""
    inputs = inputs_of(20, 10, torch.float32, bias=True)
    inputs["bias"][6 * 10] = math.inf
    value = launch(inputs)[2]
    assert value[:, 1, 0].isinf().all()
    assert value.isfinite().sum() == value.numel() - 5


def test_refuses_what_does_not_fit() -> None:
    inputs = inputs_of(20, 10, torch.float32)
    with pytest.raises(ValueError, match="features of queries, keys and values: expected 3"):
        launch(inputs | {"weight": torch.zeros(75, 20)})
    with pytest.raises(ValueError, match=r"cosine: expected shape \[5, 5\], got shape \[4, 5\]"):
        launch(inputs | {"cosine": inputs["cosine"][:4]})
    with pytest.raises(ValueError, match=r"squares: expected shape \[5, 2\], got shape \[5, 3\]"):
        launch(inputs | {"squares": torch.zeros(5, 3)})
