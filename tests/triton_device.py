"""Where the Triton kernels run in the tests: in Triton's interpreter, or with TRITON_INTERPRET=0 on a GPU.

Importing this skips the module if the interpreter cannot run: that of Triton 3.6 needs numpy below 2.4 for loops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def _patch_once_per_launch() -> None:
    """Make the interpreter quicker: it redefines all of `triton.language` at every call of a device function.

    Once per launch and set of modules that a function sees is enough.
    """
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_lang(fn: Callable[..., Any]) -> Any:
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(fn)

    def call(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def _patch_dot() -> None:
    """Make an element of a product in the interpreter depend on its row and column only, as on matrix units.

    BLAS, which the interpreter asks, chooses the order of sums by shape and processor.
    """

    def create_dot(self: interpreter.InterpreterBuilder, a: Any, b: Any, d: Any, *options: Any) -> Any:
        products = np.multiply(a.data[:, :, None], b.data[None, :, :], dtype=d.data.dtype)
        return interpreter.TensorHandle(np.add.reduce(products, axis=1) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def run(op: Callable[..., Any], arguments: Iterable[Any]) -> Any:
    """Outputs on the CPU of `op` on arguments moved to where the kernels run."""
    moved = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
    return to_cpu(op(*moved))


def to_cpu(outputs: Any) -> Any:
    """A tensor, or a tuple of tensors, on the CPU."""
    if isinstance(outputs, torch.Tensor):
        return outputs.cpu()
    fields = map(to_cpu, outputs)
    return type(outputs)(*fields) if hasattr(outputs, "_fields") else tuple(fields)


@triton.jit
def _loop_kernel(count, output):
    for i in range(tl.load(count)):
        tl.store(output + i, i)


def _check_interpreter() -> None:
    """Skip the importing module if a loop over a number on the device fails."""
    try:
        _loop_kernel[(1,)](torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    except Exception as error:
        reason = f"the interpreter of Triton {triton.__version__} does not run with numpy {np.__version__}: {error}"
        pytest.skip(reason, allow_module_level=True)


if INTERPRETED:
    _patch_once_per_launch()
    _patch_dot()
    _check_interpreter()
