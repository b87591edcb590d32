"""Packed passes: all pairs of a solution ride in one forward pass of a classifier (LLM2, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from llm2_fast.errors import ArgumentError
from llm2_fast.kernel_ops import pairwise_loss
from llm2_fast.train.attention import packed_masks
from llm2_fast.train.examples import Example

NO_PAIR = -100  # the label that transformers' Trainer does not count


def pack(examples: Sequence[Example | None]) -> dict[str, torch.Tensor]:
    """A batch of examples, one per line: the chain, the branches behind it, padding.

    Args:
        examples: At least one; None stands for one without pairs.

    Returns:
        int64 [B, Q] each, `input_ids`, `position_ids` and `labels`: for rows of negatives the row of the positive they
        are compared with, for all others `NO_PAIR`.
    """
    width = max((len(e.input_ids) + len(e.branch_ids) for e in examples if e is not None), default=1)
    batch = {name: torch.zeros(len(examples), width, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch["labels"] = torch.full((len(examples), width), NO_PAIR)
    for line, example in enumerate(examples):
        if example is not None:
            length, branch_ids = len(example.input_ids), example.branch_ids
            chain, branches = slice(0, length), slice(length, length + len(branch_ids))
            batch["input_ids"][line, chain] = torch.tensor(example.input_ids)
            batch["input_ids"][line, branches] = branch_ids
            batch["position_ids"][line, chain] = torch.arange(length)
            batch["position_ids"][line, branches] = example.branch_positions
            batch["labels"][line, example.negative_rows] = example.positive_rows[example.positive]
    return batch


def packed_loss(
    output: SequenceClassifierOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Pairwise loss of a packed batch.

    Args:
        output: Its `logits` are the scores, float32 [B, Q].
        labels: As `pack` makes them.
        num_items_in_batch: Pairs to average over, those of the whole optimizer step; by default the pairs of `labels`.

    Returns:
        float32 scalar.
    """
    scores = output.logits
    is_negative = labels != NO_PAIR
    line = is_negative.nonzero()[:, 0]
    loss = pairwise_loss(scores.flatten(), scores[is_negative], line * scores.shape[1] + labels[is_negative])
    return loss if num_items_in_batch is None else loss * (len(line) / num_items_in_batch)


class _ScoresOfRows:
    """Mixin for a sequence classifier: the scores of all rows of a packed batch, not only of each line's last token."""

    accepts_loss_kwargs = False  # read by Trainer

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **unused: Any) -> SequenceClassifierOutput:
        """Scores, float32 [B, Q], as `logits`. PEFT passes further arguments, all of them None."""
        hidden_states = self.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=packed_masks(self.config.get_text_config(), position_ids, self.dtype),
            use_cache=False,
        ).last_hidden_state
        # In float32 as in decoding, also where bfloat16 autocast surrounds it.
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = self.score(hidden_states.to(next(self.score.parameters()).dtype))
        return SequenceClassifierOutput(logits=scores.squeeze(-1).clone())  # FSDP warns of views


def score_rows(classifier: PreTrainedModel) -> None:
    """Make a sequence classifier score all rows of packed batches; it stays of its class in all that it saves.

    Raises:
        ArgumentError: Its head is not a `score`.
    """
    cls = type(classifier)
    if not hasattr(classifier, "score"):
        raise ArgumentError("model", "an architecture whose sequence classifier has a `score`", cls.__name__)
    classifier.__class__ = type(cls.__name__, (_ScoresOfRows, cls), {"__module__": cls.__module__})
