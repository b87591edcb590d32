"""The ops as `torch.ops.llm2_fast.*`, and typed functions to call them.

Every op has the arguments, in name and order, and the meaning of the function of the same name in
`llm2_fast.reference`. On CPU tensors the C++ extension `llm2_fast_C` computes it, in float32 or bfloat16. Where the
extension is not available, the reference does, and a `RuntimeWarning` says so once. On CUDA tensors a Triton kernel of
`llm2_fast.kernels` does, in float32, float16 or bfloat16, and raises `MissingDependencyError` without Triton. Values on
the GPU are not looked at before the launch: there indices are trusted.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch.utils.dlpack import to_dlpack

from llm2_fast import reference
from llm2_fast.errors import ArgumentError, MissingDependencyError
from llm2_fast.reference import Candidates, Picked

_LIBRARY = torch.library.Library("llm2_fast", "DEF")


@functools.cache
def _load_cpu_extension() -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason."""
    try:
        import llm2_fast_C
    except ModuleNotFoundError as error:
        if error.name != "llm2_fast_C":
            return None, f"the C++ extension llm2_fast_C failed to load ({error})"
        return None, "the C++ extension llm2_fast_C is not built (to build it: python setup.py build_ext --inplace)"
    except ImportError as error:
        return None, f"the C++ extension llm2_fast_C failed to load ({error})"
    return llm2_fast_C, None


def cpu_extension() -> ModuleType | None:
    """The extension module behind the CPU ops, or None if it is not available."""
    return _load_cpu_extension()[0]


def cpu_extension_problem() -> str | None:
    """Why the extension module is not available; None if it is."""
    return _load_cpu_extension()[1]


