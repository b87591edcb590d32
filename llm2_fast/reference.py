"""The ops in plain torch: the definition every other backend answers to.

Nothing here is fast, and nothing here is shared with the kernels it is compared with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llm2_fast.rng import gumbel

NEG_INF = float("-inf")


class Candidates(NamedTuple):
    """The plausible tokens of each row, in order of (logit descending, token id ascending)."""

    ids: torch.Tensor  # int32 [B, K], -1 past the count
    logits: torch.Tensor  # float32 [B, K], -inf past the count
    count: torch.Tensor  # int32 [B]; 0 marks a row without a usable maximum (NaN, or nothing finite)
    logsumexp: torch.Tensor  # float32 [B], over the whole vocabulary; NaN where count is 0
    cut: torch.Tensor  # bool [B]; max_candidates dropped plausible tokens


class Picked(NamedTuple):
    """The outcome of a step. Rows that could not be decided have index and token -1 and a NaN logprob."""

    index: torch.Tensor  # int32 [B], into the candidates
    token: torch.Tensor  # int32 [B]
    logprob: torch.Tensor  # float32 [B], log-softmax of the adjusted logits over the candidates, before processors
    system1_index: torch.Tensor  # int32 [B], what beta = 0 would have picked with the same random numbers
    adjusted: torch.Tensor  # float32 [B, K], z + beta * s, -inf past the count
    finished: torch.Tensor  # bool [B], the token is one of the row's end-of-sequence tokens


def usable_rows(logits: torch.Tensor) -> torch.Tensor:
    """bool [B]: rows of [B, V] without NaN whose maximum is finite."""
    return ~logits.isnan().any(dim=-1) & logits.amax(dim=-1).isfinite()


def select_candidates(
    logits: torch.Tensor, log_alpha: torch.Tensor, candidate_top_k: torch.Tensor, max_candidates: int
) -> Candidates:
    """The plausible set C = {v : z_v >= max z + ln(alpha)} (LLM2, equation 1), largest first.

    Tokens whose logit is -inf have probability zero and are never candidates, not even with alpha = 0.

    Args:
        logits: [B, V], float32, float16 or bfloat16; compared in float32.
        log_alpha: float32 [B], ln(alpha); -inf turns the constraint off.
        candidate_top_k: int32 [B]; keep at most this many, 0 for no limit.
        max_candidates: K, the bound on any row's candidates; at most V columns are returned filled.

    Returns:
        `Candidates` with K = `max_candidates`.
    """
    batch, vocab = logits.shape
    z = logits.to(torch.float32)
    usable = usable_rows(z)
    threshold = z.amax(dim=-1) + log_alpha
    plausible = (z >= threshold.unsqueeze(-1)) & (z > NEG_INF) & usable.unsqueeze(-1)

    limit = torch.where(candidate_top_k > 0, candidate_top_k, vocab).clamp(max=vocab)
    wanted = torch.minimum(plausible.sum(dim=-1), limit)
    count = wanted.clamp(max=max_candidates)

    # A stable sort leaves equal logits in token order.
    values, order = z.masked_fill(~plausible, NEG_INF).sort(dim=-1, descending=True, stable=True)
    width = min(max_candidates, vocab)
    kept = torch.arange(width, device=z.device) < count.unsqueeze(-1)
    ids = z.new_full((batch, max_candidates), -1, dtype=torch.int32)
    ids[:, :width] = order[:, :width].to(torch.int32).masked_fill(~kept, -1)
    candidate_logits = z.new_full((batch, max_candidates), NEG_INF)
    candidate_logits[:, :width] = values[:, :width].masked_fill(~kept, NEG_INF)
    logsumexp = z.logsumexp(dim=-1).masked_fill(~usable, float("nan"))
    return Candidates(ids, candidate_logits, count.to(torch.int32), logsumexp, wanted > max_candidates)


def process_logits(
    logits: torch.Tensor,
    ids: torch.Tensor,
    seen: torch.Tensor | None,
    repetition_penalty: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
) -> torch.Tensor:
    """Repetition penalty, temperature, top-k, top-p and min-p, in this order; dropped tokens become -inf.

    Order among equal logits is by token id, so exactly `top_k` tokens survive.

    Args:
        logits: float32 [B, K]; -inf marks tokens that are out already.
        ids: int32 [B, K], token ids, for the order of ties.
        seen: bool [B, K] or None, tokens already in the sequence.
        repetition_penalty, temperature, top_p, log_min_p: float32 [B]; temperature 0 divides by 1.
        top_k: int32 [B]; 0 for no limit.

    Returns:
        float32 [B, K].
    """
    x = logits
    if seen is not None:
        penalty = repetition_penalty.unsqueeze(-1)
        x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
    x = x / torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)
    if not ((top_k > 0) | (top_p < 1) | (log_min_p > NEG_INF)).any():
        return x  # nothing drops tokens, so the two sorts below would change nothing

    by_id = ids.argsort(dim=-1, stable=True)
    order = by_id.gather(-1, x.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True))
    ranked = x.gather(-1, order)
    rank = torch.arange(x.shape[-1], device=x.device)
    keep = (rank < top_k.unsqueeze(-1)) | (top_k.unsqueeze(-1) == 0)
    ranked = ranked.masked_fill(~keep, NEG_INF)
    # inf - inf: logits that overflowed at a tiny temperature are equal to the largest.
    weight = (ranked - ranked[:, :1]).nan_to_num(nan=0.0).exp()
    before = weight.cumsum(dim=-1) - weight
    keep = (before < top_p.unsqueeze(-1) * weight.sum(dim=-1, keepdim=True)) | (top_p.unsqueeze(-1) >= 1)
    keep &= ranked >= ranked[:, :1] + log_min_p.unsqueeze(-1)
    ranked = ranked.masked_fill(~keep, NEG_INF)
    return torch.empty_like(x).scatter_(-1, order, ranked)


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
) -> Picked:
    """Adjusted logits z* = z + beta * s (LLM2, equation 3), sampling processors and the pick.

    Temperature 0 picks argmax z*; otherwise argmax(z* / T + Gumbel(u)) over what the processors left. Ties go to the
    lowest token id. A row with one candidate takes it whatever its score. A row whose count is 0, or in which an
    adjusted logit is NaN or their maximum is not finite, is not decided: index and token are -1.

    Args:
        candidate_ids: int32 [B, K].
        candidate_logits: float32 [B, K], raw logits z.
        count: int32 [B], candidates of each row; entries past it are ignored.
        scores: float32 [B, K] or None (no verifier: z* = z).
        beta: float32 [B].
        seen, repetition_penalty, temperature, top_k, top_p, log_min_p: See `process_logits`.
        seed: int64 [B]. step, sample_index, request_id: int32 [B]. The random counter.
        eos_token_ids: int32 [B, E], padded with -1.

    Returns:
        `Picked`.
    """
    inside = torch.arange(candidate_ids.shape[-1], device=candidate_ids.device) < count.unsqueeze(-1)
    z = candidate_logits.masked_fill(~inside, NEG_INF)
    adjusted = z
    if scores is not None:
        ambiguous = (count > 1).unsqueeze(-1)
        adjusted = torch.where(inside & ambiguous, z + beta.unsqueeze(-1) * scores, z)
    decided = usable_rows(adjusted) & (count > 0)

    def pick(logits: torch.Tensor) -> torch.Tensor:
        x = process_logits(logits, candidate_ids, seen, repetition_penalty, temperature, top_k, top_p, log_min_p)
        if (temperature > 0).any():
            noise = gumbel(candidate_ids, step, sample_index, request_id, seed)
            x = torch.where((temperature > 0).unsqueeze(-1), x + noise, x)
        best = x == x.amax(dim=-1, keepdim=True)
        lowest_id = torch.where(best & inside, candidate_ids, torch.iinfo(torch.int32).max)
        return lowest_id.argmin(dim=-1)

    index, system1_index = pick(adjusted), pick(z)
    token = candidate_ids.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    logprob = adjusted.log_softmax(dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    token = token.masked_fill(~decided, -1)
    return Picked(
        index.to(torch.int32).masked_fill(~decided, -1),
        token,
        logprob.masked_fill(~decided, float("nan")),
        system1_index.to(torch.int32).masked_fill(~decided, -1),
        adjusted,
        decided & (token.unsqueeze(-1) == eos_token_ids).any(dim=-1),
    )


def branch_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_sequence: torch.Tensor,
    row_prefix_length: torch.Tensor,
    row_has_own: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """Attention of rows to the paged prefix of their sequence and, for branches, to themselves.

    Row r sees keys [0, row_prefix_length[r]) of its sequence and, if `row_has_own[r]`, its own key at position
    `row_prefix_length[r]`. Siblings do not see each other. With a sliding window w, a row at position p (the own
    position, or the last prefix position when it has no own key) sees positions > p - w only. A row that sees nothing
    gives zeros. Softmax in float32.

    Args:
        query: [R, num_heads, head_dim], float32, float16 or bfloat16.
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of `query`.
        block_table: int32 [S, max_blocks]; block i of a sequence holds positions [i * block_size, (i+1) * block_size).
        row_sequence: int32 [R], row of `block_table`.
        row_prefix_length: int32 [R].
        row_has_own: bool [R].
        own_key, own_value: [R, num_kv_heads, head_dim]; read only where `row_has_own`.
        scale: Factor on the dot products.
        sliding_window: 0 for none.

    Returns:
        [R, num_heads, head_dim], dtype of `query`.
    """
    rows, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    output = torch.zeros_like(query)
    for r in range(rows):
        length, has_own = int(row_prefix_length[r]), bool(row_has_own[r])
        position = length if has_own else length - 1
        start = max(0, position - sliding_window + 1) if sliding_window > 0 else 0
        blocks = block_table[int(row_sequence[r]), : -(-length // block_size)].long()
        keys = key_cache[blocks].transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[start:length]
        values = value_cache[blocks].transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[start:length]
        if has_own:
            keys = torch.cat([keys, own_key[r : r + 1]])
            values = torch.cat([values, own_value[r : r + 1]])
        if len(keys) == 0:
            continue
        grouped = query[r].float().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
        weights = (torch.einsum("hgd,thd->hgt", grouped, keys.float()) * scale).softmax(dim=-1)
        output[r] = torch.einsum("hgt,thd->hgd", weights, values.float()).reshape(num_heads, head_dim).to(query.dtype)
    return output


def pairwise_loss(positive_scores: torch.Tensor, negative_scores: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(s+ - s-), averaged over pairs (LLM2, equation 4).

    Pair m compares `positive_scores[position[m]]` with `negative_scores[m]`; many pairs may share a positive. With
    p[m] = sigmoid(s- - s+) of pair m, the gradient is p[m] / M for `negative_scores[m]` and minus the sum of
    p[m] / M over the pairs with position[m] = i for `positive_scores[i]`. Without pairs, loss and gradient are 0.

    Args:
        positive_scores: float32 [P].
        negative_scores: float32 [M].
        position: int64 [M], in [0, P).

    Returns:
        float32 scalar.
    """
    margin = positive_scores[position] - negative_scores
    return -torch.nn.functional.logsigmoid(margin).sum() / max(1, len(position))


