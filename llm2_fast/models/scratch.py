"""`Scratch`: memory that is used again and again while a model is loaded."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Gives the same memory out each time.

    Tensors of a megabyte that come and go leave holes in the heap, which stay with the process: there, large aligned
    blocks seldom fit where one of the same size was.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content, valid until the next is taken."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._bytes):
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes].view(dtype).view(shape)
