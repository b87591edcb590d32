"""More ops as `torch.ops.llm2_fast.*`: those of decoder layers and of training, for which there are Triton kernels.

Every op has the arguments, in name and order, and the meaning of the function of the same name in
`llm2_fast.reference`, which computes it on CPU tensors. On CUDA tensors a kernel of `llm2_fast.kernels` does; it trusts
indices, and raises `ArgumentError` for everything else that does not fit. The compiled decoders of the cpu backend have
their own code and do not use these.
"""

from __future__ import annotations

import functools

import torch

from llm2_fast import ops, reference
from llm2_fast.ops import triton_needed
from llm2_fast.reference import Candidates

_LIBRARY = torch.library.Library("llm2_fast", "FRAGMENT")
_OPERATORS = torch.ops.llm2_fast


def _define(schema: str) -> None:
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)


# --- rows of branches, embeddings -------------------------------------------------------------------------------------

_define("branch_rows(Tensor ids, Tensor count, Tensor lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


@torch.library.register_fake("llm2_fast::branch_rows", lib=_LIBRARY)
def _empty_rows(ids: torch.Tensor, count: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    batch, width = ids.shape
    rows = (ids.new_zeros(batch * width) for _ in range(3))
    return ids.new_empty(batch + 1), *rows, ids.new_empty(1)


def _branch_rows_cuda(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with triton_needed():
        from llm2_fast.kernels.branch_rows import branch_rows
    outputs = _empty_rows(*inputs)
    branch_rows(*inputs, *outputs)
    return outputs


_LIBRARY.impl("branch_rows", reference.branch_rows, "CPU")
_LIBRARY.impl("branch_rows", _branch_rows_cuda, "CUDA")
branch_rows = _OPERATORS.branch_rows.default

_define(
    "embed(Tensor row_token, Tensor row_position, Tensor embedding, float scale, Tensor inv_freq, Tensor rotary_scale,"
    " ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("llm2_fast::embed", lib=_LIBRARY)
def _empty_embeddings(
    row_token: torch.Tensor,
    row_position: torch.Tensor,
    embedding: torch.Tensor,
    scale: float,
    inv_freq: torch.Tensor,
    rotary_scale: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, (tables, half) = row_token.shape[0], inv_freq.shape
    cosine, sine = (inv_freq.new_empty((tables, rows, half)) for _ in range(2))
    return embedding.new_empty((rows, embedding.shape[1]), dtype=dtype), cosine, sine


def _embed_cuda(*inputs: torch.Tensor | float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with triton_needed():
        from llm2_fast.kernels.embed import embed
    outputs = _empty_embeddings(*inputs)
    embed(*inputs[:6], *outputs)
    return outputs


_LIBRARY.impl("embed", reference.embed, "CPU")
_LIBRARY.impl("embed", _embed_cuda, "CUDA")
embed = _OPERATORS.embed.default


# --- linear -----------------------------------------------------------------------------------------------------------

_define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? lora_hidden=None, Tensor? lora_b=None,"
    " Tensor? row_adapted=None, Tensor? residual=None, str? activation=None, ScalarType? dtype=None) -> Tensor"
)


@torch.library.register_fake("llm2_fast::linear", lib=_LIBRARY)
def _empty_linear(
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
    features = weight.shape[0] if activation is None else weight.shape[0] // 2
    return x.new_empty((x.shape[0], features), dtype=dtype)


def _linear_cuda(
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
    with triton_needed():
        from llm2_fast.kernels.linear import empty_partial, linear
    inputs = (x, weight, bias, lora_hidden, lora_b, row_adapted, residual, activation)
    output = _empty_linear(*inputs, dtype)
    linear(*inputs, output, empty_partial(x.shape[0], weight))
    return output


_LIBRARY.impl("linear", reference.linear, "CPU")
_LIBRARY.impl("linear", _linear_cuda, "CUDA")
linear = _OPERATORS.linear.default


# --- gated activations ------------------------------------------------------------------------------------------------

_define("silu_mul(Tensor x) -> Tensor")
_define("gelu_tanh_mul(Tensor x) -> Tensor")


def _empty_gated(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _gated_cuda(activation: str, x: torch.Tensor) -> torch.Tensor:
    with triton_needed():
        from llm2_fast.kernels.gated_activation import gated_activation
    output = _empty_gated(x)
    gated_activation(x, activation, output)
    return output


_silu_mul_cuda = functools.partial(_gated_cuda, "silu_mul")
_gelu_tanh_mul_cuda = functools.partial(_gated_cuda, "gelu_tanh_mul")
torch.library.register_fake("llm2_fast::silu_mul", _empty_gated, lib=_LIBRARY)
torch.library.register_fake("llm2_fast::gelu_tanh_mul", _empty_gated, lib=_LIBRARY)
_LIBRARY.impl("silu_mul", reference.silu_mul, "CPU")
_LIBRARY.impl("silu_mul", _silu_mul_cuda, "CUDA")
_LIBRARY.impl("gelu_tanh_mul", reference.gelu_tanh_mul, "CPU")
_LIBRARY.impl("gelu_tanh_mul", _gelu_tanh_mul_cuda, "CUDA")
silu_mul = _OPERATORS.silu_mul.default
gelu_tanh_mul = _OPERATORS.gelu_tanh_mul.default


# --- rms_norm ---------------------------------------------------------------------------------------------------------

_define("rms_norm(Tensor x, Tensor weight, float eps, ScalarType? dtype=None) -> Tensor")
_define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")


@torch.library.register_fake("llm2_fast::rms_norm", lib=_LIBRARY)
def _empty_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("llm2_fast::add_rms_norm", lib=_LIBRARY)
def _empty_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), residual.new_empty(x.shape)


def _rms_norm_cuda(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    with triton_needed():
        from llm2_fast.kernels.rms_norm import rms_norm
    output = _empty_norm(x, weight, eps, dtype)
    rms_norm(x, weight, eps, None, output, None)
    return output


def _add_rms_norm_cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with triton_needed():
        from llm2_fast.kernels.rms_norm import rms_norm
    output, summed = _empty_add_norm(x, residual, weight, eps)
    rms_norm(x, weight, eps, residual, output, summed)
    return output, summed


_LIBRARY.impl("rms_norm", reference.rms_norm, "CPU")
_LIBRARY.impl("rms_norm", _rms_norm_cuda, "CUDA")
_LIBRARY.impl("add_rms_norm", reference.add_rms_norm, "CPU")
_LIBRARY.impl("add_rms_norm", _add_rms_norm_cuda, "CUDA")
rms_norm = _OPERATORS.rms_norm.default
add_rms_norm = _OPERATORS.add_rms_norm.default


# --- rope_and_store ---------------------------------------------------------------------------------------------------

_define(
    "rope_and_store(Tensor qkv, Tensor cosine, Tensor sine, Tensor? q_norm, Tensor? k_norm, float eps,"
    " SymInt num_heads, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_table, Tensor row_sequence,"
    " Tensor row_position, Tensor row_stored) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("llm2_fast::rope_and_store", lib=_LIBRARY)
def _empty_heads(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    num_heads: int,
    key_cache: torch.Tensor,
    *_: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, num_kv_heads, head_dim = qkv.shape[0], key_cache.shape[1], key_cache.shape[3]
    query = key_cache.new_empty((rows, num_heads, head_dim))
    own_key, own_value = (key_cache.new_empty((rows, num_kv_heads, head_dim)) for _ in range(2))
    return query, own_key, own_value


def _rope_and_store_cuda(*inputs: torch.Tensor | float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with triton_needed():
        from llm2_fast.kernels.rope_and_store import rope_and_store
    outputs = _empty_heads(*inputs)
    before, after = inputs[:6], inputs[7:]  # the number of heads is in the shape of the queries
    rope_and_store(*before, *after, *outputs)
    return outputs


_LIBRARY.impl("rope_and_store", reference.rope_and_store, "CPU")
_LIBRARY.impl("rope_and_store", _rope_and_store_cuda, "CUDA")
rope_and_store = _OPERATORS.rope_and_store.default


# --- score_head -------------------------------------------------------------------------------------------------------

_define(
    "score_head(Tensor hidden_states, Tensor? dense_weight, Tensor? dense_bias, Tensor score_weight,"
    " float score_bias=0.0) -> Tensor"
)


@torch.library.register_fake("llm2_fast::score_head", lib=_LIBRARY)
def _empty_scores(hidden_states: torch.Tensor, *_: torch.Tensor | float | None) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.shape[0],), dtype=torch.float32)


def _score_head_cuda(
    hidden_states: torch.Tensor,
    dense_weight: torch.Tensor | None,
    dense_bias: torch.Tensor | None,
    score_weight: torch.Tensor,
    score_bias: float = 0.0,
) -> torch.Tensor:
    with triton_needed():
        from llm2_fast.kernels.score_head import score_head
    scores = _empty_scores(hidden_states)
    units = None
    if dense_weight is not None:
        units = scores.new_empty((hidden_states.shape[0], dense_weight.shape[0]))
    score_head(hidden_states, dense_weight, dense_bias, score_weight, score_bias, scores, units)
    return scores


_LIBRARY.impl("score_head", reference.score_head, "CPU")
_LIBRARY.impl("score_head", _score_head_cuda, "CUDA")
score_head = _OPERATORS.score_head.default


# --- commit -----------------------------------------------------------------------------------------------------------

_define(
    "commit(Tensor index, Tensor first_row, Tensor row_sequence, Tensor row_position, Tensor own_key, Tensor own_value,"
    " Tensor row_hidden_states, Tensor block_table, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor(c!) hidden_states, Tensor(d!) lengths) -> ()"
)


def _commit_cuda(*inputs: torch.Tensor) -> None:
    with triton_needed():
        from llm2_fast.kernels.commit import commit
    commit(*inputs)


torch.library.register_fake("llm2_fast::commit", lambda *_: None, lib=_LIBRARY)
_LIBRARY.impl("commit", reference.commit, "CPU")
_LIBRARY.impl("commit", _commit_cuda, "CUDA")
commit = _OPERATORS.commit.default


# --- lm_head_select ---------------------------------------------------------------------------------------------------

_define(
    "lm_head_select(Tensor hidden_states, Tensor weight, Tensor log_alpha, Tensor candidate_top_k,"
    " SymInt max_candidates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("llm2_fast::lm_head_select", lib=_LIBRARY)
def _empty_selection(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
) -> Candidates:
    return ops._empty_candidates(hidden_states, log_alpha, candidate_top_k, max_candidates)


def _lm_head_select_cuda(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
) -> Candidates:
    with triton_needed():
        from llm2_fast.kernels.lm_head_select import empty_partials, lm_head_select
    inputs = (hidden_states, weight, log_alpha, candidate_top_k, max_candidates)
    outputs = _empty_selection(*inputs)
    partials = empty_partials(hidden_states.shape[0], weight.shape[0], max_candidates, hidden_states.device)
    lm_head_select(*inputs, outputs, partials)
    return outputs


_LIBRARY.impl("lm_head_select", reference.lm_head_select, "CPU")
_LIBRARY.impl("lm_head_select", _lm_head_select_cuda, "CUDA")


def lm_head_select(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
) -> Candidates:
    """The plausible tokens after `hidden_states`, as `llm2_fast.reference.lm_head_select`; no logits are written."""
    inputs = (hidden_states, weight, log_alpha, candidate_top_k, max_candidates)
    return Candidates(*_OPERATORS.lm_head_select.default(*inputs))


# --- pairwise_loss ----------------------------------------------------------------------------------------------------

_define(
    "pairwise_loss(Tensor positive_scores, Tensor negative_scores, Tensor position) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("llm2_fast::pairwise_loss", lib=_LIBRARY)
def _empty_loss(
    positive_scores: torch.Tensor, negative_scores: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = positive_scores.new_empty(())
    return loss, positive_scores.new_empty(positive_scores.shape), negative_scores.new_empty(negative_scores.shape)


def _pairwise_loss_cpu(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return reference.pairwise_loss(*inputs), *reference.pairwise_loss_gradient(*inputs)


def _pairwise_loss_cuda(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with triton_needed():
        from llm2_fast.kernels.pairwise_loss import empty_partial, pairwise_loss
    outputs = _empty_loss(*inputs)
    pairwise_loss(*inputs, *outputs, empty_partial(len(inputs[1]), inputs[1].device))
    return outputs


def _save_gradients(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _pairwise_loss_backward(
    ctx: torch.autograd.function.FunctionCtx, loss_grad: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, None]:
    positive_grad, negative_grad = ctx.saved_tensors
    return loss_grad * positive_grad, loss_grad * negative_grad, None


_LIBRARY.impl("pairwise_loss", _pairwise_loss_cpu, "CPU")
_LIBRARY.impl("pairwise_loss", _pairwise_loss_cuda, "CUDA")
torch.library.register_autograd(
    "llm2_fast::pairwise_loss", _pairwise_loss_backward, setup_context=_save_gradients, lib=_LIBRARY
)


def pairwise_loss(positive_scores: torch.Tensor, negative_scores: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(s+ - s-) averaged over pairs, as `llm2_fast.reference.pairwise_loss`; differentiable once."""
    return _OPERATORS.pairwise_loss.default(positive_scores, negative_scores, position)[0]
