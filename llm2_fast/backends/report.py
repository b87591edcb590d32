"""`Report`: what a step tells the host, in one transfer."""

from __future__ import annotations

import math

import torch

_ALIGNMENT = 16


class Report:
    """Named tensors in one buffer on the device, and their copies on the host.

    Args:
        fields: Dtype and shape of each, by name.
        device: Where the steps run.

    Attributes:
        device: Tensors by name, to be written by a step.
    """

    def __init__(self, fields: dict[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        size = sum(self._padded(dtype, shape) for dtype, shape in fields.values())
        is_cuda = device.type == "cuda"
        self._source = torch.zeros(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        self._event = torch.cuda.Event() if is_cuda else None
        self.device, self._host = self._views(fields, self._source), self._views(fields, self._target)

    def clear(self) -> None:
        """Make every integer on the device -1."""
        self._source.fill_(255)

    def send(self) -> None:
        """Enqueue the transfer."""
        self._target.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def receive(self) -> dict[str, torch.Tensor]:
        """Wait for the last transfer; the tensors on the host, which the next one overwrites."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    @staticmethod
    def _padded(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def _views(
        self, fields: dict[str, tuple[torch.dtype, tuple[int, ...]]], buffer: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        views, first = {}, 0
        for name, (dtype, shape) in fields.items():
            views[name] = buffer[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            first += self._padded(dtype, shape)
        return views
