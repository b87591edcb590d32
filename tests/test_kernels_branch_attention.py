"""The Triton kernels of `branch_attention` against the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2_fast import ops, reference
from llm2_fast.kernels import branch_attention as kernel
from llm2_fast.kernels.row_tiles import plan_row_tiles
from test_ops import attention_inputs, generator, int32
from tolerances import TOLERANCES
from triton_device import DEVICE, run

INF, NAN = float("inf"), float("nan")
LENGTHS = [0, 0, 5, 64, 63, 65, 130, 128, 1]
OWN = [True, False, True, False, True, True, False, True, False]
PER_ROW = ("query", "row_sequence", "row_prefix_length", "row_has_own", "own_key", "own_value")


def inputs_of(lengths: list[int], own: list[bool], heads: tuple[int, int] = (2, 1), **options: Any) -> dict[str, Any]:
    return attention_inputs(lengths, own, heads, **options)


def check(inputs: dict[str, Any]) -> torch.Tensor:
    actual = run(ops._branch_attention_cuda, inputs.values())
    tolerance = TOLERANCES["kernels.branch_attention", inputs["query"].dtype]
    torch.testing.assert_close(actual, reference.branch_attention(**inputs), **tolerance, equal_nan=True)
    return actual


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim"),
    [
        (torch.float32, (1, 1), 1),
        (torch.float32, (6, 2), 80),
        (torch.float16, (7, 1), 33),
        (torch.bfloat16, (4, 2), 64),
        (torch.bfloat16, (2, 1), 256),
    ],
    ids=str,
)
def test_matches_reference(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    output = check(inputs_of(LENGTHS, OWN, heads, head_dim=head_dim, dtype=dtype))
    assert not output[1].any()  # it sees nothing


@pytest.mark.parametrize(
    ("block_size", "sliding_window"), [(1, 0), (3, 1), (100, 2), (16, 50), (3, 64), (16, 1000)], ids=str
)
def test_blocks_and_windows(block_size: int, sliding_window: int) -> None:
    check(inputs_of(LENGTHS, OWN, block_size=block_size, sliding_window=sliding_window))


def test_parts_come_around_again() -> None:
    """A prefix of more chunks than parts."""
    check(inputs_of([1100, 1100, 700], [True, True, False], head_dim=8, dtype=torch.float16))


def test_without_rows() -> None:
    assert check(inputs_of([], [])).shape == (0, 2, 16)


def test_strided_arguments() -> None:
    """Query, key and value as parts of one projection, and a cache with keys beside values."""
    inputs = inputs_of(LENGTHS, OWN)
    projected = torch.randn(9, 4, 16, generator=generator(5))
    inputs["query"], inputs["own_key"], inputs["own_value"] = projected.split([2, 1, 1], dim=1)
    cache = torch.stack([inputs["key_cache"], inputs["value_cache"]], dim=3).transpose(1, 2)
    cache = cache.contiguous().transpose(1, 2)
    inputs["key_cache"], inputs["value_cache"] = cache.unbind(3)
    check(inputs)


@pytest.mark.parametrize(("dtype", "sliding_window"), [(torch.float32, 0), (torch.bfloat16, 40)], ids=str)
def test_rows_are_independent(dtype: torch.dtype, sliding_window: int) -> None:
    """Bitwise the same alone, in reverse order and among many rows of the same sequence."""
    lengths = [length + row for row, length in enumerate([130, 130, 200, 17, 60, 90, 3, 130])]
    own = [row % 3 != 0 for row in range(8)]
    inputs = inputs_of(lengths, own, head_dim=24, dtype=dtype, sequences=[0] * 8, sliding_window=sliding_window)
    together = run(ops._branch_attention_cuda, inputs.values())
    reverse = run(ops._branch_attention_cuda, (inputs | {name: inputs[name].flip(0) for name in PER_ROW}).values())
    assert torch.equal(reverse.flip(0), together)
    for row in (0, 3, 6):
        one = inputs | {name: inputs[name][row : row + 1] for name in PER_ROW}
        assert torch.equal(run(ops._branch_attention_cuda, one.values())[0], together[row])


def test_reads_visible_positions_only() -> None:
    """NaN at every invisible position, and blocks without a visible one out of range."""
    inputs = inputs_of([100, 100, 10], [True, False, True], sliding_window=20, sequences=[0, 0, 0])
    expected = reference.branch_attention(**inputs)
    for position in [*range(10, 80), *range(100, 112)]:
        block = inputs["block_table"][0, position // 16]
        inputs["key_cache"][block, :, position % 16] = NAN
        inputs["value_cache"][block, :, position % 16] = NAN
    inputs["own_key"][1] = NAN
    inputs["own_value"][1] = NAN
    inputs["block_table"][0, 1:5] = 2**31 - 1
    actual = run(ops._branch_attention_cuda, inputs.values())
    torch.testing.assert_close(actual, expected, **TOLERANCES["kernels.branch_attention", torch.float32])


def test_extreme_scores() -> None:
    """Scores that are NaN, infinite or far apart, over several chunks of positions."""
    inputs = inputs_of([150] * 5, [True] * 5, heads=(1, 1), head_dim=2, sequences=[0, 1, 2, 3, 4])
    inputs["query"][:] = torch.tensor([1.0, 0.0])
    inputs["scale"] = 1.0
    blocks = inputs["block_table"].long()
    inputs["key_cache"][blocks[0, 0], 0, 3, 0] = NAN
    inputs["key_cache"][blocks[1, 5], 0, 0, 0] = INF
    inputs["key_cache"][blocks[2, :5], 0, :, 0] = -INF  # the first chunks have nothing finite
    inputs["key_cache"][blocks[3, :10], 0, :, 0] = -INF
    inputs["own_key"][3, 0, 0] = -INF  # nothing finite at all
    inputs["key_cache"][blocks[4, 2], 0, 1, 0] = 1e30
    output = check(inputs)
    assert output[:, 0, 0].isnan().tolist() == [True, True, False, True, False]


def test_workspace_serves_again() -> None:
    """A call leaves counters of zero, whatever part of the workspace it used, and reads nothing of the call before."""
    workspace = kernel.Workspace.empty(3, 2, 16, DEVICE)
    for lengths in ([200, 200, 70], [20, 0, 130]):
        inputs = inputs_of(lengths, [True, False, True])
        arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs.values()]
        first_row = torch.empty(4, dtype=torch.int32, device=DEVICE)
        plan_row_tiles(arguments[4], kernel.tile_rows(2, 1, 16, torch.float32), first_row)
        output = torch.empty_like(arguments[0])
        kernel.branch_attention(*arguments, output, first_row, workspace)
        assert torch.equal(output.cpu(), run(ops._branch_attention_cuda, inputs.values()))
        assert not workspace.counters.any()


def test_rows_beyond_the_count_are_not_touched() -> None:
    inputs = inputs_of([20, 20, 30], [True] * 3)
    expected = run(ops._branch_attention_cuda, inputs.values())
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs.values()]
    num_rows, first_row = int32(2).to(DEVICE), torch.empty(3, dtype=torch.int32, device=DEVICE)
    plan_row_tiles(arguments[4], kernel.tile_rows(2, 1, 16, torch.float32), first_row, num_rows)
    output = torch.full_like(arguments[0], 7)
    kernel.branch_attention(*arguments, output, first_row, kernel.Workspace.empty(3, 2, 16, DEVICE))
    assert torch.equal(output[:2].cpu(), expected[:2])
    assert (output[2] == 7).all()


@pytest.mark.parametrize(
    ("sequences", "num_rows", "expected"),
    [
        ([4, 4, 4, 4, 4, 2, 2, 7], None, [0, 3, 5, 6, 7, 8, 8, 8, 8]),
        ([4, 4, 4, 4, 4, 2, 2, 7], 4, [0, 3, 4, 4, 4, 4, 4, 4, 4]),
        ([4, 4, 4], 9, [0, 3]),
        ([4, 4, 4], 0, [0, 0, 0]),
        ([], None, [0, 0]),
        (list(range(40)), None, [*range(41), *[40] * 40]),
    ],
)
def test_row_tiles(sequences: list[int], num_rows: int | None, expected: list[int]) -> None:
    """Three rows at most, one sequence each, and empty tiles after the last."""
    first_row = torch.full((len(expected),), -7, dtype=torch.int32, device=DEVICE)
    count = None if num_rows is None else int32(num_rows).to(DEVICE)
    plan_row_tiles(int32(*sequences).to(DEVICE), 3, first_row, count)
    assert first_row.tolist() == expected


def test_beyond_int32_offsets(tmp_path: Path) -> None:
    """The second block begins 2**31 elements after the first; the file between them is a hole."""
    inputs = inputs_of([30], [True], dtype=torch.bfloat16)
    for name in ("key_cache", "value_cache"):
        storage = torch.from_file(str(tmp_path / name), shared=True, size=2**31 + 256, dtype=torch.bfloat16)
        far = storage.as_strided((2, 1, 16, 16), (2**31, 256, 16, 1))
        inputs[name] = far.copy_(inputs[name][:2])
    inputs["block_table"] = torch.tensor([[1, 0]], dtype=torch.int32)
    check(inputs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x.double(), "query: expected float32 or float16 or bfloat16 on .*, got float64"),
        ("query", lambda x: x[:, :1], "num_heads of query: expected a multiple of num_kv_heads = 2"),
        ("key_cache", lambda x: x.bfloat16(), "key_cache: expected float32 on .*, got bfloat16"),
        ("key_cache", lambda x: x[..., :8], r"key_cache: expected shape \[8, 2, 16, 16\], got shape \[8, 2, 16, 8\]"),
        ("value_cache", lambda x: x[1:], r"value_cache: expected shape \[8, 2, 16, 16\], got shape \[7, 2, 16, 16\]"),
        ("own_value", lambda x: x[:, :1], r"own_value: expected shape \[4, 2, 16\], got shape \[4, 1, 16\]"),
        ("block_table", lambda x: x.long(), "block_table: expected int32 on .*, got int64"),
        ("row_has_own", lambda x: x.int(), "row_has_own: expected bool on .*, got int32"),
        ("sliding_window", lambda x: -1, "sliding_window: expected >= 0, got -1"),
    ],
)
def test_refuses(name: str, change: Callable, message: str) -> None:
    inputs = attention_inputs([20, 20, 20, 20], [True] * 4)
    with pytest.raises(ValueError, match=message):
        run(ops._branch_attention_cuda, (inputs | {name: change(inputs[name])}).values())