def pairwise_loss_gradient(
    positive_scores: torch.Tensor, negative_scores: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `pairwise_loss`, as stated there: float32 [P] and [M]."""
    share = torch.sigmoid(negative_scores - positive_scores[position]) / max(1, len(position))
    return torch.zeros_like(positive_scores).index_add(0, position, -share), share


def branch_rows(
    ids: torch.Tensor, count: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The branches of all sequences packed into rows, one sequence's after the other's.

    Branch k < count[b] of sequence b is row `first_row[b] + k`: token `ids[b, k]` at position `lengths[b]`.

    Args:
        ids: int32 [B, K].
        count: int32 [B], branches of each sequence, in [0, K].
        lengths: int32 [B], committed positions.

    Returns:
        first_row int32 [B + 1], whose last entry is the number of all branches; row_token, row_sequence and
        row_position int32 [B * K], 0 from the number of rows on; and the number of rows, int32 [1].
    """
    first_row = torch.nn.functional.pad(count.cumsum(0), (1, 0)).to(torch.int32)
    row_token, row_sequence, row_position = (ids.new_zeros(ids.numel()) for _ in range(3))
    for sequence, (begin, end) in enumerate(zip(first_row[:-1].tolist(), first_row[1:].tolist(), strict=True)):
        row_token[begin:end] = ids[sequence, : end - begin]
        row_sequence[begin:end] = sequence
        row_position[begin:end] = lengths[sequence]
    return first_row, row_token, row_sequence, row_position, first_row[-1:].clone()


def embed(
    row_token: torch.Tensor,
    row_position: torch.Tensor,
    embedding: torch.Tensor,
    scale: float,
    inv_freq: torch.Tensor,
    rotary_scale: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What rows bring into the first layer: embeddings, and cosines and sines of their rotary positions.

    Args:
        row_token, row_position: int32 [R].
        embedding: [V, hidden_size], float32, float16 or bfloat16.
        scale: Factor on the embeddings, whose products are rounded to the dtype of `embedding`.
        inv_freq: float32 [T, head_dim / 2], frequencies of T rotary tables in radians per position.
        rotary_scale: float32 [T], factor on cosines and sines.
        dtype: Of the embeddings that are returned; None for that of `embedding`.

    Returns:
        [R, hidden_size], and float32 cosines and sines [T, R, head_dim / 2] of the float32 angles.
    """
    rows = (embedding[row_token.long()].float() * scale).to(embedding.dtype)
    angles = row_position.float().unsqueeze(-1) * inv_freq.unsqueeze(1)
    amplitude = rotary_scale.view(-1, 1, 1)
    return rows.to(dtype or rows.dtype, copy=True), angles.cos() * amplitude, angles.sin() * amplitude


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_hidden: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    row_adapted: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = W x + bias, for the adapted rows + B (A x) (LoRA); then the activation; then + residual. All in float32.

    Args:
        x: [R, in_features], float32, float16 or bfloat16.
        weight: [N, in_features], dtype of `x`. With an activation the first half of y are gates, the second what they
            gate, and out_features = N / 2; otherwise out_features = N.
        bias: [N] or None.
        lora_hidden: [R, r], A x; or None, and then `lora_b` and `row_adapted` too.
        lora_b: [N, r], scaling included.
        row_adapted: bool [R].
        residual: [R, out_features] or None.
        activation: None, "silu_mul" (see `silu_mul`) or "gelu_tanh_mul" (see `gelu_tanh_mul`).
        dtype: Of the result; None for that of `x`.

    Returns:
        [R, out_features].
    """
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if lora_hidden is not None:
        y = torch.where(row_adapted.unsqueeze(-1), y + lora_hidden.float() @ lora_b.float().T, y)
    if activation is not None:
        y = {"silu_mul": silu_mul, "gelu_tanh_mul": gelu_tanh_mul}[activation](y)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype if dtype is None else dtype)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32, for x = [gate, up]: [R, 2 F], float32, float16 or bfloat16 -> [R, F], its dtype."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up in float32, GELU with its tanh approximation; shapes as for `silu_mul`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) in float32, over the last dimension.

    Args:
        x: [..., size], float32, float16 or bfloat16.
        weight: [size].
        eps: Added to the mean square.
        dtype: Of the result; None for that of `x`.

    Returns:
        [..., size].
    """
    h = x.float()
    y = weight.float() * (h / (h.square().mean(dim=-1, keepdim=True) + eps).sqrt())
    return y.to(x.dtype if dtype is None else dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of the residual stream: the norm of residual + x, dtype of `x`, and the sum, dtype of `residual`."""
    summed = (residual.float() + x.float()).to(residual.dtype)
    return rms_norm(summed, weight, eps, x.dtype), summed


def rope_and_store(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    num_heads: int,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_sequence: torch.Tensor,
    row_position: torch.Tensor,
    row_stored: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a projection: norm of each head, rotary position, and store to the cache.

    Queries and keys are rotated: of a head x, the pair (x[i], x[i + D/2]) by the i-th angle of the row. The keys and
    values of rows that extend their sequence are stored at their position. Computed in float32.

    Args:
        qkv: [R, (num_heads + 2 * num_kv_heads) * head_dim], float32, float16 or bfloat16.
        cosine, sine: float32 [R, head_dim / 2], of each row's position, scaled.
        q_norm, k_norm: [head_dim], weights of `rms_norm` over each head, or None.
        eps: Of these norms.
        num_heads: Query heads.
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim]; written where `row_stored`.
        block_table: int32 [S, max_blocks], as for `branch_attention`.
        row_sequence, row_position: int32 [R].
        row_stored: bool [R], the row extends its sequence.

    Returns:
        query [R, num_heads, head_dim], own_key and own_value [R, num_kv_heads, head_dim], dtype of the caches.
    """
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    heads = qkv.float().view(len(qkv), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def rotate(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        first, second = (x if norm is None else rms_norm(x, norm, eps)).chunk(2, dim=-1)
        c, s = cosine.unsqueeze(1), sine.unsqueeze(1)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    rotated = (rotate(heads[0], q_norm), rotate(heads[1], k_norm), heads[2])
    query, own_key, own_value = (x.to(key_cache.dtype, copy=True) for x in rotated)
    for r in row_stored.nonzero().flatten().tolist():
        position = int(row_position[r])
        block = int(block_table[int(row_sequence[r]), position // block_size])
        key_cache[block, :, position % block_size] = own_key[r]
        value_cache[block, :, position % block_size] = own_value[r]
    return query, own_key, own_value


def score_head(
    hidden_states: torch.Tensor,
    dense_weight: torch.Tensor | None,
    dense_bias: torch.Tensor | None,
    score_weight: torch.Tensor,
    score_bias: float = 0.0,
) -> torch.Tensor:
    """Verifier scores w . h + b, or w . silu(W h + c) + b, in float32.

    Args:
        hidden_states: [R, features], of several layers concatenated.
        dense_weight, dense_bias: float32 [M, features] and [M], or None for a linear head.
        score_weight: float32 [M], or [features] of a linear head.
        score_bias: Added to every score.

    Returns:
        float32 [R].
    """
    x = hidden_states.float()
    if dense_weight is not None:
        x = torch.nn.functional.silu(x @ dense_weight.T + dense_bias)
    return x @ score_weight + score_bias


def commit(
    index: torch.Tensor,
    first_row: torch.Tensor,
    row_sequence: torch.Tensor,
    row_position: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    row_hidden_states: torch.Tensor,
    block_table: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    hidden_states: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Make the picked branch of each sequence its last token, in place.

    Args:
        index: int32 [B], picked branch; -1 leaves the sequence as it is.
        first_row: int32 [B], row of the sequence's first branch; the picked one is row `first_row + index`.
        row_sequence, row_position: int32 [R]; `row_position` is the sequence's length before the commit.
        own_key, own_value: [L, R, num_kv_heads, head_dim], of every layer.
        row_hidden_states: [R, hidden_size].
        block_table: int32 [S, max_blocks], as for `branch_attention`.
        key_cache, value_cache: [L, num_blocks, num_kv_heads, block_size, head_dim]; written.
        hidden_states: [S, hidden_size], of the last token of each sequence; written.
        lengths: int32 [S], cached positions; written.
    """
    block_size = key_cache.shape[3]
    for picked, first in zip(index.tolist(), first_row.tolist(), strict=True):
        if picked < 0:
            continue
        row = first + picked
        sequence, position = int(row_sequence[row]), int(row_position[row])
        block = int(block_table[sequence, position // block_size])
        key_cache[:, block, :, position % block_size] = own_key[:, row]
        value_cache[:, block, :, position % block_size] = own_value[:, row]
        hidden_states[sequence] = row_hidden_states[row]
        lengths[sequence] = position + 1


def lm_head_select(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
) -> Candidates:
    """`select_candidates` of the float32 logits W h, for hidden_states [B, hidden_size] and weight [V, hidden_size]."""
    logits = hidden_states.float() @ weight.float().T
    return select_candidates(logits, log_alpha, candidate_top_k, max_candidates)