@functools.cache
def _warn_of_reference() -> None:
    message = f"llm2_fast: {cpu_extension_problem()}; CPU ops run on the slow torch reference"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def triton_needed() -> Iterator[None]:
    """Around imports from `llm2_fast.kernels`, which are left until CUDA tensors come: Triton may be missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingDependencyError("ops on CUDA tensors need Triton (to install it: pip install triton)") from error


def _capsule(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else to_dlpack(tensor)


def _rows(argument: str, tensor: torch.Tensor, ndim: int) -> int:
    if tensor.ndim != ndim:
        raise ArgumentError(argument, f"{ndim} dimensions", f"shape {list(tensor.shape)}")
    return tensor.shape[0]


# --- select_candidates ------------------------------------------------------------------------------------------------

_LIBRARY.define(
    "select_candidates(Tensor logits, Tensor log_alpha, Tensor candidate_top_k, SymInt max_candidates)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("llm2_fast::select_candidates", lib=_LIBRARY)
def _empty_candidates(
    logits: torch.Tensor, log_alpha: torch.Tensor, candidate_top_k: torch.Tensor, max_candidates: int
) -> Candidates:
    batch = _rows("logits", logits, 2)
    if max_candidates < 1:
        raise ArgumentError("max_candidates", ">= 1", max_candidates)
    return Candidates(
        ids=logits.new_empty((batch, max_candidates), dtype=torch.int32),
        logits=logits.new_empty((batch, max_candidates), dtype=torch.float32),
        count=logits.new_empty((batch,), dtype=torch.int32),
        logsumexp=logits.new_empty((batch,), dtype=torch.float32),
        cut=logits.new_empty((batch,), dtype=torch.bool),
    )


def _select_candidates_cpu(
    logits: torch.Tensor,
    log_alpha: torch.Tensor,
    candidate_top_k: torch.Tensor,
    max_candidates: int,
    isa: str | None = None,
) -> Candidates:
    extension = cpu_extension()
    if extension is None:
        _warn_of_reference()
        return reference.select_candidates(logits, log_alpha, candidate_top_k, max_candidates)
    outputs = _empty_candidates(logits, log_alpha, candidate_top_k, max_candidates)
    tensors = map(to_dlpack, (logits, log_alpha, candidate_top_k))
    extension.select_candidates(*tensors, max_candidates, *map(to_dlpack, outputs), isa)
    return outputs


def _select_candidates_cuda(
    logits: torch.Tensor, log_alpha: torch.Tensor, candidate_top_k: torch.Tensor, max_candidates: int
) -> Candidates:
    with triton_needed():
        from llm2_fast.kernels.select_candidates import empty_partials, select_candidates
    outputs = _empty_candidates(logits, log_alpha, candidate_top_k, max_candidates)
    partials = empty_partials(*logits.shape, max_candidates, logits.device)
    select_candidates(logits, log_alpha, candidate_top_k, max_candidates, outputs, partials)
    return outputs


_LIBRARY.impl("select_candidates", _select_candidates_cpu, "CPU")
_LIBRARY.impl("select_candidates", _select_candidates_cuda, "CUDA")


def select_candidates(
    logits: torch.Tensor, log_alpha: torch.Tensor, candidate_top_k: torch.Tensor, max_candidates: int
) -> Candidates:
    """The plausible set of each row, as `llm2_fast.reference.select_candidates` (LLM2, equation 1).

    Ids, order, counts and cut flags are those of the reference exactly; `logsumexp` within rounding.

    Args:
        logits: [B, V], on the CPU float32 or bfloat16; rows may have any stride, a row is contiguous.
        log_alpha: float32 [B], natural logarithm.
        candidate_top_k: int32 [B]; 0 for no limit.
        max_candidates: K >= 1; at most 1,024 on CUDA.

    Returns:
        `Candidates` with K = `max_candidates`.

    Raises:
        ValueError: An argument has the wrong shape, dtype, strides or range; the message names it.
    """
    fields = torch.ops.llm2_fast.select_candidates.default(logits, log_alpha, candidate_top_k, max_candidates)
    return Candidates(*fields)


# --- adjust_and_pick --------------------------------------------------------------------------------------------------

_LIBRARY.define(
    "adjust_and_pick(Tensor candidate_ids, Tensor candidate_logits, Tensor count, Tensor? scores, Tensor beta,"
    " Tensor? seen, Tensor repetition_penalty, Tensor temperature, Tensor top_k, Tensor top_p, Tensor log_min_p,"
    " Tensor seed, Tensor step, Tensor sample_index, Tensor request_id, Tensor eos_token_ids)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("llm2_fast::adjust_and_pick", lib=_LIBRARY)
def _empty_picked(candidate_ids: torch.Tensor, *_: torch.Tensor | None) -> Picked:
    batch = _rows("candidate_ids", candidate_ids, 2)
    return Picked(
        index=candidate_ids.new_empty((batch,)),
        token=candidate_ids.new_empty((batch,)),
        logprob=candidate_ids.new_empty((batch,), dtype=torch.float32),
        system1_index=candidate_ids.new_empty((batch,)),
        adjusted=candidate_ids.new_empty(candidate_ids.shape, dtype=torch.float32),
        finished=candidate_ids.new_empty((batch,), dtype=torch.bool),
    )


def _adjust_and_pick_cpu(*inputs: torch.Tensor | None, isa: str | None = None) -> Picked:
    extension = cpu_extension()
    if extension is None:
        _warn_of_reference()
        return reference.adjust_and_pick(*inputs)
    outputs = _empty_picked(*inputs)
    extension.adjust_and_pick(*map(_capsule, inputs), *map(to_dlpack, outputs), isa)
    return outputs


def _adjust_and_pick_cuda(*inputs: torch.Tensor | None) -> Picked:
    with triton_needed():
        from llm2_fast.kernels.adjust_and_pick import adjust_and_pick
    outputs = _empty_picked(*inputs)
    adjust_and_pick(*inputs, outputs)
    return outputs


_LIBRARY.impl("adjust_and_pick", _adjust_and_pick_cpu, "CPU")
_LIBRARY.impl("adjust_and_pick", _adjust_and_pick_cuda, "CUDA")


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
    """Adjusted logits, processors and the pick, as `llm2_fast.reference.adjust_and_pick` (LLM2, equation 3).

    Nothing is sorted unless `top_k` or `top_p` is set, and no noise is drawn for tokens that cannot win, so K may be
    the whole vocabulary.

    Args:
        candidate_ids: int32 [B, K], K >= 1.
        candidate_logits: float32 [B, K].
        count: int32 [B].
        scores: float32 [B, K] or None.
        beta: float32 [B].
        seen: bool [B, K] or None.
        repetition_penalty, temperature, top_p, log_min_p: float32 [B].
        top_k: int32 [B]; 0 for no limit.
        seed: int64 [B].
        step, sample_index, request_id: int32 [B].
        eos_token_ids: int32 [B, E], padded with -1.

    Returns:
        `Picked`.

    Raises:
        ValueError: An argument has the wrong shape, dtype or strides; the message names it.
    """
    return Picked(
        *torch.ops.llm2_fast.adjust_and_pick.default(
            candidate_ids,
            candidate_logits,
            count,
            scores,
            beta,
            seen,
            repetition_penalty,
            temperature,
            top_k,
            top_p,
            log_min_p,
            seed,
            step,
            sample_index,
            request_id,
            eos_token_ids,
        )
    )


# --- branch_attention -------------------------------------------------------------------------------------------------

_LIBRARY.define(
    "branch_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor row_sequence,"
    " Tensor row_prefix_length, Tensor row_has_own, Tensor own_key, Tensor own_value, float scale,"
    " SymInt sliding_window) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("llm2_fast::branch_attention", lib=_LIBRARY)
def _empty_attention(query: torch.Tensor, *_: torch.Tensor | float) -> torch.Tensor:
    return query.new_empty(query.shape)


def _branch_attention_cpu(*inputs: torch.Tensor | float, isa: str | None = None) -> torch.Tensor:
    extension = cpu_extension()
    if extension is None:
        _warn_of_reference()
        return reference.branch_attention(*inputs)
    output = _empty_attention(*inputs)
    *tensors, scale, sliding_window = inputs
    extension.branch_attention(*map(to_dlpack, tensors), scale, sliding_window, to_dlpack(output), isa)
    return output


def _branch_attention_cuda(*inputs: torch.Tensor | float) -> torch.Tensor:
    with triton_needed():
        from llm2_fast.kernels.branch_attention import Workspace, branch_attention, tile_rows
        from llm2_fast.kernels.row_tiles import plan_row_tiles
    query, key_cache, row_sequence = inputs[0], inputs[1], inputs[4]
    rows, num_heads, head_dim = query.shape
    output = _empty_attention(*inputs)
    first_row = row_sequence.new_empty(max(1, rows) + 1)
    plan_row_tiles(row_sequence, tile_rows(num_heads, key_cache.shape[1], head_dim, query.dtype), first_row)
    branch_attention(*inputs, output, first_row, Workspace.empty(rows, num_heads, head_dim, query.device))
    return output


_LIBRARY.impl("branch_attention", _branch_attention_cpu, "CPU")
_LIBRARY.impl("branch_attention", _branch_attention_cuda, "CUDA")


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
    """Attention of rows to a paged prefix and to themselves, as `llm2_fast.reference.branch_attention`.

    A row's result is bitwise the same whatever other rows are in the call. Consecutive rows of one sequence read its
    prefix together. Entries of `block_table` that hold no position a row sees are never read.

    Args:
        query: [R, num_heads, head_dim], on the CPU float32 or bfloat16; `num_heads` is a multiple of `num_kv_heads`.
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of `query`. Here and in all
            tensors of heads, any strides but for the last dimension, which is contiguous.
        block_table: int32 [S, max_blocks].
        row_sequence, row_prefix_length: int32 [R].
        row_has_own: bool [R].
        own_key, own_value: [R, num_kv_heads, head_dim], dtype of `query`.
        scale: Factor on the dot products.
        sliding_window: 0 for none.

    Returns:
        [R, num_heads, head_dim], dtype of `query`, contiguous.

    Raises:
        ValueError: An argument has the wrong shape, dtype, strides or range, or an index that is read is out of range;
            the message names it.
    """
    return torch.ops.llm2_fast.branch_attention.default(
        query,
        key_cache,
        value_cache,
        block_table,
        row_sequence,
        row_prefix_length,
        row_has_own,
        own_key,
        own_value,
        scale,
        sliding_window,
    )
