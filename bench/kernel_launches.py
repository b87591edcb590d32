"""Launches of every Triton kernel at the shapes of a model, for the resource table, the checks and the timings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from llm2_fast import kernel_ops, ops, reference
from llm2_fast.kernels.linear import WeightedRows, empty_partial, linear
from llm2_fast.kernels.project_heads import project_heads

_BLOCK_SIZE = 16
_EPS = 1e-5
_RANK = 32


class Shape(NamedTuple):
    """A decoder of the Llama family."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 128_256

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


LLAMA_3_2_1B = Shape()


class Load(NamedTuple):
    """What a step meets: `sequences` with `prefix` committed positions and `branches` candidates each."""

    sequences: int = 1
    branches: int = 8
    prefix: int = 512
    max_candidates: int = 32

    @property
    def rows(self) -> int:
        return self.sequences * self.branches


@dataclass(frozen=True)
class Launch:
    """One call of an op.

    Attributes:
        name: Of the op, and of the layer's part for `linear`.
        op: On CUDA tensors.
        reference: The same in torch.
        arguments: On the device the launches were made for.
        bytes: Fewest that must be moved: inputs read once, outputs written once.
        flops: Of matrix products.
        mutated: Indices of arguments that the op writes.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple
    bytes: int
    flops: int = 0
    mutated: tuple[int, ...] = ()

    def run(self) -> Any:
        return self.op(*self.arguments)


class Maker:
    """Tensors on a device: random ones, or on "meta" only their shapes."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (torch.randn(shape, generator=self._generator, device=self.device) * scale).to(dtype)

    def full(self, *shape: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def int32(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device)


def size_of(*tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def launches(device: str, dtype: torch.dtype, shape: Shape, load: Load) -> Iterator[Launch]:
    """Every kernel once, in the order of a step."""
    make = Maker(device)
    yield from _beginning(make, dtype, shape, load)
    yield from _selection(make, dtype, shape, load)
    yield pick_launch(make, load.sequences, load.max_candidates)
    yield attention_launch(make, dtype, shape, load)
    for rank in (0, _RANK):
        yield _projection(make, dtype, shape, load, rank)
    yield from _linears(make, dtype, shape, load.rows)
    yield from _small(make, dtype, shape, load)
    yield _commit(make, dtype, shape, load)
    yield _pairwise(make)


def _beginning(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> Iterator[Launch]:
    ids = make.int32([list(range(load.max_candidates))] * load.sequences)
    arguments = (
        ids, make.full(load.sequences, value=load.branches, dtype=torch.int32),
        make.full(load.sequences, value=load.prefix, dtype=torch.int32),
    )  # fmt: skip
    yield Launch(
        "branch_rows",
        kernel_ops._branch_rows_cuda,
        reference.branch_rows,
        arguments,
        16 * load.rows + 12 * load.sequences,
    )
    half = shape.head_dim // 2
    arguments = (
        make.int32(list(range(load.rows))), make.full(load.rows, value=load.prefix, dtype=torch.int32),
        make.randn(shape.vocab_size, shape.hidden_size, dtype=dtype), 1.0,
        make.full(1, half, value=0.1), make.full(1, value=1.0), torch.float32,
    )  # fmt: skip
    moved = load.rows * (shape.hidden_size * (dtype.itemsize + 4) + 2 * half * 4)
    yield Launch("embed", kernel_ops._embed_cuda, reference.embed, arguments, moved)


def _selection_options(make: Maker, load: Load) -> tuple[torch.Tensor, torch.Tensor, int]:
    batch = load.sequences
    return make.full(batch, value=math.log(0.1)), make.full(batch, value=0, dtype=torch.int32), load.max_candidates


def selection_launch(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> Launch:
    """`select_candidates`."""
    logits = make.randn(load.sequences, shape.vocab_size, dtype=dtype, scale=3.0)
    return Launch(
        "select_candidates", ops._select_candidates_cuda, reference.select_candidates,
        (logits, *_selection_options(make, load)), size_of(logits) + load.sequences * load.max_candidates * 8,
    )  # fmt: skip


def _selection(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> Iterator[Launch]:
    batch, options = load.sequences, _selection_options(make, load)
    written = batch * load.max_candidates * 8
    yield selection_launch(make, dtype, shape, load)
    hidden_states = make.randn(batch, shape.hidden_size, dtype=dtype)
    weight = make.randn(shape.vocab_size, shape.hidden_size, dtype=dtype, scale=3.0 / shape.hidden_size**0.5)
    yield Launch(
        "lm_head_select", kernel_ops._lm_head_select_cuda, reference.lm_head_select, (hidden_states, weight, *options),
        size_of(hidden_states, weight) + written, 2 * batch * weight.numel(),
    )  # fmt: skip


def pick_launch(make: Maker, batch: int, width: int) -> Launch:
    """`adjust_and_pick` with every processor on."""
    ids = make.int32([list(range(width))] * batch)
    arguments = (
        ids, make.randn(batch, width), make.full(batch, value=width, dtype=torch.int32), make.randn(batch, width),
        make.full(batch, value=0.25), make.full(batch, width, value=1, dtype=torch.bool), make.full(batch, value=1.1),
        make.full(batch, value=0.7), make.full(batch, value=20, dtype=torch.int32), make.full(batch, value=0.9),
        make.full(batch, value=-4.0), make.full(batch, value=1, dtype=torch.int64),
        *(make.full(batch, value=step, dtype=torch.int32) for step in (3, 0, 7)),
        make.full(batch, 2, value=-1, dtype=torch.int32),
    )  # fmt: skip
    moved = size_of(*arguments) + batch * width * 4
    return Launch("adjust_and_pick", ops._adjust_and_pick_cuda, reference.adjust_and_pick, arguments, moved)


def _rows(make: Maker, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and prefix length of each row."""
    sequences = [row // load.branches for row in range(load.rows)]
    return make.int32(sequences), make.full(load.rows, value=load.prefix, dtype=torch.int32)


def _block_table(make: Maker, load: Load) -> tuple[torch.Tensor, int]:
    """Tables for the prefix and one block more, and the number of blocks."""
    per_sequence = -(-load.prefix // _BLOCK_SIZE) + 1
    blocks = list(range(load.sequences * per_sequence))
    table = [blocks[i :: load.sequences] for i in range(load.sequences)]  # interleaved, as they would be after a while
    return make.int32(table), len(blocks)


def attention_launch(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> Launch:
    """`branch_attention`."""
    row_sequence, row_prefix_length = _rows(make, load)
    table, num_blocks = _block_table(make, load)
    cache = (num_blocks, shape.num_kv_heads, _BLOCK_SIZE, shape.head_dim)
    query = make.randn(load.rows, shape.num_heads, shape.head_dim, dtype=dtype)
    own = [make.randn(load.rows, shape.num_kv_heads, shape.head_dim, dtype=dtype) for _ in range(2)]
    arguments = (
        query, make.randn(*cache, dtype=dtype), make.randn(*cache, dtype=dtype), table, row_sequence,
        row_prefix_length, make.full(load.rows, value=1, dtype=torch.bool), *own, shape.head_dim**-0.5, 0,
    )  # fmt: skip
    positions = load.sequences * load.prefix
    prefix = 2 * positions * shape.num_kv_heads * shape.head_dim * query.element_size()
    flops = 4 * load.rows * load.prefix * shape.num_heads * shape.head_dim
    moved = prefix + 2 * size_of(query) + size_of(*own)
    return Launch("branch_attention", ops._branch_attention_cuda, reference.branch_attention, arguments, moved, flops)


def _lora(make: Maker, dtype: torch.dtype, rows: int, num_weight_rows: int, rank: int) -> tuple:
    """Arguments of a low-rank update of all rows, or none."""
    if rank == 0:
        return None, None, None
    return (
        make.randn(rows, rank, dtype=dtype), make.randn(num_weight_rows, rank, dtype=dtype),
        make.full(rows, value=1, dtype=torch.bool),
    )  # fmt: skip


def _squares(make: Maker, rows: int, size: int) -> torch.Tensor:
    """Sums of squares of rows on their way through a norm."""
    empty = WeightedRows.empty(rows, size, torch.float32, torch.device("meta"))
    return 16 * make.randn(*empty.squares.shape).square()


def _heads(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> tuple:
    """Arguments of what rotates and stores heads: angles, caches, and where rows belong."""
    row_sequence, row_position = _rows(make, load)
    table, num_blocks = _block_table(make, load)
    cache = (num_blocks, shape.num_kv_heads, _BLOCK_SIZE, shape.head_dim)
    angles = make.randn(load.rows, shape.head_dim // 2)
    return (
        angles.cos(), angles.sin(), make.randn(*cache, dtype=dtype), make.randn(*cache, dtype=dtype), table,
        row_sequence, row_position, make.full(load.rows, value=0, dtype=torch.bool),
    )  # fmt: skip


def _projection(make: Maker, dtype: torch.dtype, shape: Shape, load: Load, rank: int) -> Launch:
    rows, hidden = load.rows, shape.hidden_size
    weight = make.randn(shape.qkv_size, hidden, dtype=dtype, scale=hidden**-0.5)
    update, heads = _lora(make, dtype, rows, shape.qkv_size, rank), _heads(make, dtype, shape, load)
    squares = _squares(make, rows, hidden)
    arguments = (make.randn(rows, hidden, dtype=dtype), weight, *update, *heads, squares)
    read = size_of(*arguments[:5], *heads[:2], *heads[4:], squares)
    return Launch(
        "project_heads" + (", LoRA" if rank else ""), _project_heads, _project_heads_reference, arguments,
        read + rows * shape.qkv_size * dtype.itemsize, 2 * rows * weight.numel(), mutated=(7, 8),
    )  # fmt: skip


def _project_heads(*arguments: torch.Tensor | None) -> list[torch.Tensor]:
    """Queries, own keys and values of x, weight, a low-rank update, `_heads` and squares."""
    x, weight, *update = arguments[:5]
    heads, squares = arguments[5:13], arguments[13]
    _, num_kv_heads, _, head_dim = heads[2].shape
    num_heads = len(weight) // head_dim - 2 * num_kv_heads
    outputs = [x.new_empty(len(x), n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads)]
    partial = empty_partial(len(x), weight)
    project_heads(x, weight, None, *update, *heads, *outputs, partial, None, squares, _EPS)
    return outputs


def _project_heads_reference(*arguments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    x, weight, *update = arguments[:5]
    heads, squares = arguments[5:13], arguments[13]
    qkv = _linear_reference(x, weight, *update, None, None, torch.float32, squares, None, None, None)
    _, num_kv_heads, _, head_dim = heads[2].shape
    num_heads = len(weight) // head_dim - 2 * num_kv_heads
    return reference.rope_and_store(qkv, *heads[:2], None, None, _EPS, num_heads, *heads[2:])


def _linears(make: Maker, dtype: torch.dtype, shape: Shape, rows: int) -> Iterator[Launch]:
    """As layers call them: a norm is begun by the product that writes the stream and ended by the one that reads it."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    parts = (
        ("o", hidden, shape.num_heads * shape.head_dim, None, True, 0),
        ("gate_up", 2 * intermediate, hidden, "silu_mul", False, 0),
        ("down", hidden, intermediate, None, True, 0),
        ("gate_up, LoRA", 2 * intermediate, hidden, "silu_mul", False, _RANK),
        ("A of LoRA", _RANK, hidden, None, False, 0),
    )
    for name, num_weight_rows, in_features, activation, ends, rank in parts:
        out_features = num_weight_rows if activation is None else num_weight_rows // 2
        x = make.randn(rows, in_features, dtype=dtype)
        weight = make.randn(num_weight_rows, in_features, dtype=dtype, scale=in_features**-0.5)
        written = WeightedRows.empty(rows, out_features, dtype, make.device) if ends else (None, None)
        arguments = (
            x, weight, *_lora(make, dtype, rows, num_weight_rows, rank),
            make.randn(rows, out_features) if ends else None, activation, None if activation else torch.float32,
            None if ends else _squares(make, rows, in_features), make.randn(out_features) if ends else None, *written,
        )  # fmt: skip
        returned = rows * out_features * (x.element_size() if activation else 4)
        yield Launch(
            f"linear ({name})", _linear, _linear_reference, arguments, size_of(*arguments) + returned,
            2 * rows * weight.numel(), mutated=(10, 11) if ends else (),
        )  # fmt: skip


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    row_adapted: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype | None,
    squares: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    values: torch.Tensor | None,
    value_squares: torch.Tensor | None,
) -> torch.Tensor:
    """`linear` with a norm before or after it. What else it writes are the last two arguments."""
    inputs = (x, weight, None, lora_hidden, lora_b, row_adapted, residual, activation)
    output = kernel_ops._empty_linear(*inputs, dtype)
    weighted = None if values is None else WeightedRows(values, value_squares)
    linear(*inputs, output, empty_partial(len(x), weight), None, squares, _EPS, norm_weight, weighted)
    return output


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_hidden: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    row_adapted: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype | None,
    squares: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    values: torch.Tensor | None,
    value_squares: torch.Tensor | None,
) -> torch.Tensor:
    inputs = (lora_hidden, lora_b, row_adapted, residual, activation)
    if squares is None:
        output = reference.linear(x, weight, None, *inputs, dtype)
    else:
        rms = (squares.sum(dim=1, keepdim=True) / x.shape[1] + _EPS).sqrt()
        output = reference.linear(x.float() / rms, weight, None, *inputs, dtype or x.dtype)
    if values is not None:
        values.copy_(output * norm_weight)
        value_squares.copy_(output.square().view(len(x), value_squares.shape[1], -1).sum(dim=2))
    return output


def _small(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> Iterator[Launch]:
    rows, hidden = load.rows, shape.hidden_size
    stream, weight = make.randn(rows, hidden), make.randn(hidden)
    written = rows * hidden * dtype.itemsize
    yield Launch(
        "rms_norm", kernel_ops._rms_norm_cuda, reference.rms_norm, (stream, weight, 1e-5, dtype),
        size_of(stream, weight) + written,
    )  # fmt: skip
    x = make.randn(rows, hidden, dtype=dtype)
    yield Launch(
        "add_rms_norm", kernel_ops._add_rms_norm_cuda, reference.add_rms_norm, (x, stream, weight, 1e-5),
        2 * size_of(x, stream) + size_of(weight),
    )  # fmt: skip
    cosine, sine, *where = _heads(make, dtype, shape, load)
    arguments = (
        make.randn(rows, shape.qkv_size), cosine, sine, make.randn(shape.head_dim), make.randn(shape.head_dim), 1e-6,
        shape.num_heads, *where,
    )  # fmt: skip
    yield Launch(
        "rope_and_store", kernel_ops._rope_and_store_cuda, reference.rope_and_store, arguments,
        size_of(*arguments[:3]) + rows * shape.qkv_size * dtype.itemsize, mutated=(7, 8),
    )  # fmt: skip
    gates = make.randn(rows, 2 * shape.intermediate_size, dtype=dtype)
    for name in ("silu_mul", "gelu_tanh_mul"):
        yield Launch(
            name, getattr(kernel_ops, f"_{name}_cuda"), getattr(reference, name), (gates,), size_of(gates) * 3 // 2
        )
    units = 256
    for name, arguments in (
        ("linear", (x, None, None, make.randn(hidden, scale=hidden**-0.5), 0.0)),
        ("256 units", (x, make.randn(units, hidden, scale=hidden**-0.5), make.randn(units), make.randn(units), 0.0)),
    ):
        yield Launch(
            f"score_head ({name})", kernel_ops._score_head_cuda, reference.score_head, arguments,
            size_of(*arguments) + 4 * rows,
        )  # fmt: skip


def _commit(make: Maker, dtype: torch.dtype, shape: Shape, load: Load) -> Launch:
    row_sequence, row_position = _rows(make, load)
    table, num_blocks = _block_table(make, load)
    own = [make.randn(shape.num_layers, load.rows, shape.num_kv_heads, shape.head_dim, dtype=dtype) for _ in range(2)]
    cache = (shape.num_layers, num_blocks, shape.num_kv_heads, _BLOCK_SIZE, shape.head_dim)
    arguments = (
        make.full(load.sequences, value=load.branches - 1, dtype=torch.int32),
        make.int32(list(range(0, load.rows, load.branches))), row_sequence, row_position, *own,
        make.randn(load.rows, shape.hidden_size, dtype=dtype), table,
        make.randn(*cache, dtype=dtype), make.randn(*cache, dtype=dtype),
        make.randn(load.sequences, shape.hidden_size, dtype=dtype),
        make.full(load.sequences, value=load.prefix, dtype=torch.int32),
    )  # fmt: skip
    per_sequence = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim + shape.hidden_size
    moved = 2 * load.sequences * per_sequence * dtype.itemsize
    return Launch("commit", kernel_ops._commit_cuda, reference.commit, arguments, moved, mutated=(8, 9, 10, 11))


def _pairwise(make: Maker) -> Launch:
    num_positives, num_pairs = 1000, 5000
    position = torch.arange(num_pairs) * num_positives // num_pairs
    arguments = (make.randn(num_positives), make.randn(num_pairs), position.to(make.device))
    moved = size_of(*arguments) + size_of(*arguments[:2])
    return Launch("pairwise_loss", kernel_ops._pairwise_loss_cuda, kernel_ops._pairwise_loss_cpu, arguments, moved)
