"""Training pairs from reference solutions: the ground-truth token against each plausible token that differs from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llm2_fast.cache.slots import SlotCache
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import FINAL_LAYER, LanguageModel, Rows
from llm2_fast.ops import select_candidates
from llm2_fast.problems import Problem
from llm2_fast.prompts import encode_prompt


@dataclass(frozen=True)
class Pairs:
    """Hidden states of ground-truth tokens and of the negatives they are compared with.

    Attributes:
        positives: [num_positions, features], each at the position of its ground-truth token.
        negatives: [num_pairs, features], each at its own position, in place of the ground-truth token.
        position: int64 [num_pairs], row of `positives` that each negative belongs to.
        plausible: bool [num_pairs], the ground-truth token was plausible too.
        system1_margin: float32 [num_pairs], logit of the ground truth minus logit of the negative.
    """

    positives: torch.Tensor
    negatives: torch.Tensor
    position: torch.Tensor
    plausible: torch.Tensor
    system1_margin: torch.Tensor

    def __len__(self) -> int:
        return len(self.negatives)

    def where(self, mask: torch.Tensor) -> Pairs:
        """The pairs for which `mask`, bool [num_pairs], is true."""
        kept = (column[mask] for column in (self.negatives, self.position, self.plausible, self.system1_margin))
        return Pairs(self.positives, *kept)


def tokenize_solution(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_length: int
) -> tuple[list[int], list[int]]:
    """Prompt tokens (chat template) and solution tokens with the end-of-sequence token, cut to `max_length`."""
    prompt = encode_prompt([{"role": "user", "content": problem.question}], tokenizer, vocab_size, "question")
    solution = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        solution = [*solution, tokenizer.eos_token_id]
    return prompt, solution[: max(0, max_length - len(prompt))]


def collect_pairs(
    lm: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    layers: tuple[int, ...] = (FINAL_LAYER,),
    alpha: float,
    max_candidates: int,
    max_length: int,
    progress: bool = False,
) -> Pairs:
    """Run every solution once, then all of its negatives in one pass over the cached solution.

    A negative is a plausible token (`select_candidates`) other than the ground truth; it sees the prompt and the
    solution before its position, and itself. Positions without a negative contribute nothing.

    Args:
        lm: The LLM.
        tokenizer: Its tokenizer.
        problems: With reference solutions.
        layers: Hidden states to collect, concatenated, as `ScoreHead` reads them.
        alpha, max_candidates: Of the plausible set.
        max_length: Tokens of prompt and solution; what is longer is cut.
        progress: Show a progress bar.

    Returns:
        `Pairs`, features in float32 on the CPU.
    """
    parts: list[Pairs] = []
    num_positions = 0
    for problem in tqdm(problems, desc="hidden states", disable=not progress, unit="problem"):
        prompt, solution = tokenize_solution(problem, tokenizer, lm.vocab_size, max_length)
        if solution and (pairs := _pairs_of_solution(lm, prompt, solution, layers, alpha, max_candidates)):
            offset = pairs.position + num_positions
            parts.append(Pairs(pairs.positives, pairs.negatives, offset, pairs.plausible, pairs.system1_margin))
            num_positions += len(pairs.positives)
    if not parts:
        raise ArgumentError("problems", "a position with a plausible token besides the ground truth", "none")
    columns = zip(*((p.positives, p.negatives, p.position, p.plausible, p.system1_margin) for p in parts), strict=True)
    return Pairs(*(torch.cat(column) for column in columns))


def _pairs_of_solution(
    lm: LanguageModel,
    prompt: list[int],
    solution: list[int],
    layers: tuple[int, ...],
    alpha: float,
    max_candidates: int,
) -> Pairs | None:
    cache = SlotCache()
    slot = cache.allocate()
    start = len(prompt)
    final, *read = (h[0] for h in lm.forward(cache, [Rows(slot, [*prompt, *solution])], (FINAL_LAYER, *layers)))
    logits = lm.logits(final[start - 1 : -1])
    truth = torch.tensor(solution, device=logits.device)
    options = {
        "log_alpha": torch.full((len(solution),), alpha, device=logits.device).log(),
        "candidate_top_k": torch.zeros(len(solution), dtype=torch.int32, device=logits.device),
    }
    candidates = select_candidates(logits, **options, max_candidates=max_candidates)
    inside = candidates.ids >= 0
    is_truth = candidates.ids == truth[:, None]
    index, column = (inside & ~is_truth).nonzero(as_tuple=True)
    if len(index) == 0:
        return None
    used, position = index.unique(return_inverse=True)
    branches = Rows(
        slot,
        branches=candidates.ids[index, column].tolist(),
        branch_positions=(index + start).tolist(),
    )
    negatives = torch.cat([h[0] for h in lm.forward(cache, [branches], layers)], dim=-1)
    positives = torch.cat(read, dim=-1)[start:][used]
    truth_logits = logits.gather(1, truth[:, None]).squeeze(1)
    return Pairs(
        positives.float().cpu(),
        negatives.float().cpu(),
        position.cpu(),
        is_truth.any(dim=1)[index].cpu(),
        (truth_logits[index] - candidates.logits[index, column]).cpu(),
    )
