"""int8 weights: what they are, in plain torch. The cpu backend quantizes in C++, to the same values and scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llm2_fast.errors import ArgumentError

_LARGEST = 127  # not -128: the range is symmetric
_GROUP_SIZES = {"int8": 32, "int8-group64": 64, "int8-group128": 128, "int8-channel": None}
_WEIGHTS_AT_ONCE = 1 << 14  # of a round trip: bounds its temporary tensors


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
        in_features = weight.shape[1]
        group_size = min(self.group_size or in_features, in_features)
        groups = functional.pad(weight.float(), (0, -in_features % group_size)).unflatten(1, (-1, group_size))
        scales = groups.abs().amax(dim=2, keepdim=True) / _LARGEST
        quotients = groups / torch.where(scales > 0, scales, 1)  # without a scale the group is zero, or nearly so
        # A subnormal scale may be so inaccurate that quotients exceed 127.
        values = quotients.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        return values.flatten(1)[:, :in_features], scales.squeeze(2)

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """What int8 keeps of `weight` [out_features, in_features]: scale * q, rounded to its dtype."""
        rounded = weight.clone()
        self.round_trip_(rounded)
        return rounded

    def round_trip_(self, weight: torch.Tensor) -> None:
        """`round_trip` in place."""
        in_features = weight.shape[1]
        group = torch.arange(in_features) // (self.group_size or in_features)
        for rows in weight.split(max(1, _WEIGHTS_AT_ONCE // in_features)):
            values, scales = self.quantize(rows)
            rows.copy_(values * scales[:, group])

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

        # Tied weights have the same address.
        quantized = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Linear)}
        hooks = []
        try:
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.data_ptr() in quantized:
                    hooks.append(module.register_forward_pre_hook(replace))
                    hooks.append(module.register_forward_hook(restore, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
