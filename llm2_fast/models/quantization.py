"""int8 weights: what they are, in plain torch. The cpu backend quantizes in C++, to the same values and scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm2_fast.errors import ArgumentError

_LARGEST = 127  # not -128: the range is symmetric
_GROUP_SIZES = {"int8": 32, "int8-group64": 64, "int8-group128": 128, "int8-channel": None}
_ROWS_AT_ONCE = 4096  # of a round trip: bounds its temporary tensors


@dataclass(frozen=True)
class Quantization:
    """Weights of linear layers as int8, w = scale * q. Activations stay in the model's dtype.

    Attributes:
        group_size: Input features that share a scale, for each output feature. The last group is smaller where
            in_features is not a multiple. None: all of them, which is one scale per output feature.
    """

    group_size: int | None

    @classmethod
    def from_name(cls, name: str) -> Quantization:
        """The one called "int8" (groups of 32), "int8-group64", "int8-group128" or "int8-channel" (one scale each).

        Raises:
            ArgumentError: There is none of that name.
        """
        if not isinstance(name, str) or name not in _GROUP_SIZES:
            raise ArgumentError("quantization", f"None or one of {', '.join(map(repr, _GROUP_SIZES))}", repr(name))
        return cls(_GROUP_SIZES[name])

    @property
    def name(self) -> str:
        """What `from_name` calls it."""
        return next(name for name, group_size in _GROUP_SIZES.items() if group_size == self.group_size)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Symmetric quantization: scale = max |w| / 127 over a group, q = w / scale to nearest, ties to even.

        Args:
            weight: Floating-point [out_features, in_features], finite.

        Returns:
            q, int8 [out_features, in_features], and the scales, float32 [out_features, num_groups].
        """
        values, scales = [], []
        for group in weight.float().split(self.group_size or weight.shape[1], dim=1):
            scale = group.abs().amax(dim=1, keepdim=True) / _LARGEST
            quotient = group / torch.where(scale > 0, scale, 1)  # without a scale the group is zero, or nearly so
            # A subnormal scale may be so inaccurate that quotients exceed 127.
            values.append(quotient.round().clamp(-_LARGEST, _LARGEST).to(torch.int8))
            scales.append(scale)
        return torch.cat(values, dim=1), torch.cat(scales, dim=1)

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """What int8 keeps of `weight` [out_features, in_features]: scale * q, rounded to its dtype."""
        rounded, in_features = torch.empty_like(weight), weight.shape[1]
        group = torch.arange(in_features) // (self.group_size or in_features)
        for source, target in zip(weight.split(_ROWS_AT_ONCE), rounded.split(_ROWS_AT_ONCE), strict=True):
            values, scales = self.quantize(source)
            target.copy_(values * scales[:, group])
        return rounded

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` computes with what int8 keeps of its linear layers and of an embedding table tied to one.

        The weights are replaced while their module runs, so that there is one copy at a time. Nothing else may run
        the model meanwhile.
        """
        kept: dict[nn.Module, torch.Tensor] = {}

        def replace(module: nn.Module, args: Any) -> None:
            weight = kept[module] = module.weight.data
            if isinstance(module, nn.Embedding):  # the rows that are looked up: memory not written to costs nothing
                used = args[0].unique()
                module.weight.data = torch.empty_like(weight).index_copy_(0, used, self.round_trip(weight[used]))
            else:
                module.weight.data = self.round_trip(weight)

        def restore(module: nn.Module, args: Any, output: Any) -> None:
            module.weight.data = kept.pop(module)

        def address(weight: nn.Parameter) -> int:
            return id(weight) if weight.is_meta else weight.data_ptr()  # tied weights have the same

        quantized = {address(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        hooks = []
        try:
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)) and address(module.weight) in quantized:
                    hooks.append(module.register_forward_pre_hook(replace))
                    # Before the hooks that were there: those of weights in files take them away again.
                    hooks.append(module.register_forward_hook(restore, always_call=True, prepend=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
