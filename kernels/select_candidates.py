"""Plausible candidates, C = {v : z_v >= max z + ln(alpha)} (LLM2, equation 1), in one pass over the logits.

The first kernel summarizes tiles of the vocabulary: maximum, sum of exponentials, and a list of what could be plausible
in rank. A tile's own maximum bounds the row's from below and rounding is monotone, so no candidate is missed. The
second kernel merges the summaries of a row. Lists hold one entry more than a row may keep, which tells whether any was
cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import FLOATS, check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.ranking import NO_KEY, id_of_key, logit_of_key, ranking_key
from llm2_fast.reference import Candidates

MAX_CANDIDATES = 1024  # a row's candidates are merged in registers
_TILE = 1024

_INF = tl.constexpr(float("inf"))


class Partials(NamedTuple):
    """Workspace: summaries of T tiles of the vocabulary, for each of B rows."""

    maxima: torch.Tensor  # float32 [B, T]; NaN if the tile has one
    sums: torch.Tensor  # float32 [B, T], of exp(z - maximum)
    counts: torch.Tensor  # int32 [B, T], length of the list
    keys: torch.Tensor  # int64 [B, T, L], ranking keys, largest first

    @classmethod
    def empty(cls, batch: int, num_tiles: int, tile: int, max_candidates: int, device: torch.device) -> Partials:
        """Of `num_tiles` tiles of `tile` tokens."""
        listed = min(max_candidates + 1, tile)
        return cls(
            torch.empty(batch, num_tiles, dtype=torch.float32, device=device),
            torch.empty(batch, num_tiles, dtype=torch.float32, device=device),
            torch.empty(batch, num_tiles, dtype=torch.int32, device=device),
            torch.empty(batch, num_tiles, listed, dtype=torch.int64, device=device),
        )


@triton.jit
def store_partials(
    z, ids, rows, row_exists, tile, log_alpha, maxima, sums, counts, keys, num_tiles, LISTED: tl.constexpr
):
    """Summaries of logits z, float32 [ROWS, TILE] with -inf where there is no token, to `Partials`.

    Args:
        ids: int32 [1, TILE].
        rows: int64 [ROWS]. row_exists: int1 [ROWS].
        log_alpha: float32 [ROWS].
    """
    maximum = tl.max(z, axis=1)
    has_nan = tl.max((z != z).to(tl.int32), axis=1) > 0
    base = tl.where(maximum == -_INF, 0.0, maximum)
    total = tl.sum(tl.exp(z - base[:, None]), axis=1)
    plausible = (z >= (maximum + log_alpha)[:, None]) & (z > -_INF)
    count = tl.minimum(tl.sum(plausible.to(tl.int32), axis=1), LISTED)

    at = rows * num_tiles + tile
    tl.store(maxima + at, tl.where(has_nan, float("nan"), maximum), mask=row_exists)
    tl.store(sums + at, total, mask=row_exists)
    tl.store(counts + at, count, mask=row_exists)
    left = tl.where(plausible, ranking_key(z, ids), NO_KEY)
    length = tl.max(count, axis=0)
    listed = 0
    while listed < length:
        best = tl.max(left, axis=1)
        tl.store(keys + at * LISTED + listed, best, mask=row_exists & (listed < count))
        left = tl.where(left == best[:, None], NO_KEY, left)
        listed += 1


@triton.jit
def _partial_kernel(
    logits, log_alpha, num_rows, maxima, sums, counts, keys, vocab_size, row_stride, num_tiles,
    LISTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    rows = row + tl.zeros((1,), tl.int64)
    ids = (tile * TILE + tl.arange(0, TILE))[None, :]
    z = tl.load(logits + rows[:, None] * row_stride + ids, mask=ids < vocab_size, other=-_INF).to(tl.float32)
    store_partials(
        z, ids, rows, rows >= 0, tile, tl.load(log_alpha + rows), maxima, sums, counts, keys, num_tiles, LISTED
    )


@triton.jit
def _merge_kernel(
    log_alpha, candidate_top_k, num_rows, maxima, sums, counts, keys,
    ids, candidate_logits, count, logsumexp, cut, vocab_size, num_tiles, max_candidates,
    LISTED: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    at = row * num_tiles + tiles
    tile_max = tl.load(maxima + at, mask=inside, other=-_INF)
    maximum = tl.max(tile_max, axis=0)
    usable = (tl.max((tile_max != tile_max).to(tl.int32), axis=0) == 0) & (tl.abs(maximum) < _INF)
    base = tl.where(usable, maximum, 0.0)
    total = tl.sum(tl.load(sums + at, mask=inside, other=0.0) * tl.exp(tile_max - base), axis=0)

    threshold = maximum + tl.load(log_alpha + row)
    top_k = tl.load(candidate_top_k + row)
    limit = tl.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    wanted = tl.where(usable, tl.minimum(limit, max_candidates + 1), 0)
    lengths = tl.load(counts + at, mask=inside, other=0)
    position = tl.zeros((TILES,), tl.int32)  # of each list's head
    head = tl.load(keys + at * LISTED, mask=inside & (lengths > 0), other=NO_KEY)
    slots = tl.arange(0, SLOTS)
    merged = tl.full((SLOTS,), NO_KEY, tl.int64)
    found = 0
    best = tl.max(head, axis=0)
    while (found < wanted) & (best > NO_KEY) & (logit_of_key(best) >= threshold):
        merged = tl.where(slots == found, best, merged)
        taken = head == best
        position += taken.to(tl.int32)
        following = tl.load(keys + at * LISTED + position, mask=taken & (position < lengths), other=NO_KEY)
        head = tl.where(taken, following, head)
        best = tl.max(head, axis=0)
        found += 1

    kept = tl.minimum(found, max_candidates)
    filled = slots < kept
    out = row * max_candidates + slots
    tl.store(ids + out, tl.where(filled, id_of_key(merged), -1), mask=slots < max_candidates)
    tl.store(candidate_logits + out, tl.where(filled, logit_of_key(merged), -_INF), mask=slots < max_candidates)
    tl.store(count + row, kept)
    tl.store(logsumexp + row, tl.where(usable, base + tl.log(total), float("nan")))
    tl.store(cut + row, found > max_candidates)


def num_tiles(vocab_size: int) -> int:
    """Tiles of a vocabulary: the T of `Partials`."""
    return triton.cdiv(vocab_size, _TILE)


def empty_partials(batch: int, vocab_size: int, max_candidates: int, device: torch.device) -> Partials:
    """Workspace of `select_candidates`."""
    return Partials.empty(batch, num_tiles(vocab_size), _TILE, max_candidates, device)


def select_candidates(
    logits: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
    outputs: Candidates,
    partials: Partials,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.select_candidates`: ids, order, counts and cut flags exactly, `logsumexp` within rounding.

    Args:
        logits: [B, V], float32, float16 or bfloat16; rows may have any stride. Ids from V on cannot be chosen: a view
            of the first columns limits the vocabulary.
        log_alpha: float32 [B], natural logarithm.
        candidate_top_k: int32 [B]; 0 for no limit.
        max_candidates: K, in [1, 1024].
        outputs: Written.
        partials: Workspace, see `empty_partials`.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or range.
    """
    check_ndim("logits", logits, 2)
    batch, vocab_size = logits.shape
    check_tensor("logits", logits, FLOATS, (batch, vocab_size), logits.device)
    check_range("size of the vocabulary in logits", vocab_size, 1)
    check_selection(batch, log_alpha, candidate_top_k, max_candidates, outputs, logits.device)
    check_num_rows(num_rows, logits.device)
    tiles = num_tiles(vocab_size)
    check_partials(partials, batch, tiles, _TILE, max_candidates, logits.device)
    if batch == 0:
        return
    _partial_kernel[(tiles, batch)](
        logits, log_alpha, num_rows, *partials, vocab_size, logits.stride(0), tiles,
        LISTED=partials.keys.shape[2], TILE=_TILE, enable_fp_fusion=False,
    )  # fmt: skip
    merge_partials(partials, log_alpha, candidate_top_k, max_candidates, vocab_size, outputs, num_rows)


