"""LLM2 on transformers as one would first write it: the baseline.

One sequence at a time, and a verifier pass at every step. Nothing is recomputed: both networks keep their keys and
values in a `DynamicCache` (which copies itself whenever it grows), and one pass takes the token chosen last and all
candidates, which a 4-D mask hides from each other. Greedy, without a bound on the candidates of a step; for models
whose layers all attend to the whole prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from llm2_fast.verifier import FullVerifier, HeadVerifier


class NaiveVerifier:
    """Scores the candidates of one sequence.

    A `full` verifier brings its own network. For `head` the network is the LLM's: it runs a second time.

    Args:
        network: A decoder without a language-model head.
        head: Maps hidden states [k, hidden_size] to scores [k, 1].
    """

    def __init__(self, network: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._network, self._head = network, head
        self._cache = DynamicCache()

    @classmethod
    def of(cls, model: PreTrainedModel, verifier: HeadVerifier | FullVerifier) -> NaiveVerifier:
        """A verifier of this package, for one sequence of `model`."""
        network = verifier.network if isinstance(verifier, FullVerifier) else model.base_model
        return cls(network, lambda hidden_states: verifier.head([hidden_states]).unsqueeze(-1))

    def score(self, token_ids: Sequence[int], candidate_ids: torch.Tensor) -> torch.Tensor:
        """Append `token_ids` to the sequence and score `candidate_ids` [k] as its next token; float32 [k]."""
        past, chain, count = self._cache.get_seq_length(), len(token_ids), len(candidate_ids)
        device = candidate_ids.device
        visible = torch.ones(chain + count, past + chain + count, device=device).tril(past)
        visible[chain:, past + chain :] = torch.eye(count, device=device)
        positions = torch.arange(past, past + chain + 1, device=device)
        positions = torch.cat([positions[:-1], positions[-1:].expand(count)])
        mask = torch.zeros_like(visible, dtype=self._network.dtype)
        mask.masked_fill_(visible == 0, torch.finfo(mask.dtype).min)
        hidden_states = self._network(
            input_ids=torch.cat([torch.tensor(token_ids, device=device), candidate_ids])[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._cache.crop(-count)
        return self._head(hidden_states[0, chain:].float()).squeeze(-1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    verifier: NaiveVerifier,
    prompt_token_ids: Sequence[int],
    *,
    max_new_tokens: int,
    alpha: float = 0.1,
    beta: float = 0.25,
    eos_token_ids: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Continue one prompt.

    Args:
        model: A causal language model.
        verifier: A fresh one.
        prompt_token_ids: At least one token.
        max_new_tokens, alpha, beta: As in `llm2_fast.GenerationConfig`.
        eos_token_ids: Tokens that end the sequence.

    Returns:
        The generated tokens, and the number of candidates of every step.
    """
    cache = DynamicCache()
    pending, token_ids, num_candidates = list(prompt_token_ids), [], []
    while len(token_ids) < max_new_tokens:
        output = model(
            torch.tensor([pending], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = output.logits[0, -1].float()
        candidate_ids = (logits >= logits.max() + math.log(alpha)).nonzero().flatten()
        adjusted = logits[candidate_ids] + beta * verifier.score(pending, candidate_ids)
        token = int(candidate_ids[adjusted.argmax()])
        token_ids.append(token)
        num_candidates.append(len(candidate_ids))
        pending = [token]
        if token in eos_token_ids:
            break
    return token_ids, num_candidates
