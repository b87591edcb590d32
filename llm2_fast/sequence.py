"""`Sequence`: one sample being generated. Knows tokens and options, not tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm2_fast.config import GenerationConfig


@dataclass(eq=False)
class Sequence:
    """One sample of one request.

    Attributes:
        request_id: Index of the prompt; part of the random counter.
        sample_index: Index among the prompt's `n` samples; part of the random counter.
        config: The options it is generated with.
        prompt_token_ids: The prompt.
        token_ids: What has been generated so far.
        eos_token_ids: Tokens that end it; empty with `ignore_eos`.
        slot: Where its backend keeps its keys and values; None while it waits.
    """

    request_id: int
    sample_index: int
    config: GenerationConfig
    prompt_token_ids: list[int]
    eos_token_ids: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    slot: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def tokens_from(self, position: int) -> list[int]:
        """Prompt and generated tokens from `position` on."""
        generated = max(0, position - len(self.prompt_token_ids))
        return self.prompt_token_ids[position:] + self.token_ids[generated:]
