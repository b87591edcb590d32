"""Adjusted logits z* = z + beta * s (LLM2, equation 3), sampling processors and the pick, one program per row.

What top-k, top-p and min-p leave is a head of the ranking by (logit descending, id ascending). Up to 128 candidates are
compared with each other, which gives each its rank and the mass before it. In longer rows, such as the whole
vocabulary, top-k and top-p ask for the largest key from which on number or mass of the tokens reach a bound; it is
found bit by bit, in a pass over the row each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm2_fast.kernels.arguments import check_ndim, check_num_rows, check_output, check_range, check_tensor
from llm2_fast.kernels.gumbel import gumbel
from llm2_fast.kernels.ranking import NO_KEY, ranking_key
from llm2_fast.reference import Picked

_MAX_FEW = 128  # at most so many candidates are compared with each other
_BLOCK = 2048  # of longer rows


@triton.jit
def _scalar(value, dtype: tl.constexpr):
    """A scalar that loops can carry."""
    return tl.max(tl.full((1,), value, dtype), axis=0)


@triton.jit
def _adjusted(at, logits, scores, beta, count, num_scored):
    """float32 z + beta * s of the first `num_scored` candidates, rounded twice as the reference does; then z; -inf."""
    z = tl.load(logits + at, mask=at < count, other=float("-inf"))
    if scores is not None:
        s = tl.load(scores + at, mask=at < num_scored, other=0.0)
        z = tl.where(at < num_scored, z + beta * s, z)
    return z


@triton.jit
def _processed(start, ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK: tl.constexpr):
    """Index, existence, token id and penalized, scaled logit of the candidates from `start` on."""
    at = start + tl.arange(0, BLOCK)
    inside = at < count
    x = _adjusted(at, logits, scores, beta, count, num_scored)
    if seen is not None:
        is_seen = tl.load(seen + at, mask=inside, other=0) != 0
        x = tl.where(is_seen & (x <= 0), x * penalty, tl.div_rn(x, tl.where(is_seen, penalty, 1.0)))
    return at, inside, tl.load(ids + at, mask=inside, other=0), tl.div_rn(x, divisor)


@triton.jit
def _mass(x, top):
    """exp(x - top); logits that overflowed, as inf - inf would tell, are equal to the largest."""
    return tl.exp(tl.where(x == top, 0.0, x - top))


@triton.jit
def _best_of(kept, x, token, inside, at, temperature, seed, step, sample_index, request_id):
    """Key and index of the largest logit plus noise; ties go to the lowest id."""
    if temperature > 0:
        x += gumbel(token, step, sample_index, request_id, seed)
    key = tl.where(inside, ranking_key(tl.where(kept, x, float("-inf")), token), NO_KEY)
    best = tl.max(key, axis=0)
    return best, tl.min(tl.where(key == best, at, 2147483647), axis=0)


@triton.jit
def _pick_of_few(
    temperature, top_k, top_p, log_min_p, seed, step, sample_index, request_id,
    ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index of the pick among candidates that fit one block: each is compared with all others."""
    at, inside, token, x = _processed(0, ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK)
    top = tl.max(x, axis=0)
    kept = x >= top + log_min_p
    if (top_k > 0) | (top_p < 1):
        key = tl.where(inside, ranking_key(x, token), NO_KEY)
        rank = tl.zeros((BLOCK,), tl.int32)
        for other in range(count):
            rank += (tl.max(tl.where(at == other, key, NO_KEY), axis=0) > key).to(tl.int32)
        limit = tl.where(top_k > 0, top_k, BLOCK)
        weight = tl.where(rank < limit, tl.where(inside, _mass(x, top), 0.0), 0.0)
        mass_before = tl.zeros((BLOCK,), tl.float32)
        for other in range(count):
            before = tl.max(tl.where(at == other, key, NO_KEY), axis=0) > key
            mass_before += tl.where(before, tl.sum(tl.where(at == other, weight, 0.0), axis=0), 0.0)
        bound = tl.where(top_p < 1, top_p * tl.sum(weight, axis=0), float("inf"))
        kept = kept & (rank < limit) & (mass_before < bound)
    _, index = _best_of(kept, x, token, inside, at, temperature, seed, step, sample_index, request_id)
    return index


@triton.jit
def _weight_from(
    bound_key, floor, top, BY_MASS: tl.constexpr,
    ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK: tl.constexpr,
):  # fmt: skip
    """Number or mass of the tokens whose key is at least both `bound_key` and `floor`."""
    total = tl.sum(tl.zeros((1,), tl.float32), axis=0)
    for start in range(0, count, BLOCK):
        _, inside, token, x = _processed(
            start, ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK
        )
        weight = _mass(x, top) if BY_MASS else tl.full((BLOCK,), 1.0, tl.float32)
        counts = inside & (ranking_key(x, token) >= tl.maximum(bound_key, floor))
        total += tl.sum(tl.where(counts, weight, 0.0), axis=0)
    return total


