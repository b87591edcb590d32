"""Work that several programs share and the last of them to finish completes, in place of a second kernel.

They count themselves. Which one is last is chance, what it computes must not be: it reads the parts of all of them, its
own too, in their order, and around the cache of its processor (".cg"). Counters hold 0 before and after a call.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter, num_programs):
    """Whether this program is the last of `num_programs` to ask; then it sees what the others stored before."""
    tl.debug_barrier()  # every thread of this program has stored
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    if arrived == num_programs:
        tl.store(counter, 0)
    return arrived == num_programs
