"""Per-row options of the ops, gathered from sequences."""

from __future__ import annotations

import torch

from llm2_fast.sequence import Sequence


def candidate_options(sequences: list[Sequence]) -> dict[str, torch.Tensor | int]:
    """Keyword arguments of `select_candidates` besides the logits."""
    configs = [s.config for s in sequences]
    return {
        "log_alpha": torch.tensor([c.log_alpha for c in configs], dtype=torch.float32),
        "candidate_top_k": torch.tensor([c.candidate_top_k or 0 for c in configs], dtype=torch.int32),
        "max_candidates": max(c.max_candidates for c in configs),
    }


def pick_options(sequences: list[Sequence]) -> dict[str, torch.Tensor]:
    """Keyword arguments of `adjust_and_pick` besides candidates and scores."""
    configs = [s.config for s in sequences]

    def real(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    def integer(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    width = max((len(s.eos_token_ids) for s in sequences), default=0)
    eos_token_ids = [[*s.eos_token_ids, *[-1] * (width - len(s.eos_token_ids))] for s in sequences]
    return {
        "beta": real([c.beta for c in configs]),
        "repetition_penalty": real([c.repetition_penalty for c in configs]),
        "temperature": real([c.temperature for c in configs]),
        "top_k": integer([c.top_k or 0 for c in configs]),
        "top_p": real([c.top_p for c in configs]),
        "log_min_p": real([c.log_min_p for c in configs]),
        # 64 bits of key: seeds from 2**63 on are negative as int64.
        "seed": torch.tensor([c.seed - (c.seed >> 63 << 64) for c in configs], dtype=torch.int64),
        "step": integer([len(s.token_ids) for s in sequences]),
        "sample_index": integer([s.sample_index for s in sequences]),
        "request_id": integer([s.request_id for s in sequences]),
        "eos_token_ids": torch.tensor(eos_token_ids, dtype=torch.int32).reshape(len(sequences), width),
    }


def seen_tokens(sequences: list[Sequence], candidate_ids: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """bool [B, K]: which candidates occur in their sequence already; None if no sequence penalizes repetition."""
    occurs = occurring_tokens(sequences, vocab_size + 1)  # one more: where padding is looked up
    return (
        None if occurs is None else occurs.gather(1, torch.where(candidate_ids >= 0, candidate_ids, vocab_size).long())
    )


def occurring_tokens(sequences: list[Sequence], vocab_size: int) -> torch.Tensor | None:
    """bool [B, V]: which tokens occur in each sequence; None if no sequence penalizes repetition."""
    if all(s.config.repetition_penalty == 1.0 for s in sequences):
        return None
    occurs = torch.zeros(len(sequences), vocab_size, dtype=torch.bool)
    for row, sequence in zip(occurs, sequences, strict=True):
        row[torch.tensor(sequence.tokens_from(0))] = True
    return occurs
