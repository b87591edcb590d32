"""`Shard`: the part of a decoder that one of several processes runs (tensor parallelism).

Query heads, key/value heads and the features of the MLP are dealt out, so QKV, gate and up are cut by rows, the output
and down projections by columns (Shoeybi et al., "Megatron-LM", 2019). Twice per layer the processes add up what they
have. Where there are fewer key/value heads than processes, several have the same one. Embeddings, norms and `lm_head`
are whole everywhere, so every process sees all logits and picks the same tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llm2_fast.errors import ArgumentError
from llm2_fast.models.spec import DecoderSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard:
    """One of the processes of a group.

    Args:
        group: Of `torch.distributed`, with a backend for the model's device; None for one process.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def check(self, spec: DecoderSpec) -> None:
        """Raise `ArgumentError` unless heads and features can be dealt out evenly."""
        heads, kv_heads, features = spec.num_heads, spec.num_kv_heads, spec.intermediate_size
        even = heads % self.size == 0 and features % self.size == 0
        if not even or (kv_heads % self.size != 0 and self.size % kv_heads != 0):
            expected = f"a size that divides the {heads} heads and {features} features, and divides or is a multiple of"
            raise ArgumentError("process_group", f"{expected} the {kv_heads} key/value heads", self.size)

    def spec(self, whole: DecoderSpec) -> DecoderSpec:
        """What this process has of a decoder."""
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
        )

    def rows(self, spec: DecoderSpec, path: str) -> slice:
        """Output features of a linear layer that this process computes; `spec` is of the whole decoder."""
        name = path.split(".")[-1]
        if name == "q_proj":
            return self._part(spec.num_heads, spec.head_dim)
        if name in ("k_proj", "v_proj"):
            return self._part(spec.num_kv_heads, spec.head_dim)
        return self._part(spec.intermediate_size) if name in ("gate_proj", "up_proj") else slice(None)

    def columns(self, spec: DecoderSpec, path: str) -> slice:
        """Input features of a linear layer that this process has."""
        name = path.split(".")[-1]
        if name == "o_proj":
            return self._part(spec.num_heads, spec.head_dim)
        return self._part(spec.intermediate_size) if name == "down_proj" else slice(None)

    def add(self, partial: torch.Tensor) -> None:
        """Add the tensors of all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(partial, group=self._group)

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of all processes' values."""
        if self.size == 1:
            return value
        values = torch.tensor(value, device=device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(values)

    def _part(self, count: int, size: int = 1) -> slice:
        """This process's share of `count` things of `size` features each, at least one."""
        first = self.rank * count // self.size
        return slice(first * size, (first + max(1, count // self.size)) * size)
