"""`step_outputs`: what a backend reports of a step, from the tensors of its ops."""

from __future__ import annotations

import numpy as np
import torch

from llm2_fast.reference import Candidates, Picked
from llm2_fast.results import StepOutput, TraceStep
from llm2_fast.sequence import Sequence

_BAD_LOGITS = "logits of the model: expected a finite maximum and no NaN"
_BAD_SCORES = "scores of the verifier: expected a finite adjusted maximum and no NaN"


def step_outputs(
    sequences: list[Sequence],
    candidates: Candidates,
    scores: torch.Tensor | np.ndarray | None,
    picked: Picked,
    verifier_rows: list[int],
) -> list[StepOutput]:
    """One output per sequence.

    Args:
        sequences: B of them.
        candidates: Of each; without a verifier the whole vocabulary. Tensors, or arrays of the same shapes.
        scores: float32 [B, K], None without a verifier.
        picked: Of each.
        verifier_rows: Token rows that the verifier computed for each.
    """
    verified = scores is not None
    columns = (candidates.count, candidates.cut, picked.index, picked.token, picked.logprob, picked.system1_index)
    values = zip(*(column.tolist() for column in columns), strict=True)
    outputs = []
    for row, (sequence, (count, cut, index, token, logprob, system1_index)) in enumerate(
        zip(sequences, values, strict=True)
    ):
        shared = {"num_candidates": count if verified else 0, "cut": cut, "verifier_rows": verifier_rows[row]}
        if index < 0:
            error = _BAD_LOGITS if count == 0 else _BAD_SCORES
            outputs.append(StepOutput(None, float("nan"), error=error, **shared))
            continue
        outputs.append(
            StepOutput(
                token,
                logprob,
                intervention=verified and index != system1_index,
                trace=_trace(row, candidates, scores, picked) if sequence.config.trace else None,
                **shared,
            )
        )
    return outputs


def _trace(row: int, candidates: Candidates, scores: torch.Tensor | np.ndarray | None, picked: Picked) -> TraceStep:
    index, system1_index = int(picked.index[row]), int(picked.system1_index[row])
    count = int(candidates.count[row])
    shown = slice(count) if scores is not None else slice(index, index + 1)
    return TraceStep(
        candidate_ids=tuple(candidates.ids[row, shown].tolist()),
        logprobs=tuple((candidates.logits[row, shown] - candidates.logsumexp[row]).tolist()),
        scores=tuple(scores[row, shown].tolist()) if scores is not None and count > 1 else None,
        adjusted_logits=tuple(picked.adjusted[row, shown].tolist()),
        system1_token_id=int(candidates.ids[row, system1_index]),
        token_id=int(picked.token[row]),
    )
