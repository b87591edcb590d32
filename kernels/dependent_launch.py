"""Programmatic dependent launch: from sm_90 on, the next kernel is set up while this one still runs.

Kernels launched so begin with `wait_for_predecessor`, before they read or write anything. The kernel before has then
ended, and so had, when it began, the one before that. Kernels without it wait for the end of all before them anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime import driver


def dependent_launch() -> dict[str, bool]:
    """Options of a launch: whether the architecture has it, for the launch and for `wait_for_predecessor`."""
    is_there = not triton.knobs.runtime.interpret and driver.active.get_current_target().arch >= 90
    return {"DEPENDENT": is_there, "launch_pdl": is_there}


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Every program's first statement. From then on the next kernel may be set up."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
