"""`StepGraph`: a function on tensors that stay where they are, replayed as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_CAPTURE = threading.Lock()  # of torch's captures only one may be under way in a process


class StepGraph:
    """Calls a function; on a GPU the first call compiles its kernels, the second captures it, later ones replay it.

    Args:
        function: Launches on preallocated tensors. It neither allocates nor waits for the GPU.
        device: Where they are. On the CPU every call runs the function.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function, self._is_cuda = function, device.type == "cuda"
        self._compiled = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not (self._is_cuda and self._compiled):
            self._function()
            self._compiled = True
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # A stream of the current GPU, since torch's own is of the one that captured first. Other threads may go on.
            with _CAPTURE, torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self._function()
            self._graph = graph
        self._graph.replay()
