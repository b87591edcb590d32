"""`Report`: what a step tells the host, in one transfer."""

from __future__ import annotations

import math

import torch

_ALIGNMENT = 16
_COPIES = 3  # transfers before a copy on the host is overwritten


class Receipt:
    """One transfer to the host.

    Args:
        tensors: On the host, by name.
        event: Recorded behind the transfer; None on the CPU.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], event: torch.cuda.Event | None) -> None:
        self._tensors, self._event = tensors, event

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors on the host once they are there. The third transfer after this one overwrites them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class Report:
    """Named tensors in one buffer on the device, and copies of them on the host.

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
        self.device = self._views(fields, self._source)
        self._copies = []
        for _ in range(_COPIES):
            target = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
            event = torch.cuda.Event() if is_cuda else None
            self._copies.append((target, event, Receipt(self._views(fields, target), event)))

    def clear(self) -> None:
        """Make every integer on the device -1."""
        self._source.fill_(255)

    def send(self) -> Receipt:
        """Enqueue a transfer."""
        target, event, receipt = self._copies[0]
        self._copies.append(self._copies.pop(0))
        target.copy_(self._source, non_blocking=True)
        if event is not None:
            event.record()
        return receipt

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