def merge_partials(
    partials: Partials,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
    vocab_size: int,
    outputs: Candidates,
    num_rows: torch.Tensor | None,
) -> None:
    """The second kernel alone, on arguments that have been checked."""
    batch, tiles, listed = partials.keys.shape
    _merge_kernel[(batch,)](
        log_alpha, candidate_top_k, num_rows, *partials, *outputs, vocab_size, tiles, max_candidates,
        LISTED=listed, TILES=triton.next_power_of_2(tiles), SLOTS=triton.next_power_of_2(max_candidates),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def check_selection(
    batch: int,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
    outputs: Candidates,
    device: torch.device,
) -> None:
    """Refuse options and outputs that do not fit a selection from `batch` rows."""
    check_tensor("log_alpha", log_alpha, torch.float32, (batch,), device)
    check_tensor("candidate_top_k", candidate_top_k, torch.int32, (batch,), device)
    check_range("max_candidates", max_candidates, 1, MAX_CANDIDATES)
    check_output("ids", outputs.ids, torch.int32, (batch, max_candidates), device)
    check_output("logits of outputs", outputs.logits, torch.float32, (batch, max_candidates), device)
    check_output("count", outputs.count, torch.int32, (batch,), device)
    check_output("logsumexp", outputs.logsumexp, torch.float32, (batch,), device)
    check_output("cut", outputs.cut, torch.bool, (batch,), device)


def check_partials(
    partials: Partials, batch: int, tiles: int, tile: int, max_candidates: int, device: torch.device
) -> None:
    """Refuse a workspace of another size."""
    listed = min(max_candidates + 1, tile)
    check_output("maxima", partials.maxima, torch.float32, (batch, tiles), device)
    check_output("sums", partials.sums, torch.float32, (batch, tiles), device)
    check_output("counts", partials.counts, torch.int32, (batch, tiles), device)
    check_output("keys", partials.keys, torch.int64, (batch, tiles, listed), device)
