"""`CacheBudget`: a bound on the memory of a backend's caches, in blocks."""

from __future__ import annotations

import os
from pathlib import Path

from llm2_fast.backends.cached_decoder import BLOCK_SIZE, block_bytes
from llm2_fast.errors import ArgumentError
from llm2_fast.models.spec import DecoderSpec

_SHARE = 2  # of the machine's memory, one part in so many is for caches unless told otherwise
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


class CacheBudget:
    """Shares a bound in bytes among the caches of an LLM and perhaps a verifier.

    Each cache gets the same number of blocks, since both hold the same sequences.

    Args:
        specs: Of the decoder behind each cache.
        memory_bytes: The bound; half of the memory of the machine, or of the container, if None.

    Attributes:
        num_blocks: Blocks of each cache.

    Raises:
        ArgumentError: The bound is too small for any sequence.
    """

    def __init__(self, specs: list[DecoderSpec], memory_bytes: int | None) -> None:
        self._memory_bytes = _machine_memory() // _SHARE if memory_bytes is None else memory_bytes
        self._bytes_per_block = sum(map(block_bytes, specs))
        self.num_blocks = self._memory_bytes // self._bytes_per_block
        self._require(1, f"the {BLOCK_SIZE} tokens of a block")

    def check_fits(self, num_tokens: int, name: str) -> None:
        """Raise `ArgumentError` if a sequence of `num_tokens`, called `name`, would not fit alone."""
        self._require(-(-num_tokens // BLOCK_SIZE), f"the {num_tokens} tokens of {name}")

    def _require(self, num_blocks: int, what: str) -> None:
        # One more: where a sample leaves the prompt that it shares with others, it copies a block.
        if num_blocks + 1 > self.num_blocks:
            expected = f"at least {(num_blocks + 1) * self._bytes_per_block}, for {what}"
            raise ArgumentError("kv_cache_memory_bytes", expected, self._memory_bytes)


def _machine_memory() -> int:
    """Bytes of physical memory, or of the container's share of it (Linux control groups, version 2)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return memory