@triton.jit
def _cutoff(
    bound, floor, top, BY_MASS: tl.constexpr,
    ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key from which on number or mass reach `bound`: sign first, then one bit after the other."""
    cutoff = _scalar(NO_KEY, tl.int64)
    for bit in range(64):
        trial = cutoff ^ (_scalar(1, tl.int64) << (63 - bit))
        total = _weight_from(
            trial, floor, top, BY_MASS,
            ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK,
        )  # fmt: skip
        cutoff = tl.where(total >= bound, trial, cutoff)
    return tl.maximum(cutoff, floor)


@triton.jit
def _pick_of_many(
    temperature, top_k, top_p, log_min_p, seed, step, sample_index, request_id,
    ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index of the pick, block by block."""
    top = _scalar(float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        _, _, _, x = _processed(start, ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK)
        top = tl.maximum(top, tl.max(x, axis=0))
    cutoff = _scalar(NO_KEY, tl.int64)
    if top_k > 0:
        cutoff = _cutoff(
            top_k.to(tl.float32), cutoff, top, False,
            ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK,
        )  # fmt: skip
    if top_p < 1:
        total = _weight_from(
            cutoff, cutoff, top, True, ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK
        )
        cutoff = _cutoff(
            top_p * total, cutoff, top, True,
            ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK,
        )  # fmt: skip
    best, index = _scalar(NO_KEY, tl.int64), _scalar(-1, tl.int32)
    for start in range(0, count, BLOCK):
        at, inside, token, x = _processed(
            start, ids, logits, scores, beta, seen, penalty, divisor, count, num_scored, BLOCK
        )
        kept = (ranking_key(x, token) >= cutoff) & (x >= top + log_min_p)
        best_here, index_here = _best_of(kept, x, token, inside, at, temperature, seed, step, sample_index, request_id)
        index = tl.where(best_here > best, index_here, index)
        best = tl.maximum(best, best_here)
    return index


@triton.jit
def _pick_kernel(
    candidate_ids, candidate_logits, count, scores, first_row, beta, seen, repetition_penalty, temperature, top_k,
    top_p, log_min_p, seed, step, sample_index, request_id, eos_token_ids, num_rows,
    index_out, token_out, logprob_out, system1_out, adjusted_out, finished_out,
    ids_stride, logits_stride, scores_stride, seen_stride, eos_stride, max_candidates, num_eos,
    BLOCK: tl.constexpr, FEW: tl.constexpr, EOS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if num_rows is not None and row >= tl.load(num_rows):
        return
    given = tl.load(count + row)
    length = tl.minimum(tl.maximum(given, 0), max_candidates)
    ids = candidate_ids + row * ids_stride
    logits = candidate_logits + row * logits_stride
    if scores is not None:
        scores += tl.load(first_row + row) if first_row is not None else row * scores_stride
    if seen is not None:
        seen += row * seen_stride
    num_scored = tl.where(given > 1, length, 0)
    row_beta = tl.load(beta + row)

    maximum, total = _scalar(float("-inf"), tl.float32), _scalar(0.0, tl.float32)
    num_nan = _scalar(0, tl.int32)
    for start in range(0, max_candidates, BLOCK):
        at = start + tl.arange(0, BLOCK)
        adjusted = _adjusted(at, logits, scores, row_beta, length, num_scored)
        tl.store(adjusted_out + row * max_candidates + at, adjusted, mask=at < max_candidates)
        num_nan += tl.sum((adjusted != adjusted).to(tl.int32), axis=0)
        new_maximum = tl.maximum(maximum, tl.max(adjusted, axis=0))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(adjusted - base), axis=0)
        maximum = new_maximum
    decided = (num_nan == 0) & (tl.abs(maximum) < float("inf"))

    index, system1, token = _scalar(-1, tl.int32), _scalar(-1, tl.int32), _scalar(-1, tl.int32)
    logprob = _scalar(float("nan"), tl.float32)
    if decided:
        row_temperature, penalty = tl.load(temperature + row), tl.load(repetition_penalty + row)
        row_top_k, row_top_p, row_min_p = tl.load(top_k + row), tl.load(top_p + row), tl.load(log_min_p + row)
        row_seed, row_step = tl.load(seed + row), tl.load(step + row)
        sample, request = tl.load(sample_index + row), tl.load(request_id + row)
        divisor = tl.where(row_temperature > 0, row_temperature, 1.0)
        scored = num_scored
        for _ in range(tl.where(num_scored > 0, 2, 1)):  # the second time without scores: what System 1 would pick
            if FEW:
                system1 = _pick_of_few(
                    row_temperature, row_top_k, row_top_p, row_min_p, row_seed, row_step, sample, request,
                    ids, logits, scores, row_beta, seen, penalty, divisor, length, scored, BLOCK,
                )  # fmt: skip
            else:
                system1 = _pick_of_many(
                    row_temperature, row_top_k, row_top_p, row_min_p, row_seed, row_step, sample, request,
                    ids, logits, scores, row_beta, seen, penalty, divisor, length, scored, BLOCK,
                )  # fmt: skip
            index = tl.where(index < 0, system1, index)
            scored *= 0
        token = tl.load(ids + index)
        logprob = _adjusted(index, logits, scores, row_beta, length, num_scored) - (maximum + tl.log(total))
    eos = tl.arange(0, EOS)
    is_eos = tl.load(eos_token_ids + row * eos_stride + eos, mask=eos < num_eos, other=-1) == token
    tl.store(index_out + row, index)
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, logprob)
    tl.store(system1_out + row, system1)
    tl.store(finished_out + row, (tl.max(is_eos.to(tl.int32), axis=0) > 0) & decided)


def adjust_and_pick(
    candidate_ids: torch.Tensor,
    candidate_logits: torch.Tensor,
    count: torch.Tensor,
    scores: torch.Tensor | None,
    beta: torch.Tensor,
    seen: torch.Tensor | None,
    repetition_penalty: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    sample_index: torch.Tensor,
    request_id: torch.Tensor,
    eos_token_ids: torch.Tensor,
    outputs: Picked,
    first_row: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`llm2_fast.reference.adjust_and_pick`, equal but for the rounding of logarithms and of the mass of `top_p`.

    Args:
        candidate_ids: int32 [B, K], K >= 1; here and in all matrices rows may have any stride.
        candidate_logits: float32 [B, K].
        count: int32 [B].
        scores: float32 [B, K], or with `first_row` [R], or None.
        beta, repetition_penalty, temperature, top_p, log_min_p: float32 [B].
        seen: bool [B, K] or None.
        top_k: int32 [B]; 0 for no limit.
        seed: int64 [B].
        step, sample_index, request_id: int32 [B].
        eos_token_ids: int32 [B, E], padded with -1.
        outputs: Written.
        first_row: int32 [B]; the scores of row b are those from `first_row[b]` on, `count[b]` of them.
        num_rows: int32 [1]; rows from it on are not touched. None for all.

    Raises:
        ArgumentError: An argument has the wrong shape, dtype, strides, device or range.
    """
    device = candidate_ids.device
    check_ndim("candidate_ids", candidate_ids, 2)
    batch, width = candidate_ids.shape
    check_range("number of candidates in candidate_ids", width, 1)
    check_tensor("candidate_ids", candidate_ids, torch.int32, (batch, width), device)
    check_tensor("candidate_logits", candidate_logits, torch.float32, (batch, width), device)
    if first_row is not None:
        check_tensor("first_row", first_row, torch.int32, (batch,), device)
    if scores is not None:
        shape = (batch, width) if first_row is None else (scores.numel(),)
        check_tensor("scores", scores, torch.float32, shape, device)
    if seen is not None:
        check_tensor("seen", seen, torch.bool, (batch, width), device)
    check_ndim("eos_token_ids", eos_token_ids, 2)
    num_eos = eos_token_ids.shape[1]
    check_tensor("eos_token_ids", eos_token_ids, torch.int32, (batch, num_eos), device)
    vectors = {"count": count, "top_k": top_k, "step": step, "sample_index": sample_index, "request_id": request_id}
    for name, tensor in vectors.items():
        check_tensor(name, tensor, torch.int32, (batch,), device)
    vectors = {"beta": beta, "repetition_penalty": repetition_penalty, "temperature": temperature, "top_p": top_p}
    for name, tensor in (vectors | {"log_min_p": log_min_p}).items():
        check_tensor(name, tensor, torch.float32, (batch,), device)
    check_tensor("seed", seed, torch.int64, (batch,), device)
    _check_outputs(outputs, batch, width, device)
    check_num_rows(num_rows, device)
    if batch == 0:
        return
    few = width <= _MAX_FEW
    _pick_kernel[(batch,)](
        candidate_ids, candidate_logits, count, scores, first_row, beta,
        None if seen is None else seen.view(torch.uint8), repetition_penalty, temperature, top_k, top_p, log_min_p,
        seed, step, sample_index, request_id, eos_token_ids, num_rows, *outputs,
        candidate_ids.stride(0), candidate_logits.stride(0), 0 if scores is None else scores.stride(0),
        0 if seen is None else seen.stride(0), eos_token_ids.stride(0), width, num_eos,
        BLOCK=triton.next_power_of_2(width) if few else _BLOCK, FEW=few,
        EOS=triton.next_power_of_2(max(1, num_eos)), num_warps=1 if few else 16, enable_fp_fusion=False,
    )  # fmt: skip


def _check_outputs(outputs: Picked, batch: int, width: int, device: torch.device) -> None:
    check_output("index", outputs.index, torch.int32, (batch,), device)
    check_output("token", outputs.token, torch.int32, (batch,), device)
    check_output("logprob", outputs.logprob, torch.float32, (batch,), device)
    check_output("system1_index", outputs.system1_index, torch.int32, (batch,), device)
    check_output("adjusted", outputs.adjusted, torch.float32, (batch, width), device)
    check_output("finished", outputs.finished, torch.bool, (batch,), device)
