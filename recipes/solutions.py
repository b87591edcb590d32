"""Training of a language model on solutions: System 1, and the fine-tuned model that a verifier competes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from llm2_fast.problems import Problem
from llm2_fast.prompts import encode_prompt
from llm2_fast.supervision import tokenize_messages


def train_on_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    output_dir: Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    seed: int,
    question_weight: float = 0.0,
) -> None:
    """Teach a model the reference solutions of problems, in place, and save it with its tokenizer.

    Args:
        model: In float32.
        tokenizer: With a chat template.
        problems: With solutions.
        output_dir: Gets model and tokenizer.
        epochs, learning_rate, batch_size, seed: Of AdamW with a cosine schedule and 5 % warm-up.
        question_weight: What a question's token counts in the loss, where a solution's counts 1. A model that begins
            with random weights learns to look back sooner if it learns the questions, too.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        disable_tqdm=True,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [_encode(problem, tokenizer, question_weight) for problem in problems]
    _WeightedTrainer(model=model, args=arguments, train_dataset=rows, data_collator=_pad).train()
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


class _WeightedTrainer(Trainer):
    """The loss of a batch is the mean over its tokens, each with its weight."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        outputs = model(inputs["input_ids"], use_cache=False)
        targets, weights = inputs["input_ids"][:, 1:].flatten(), inputs["weights"][:, 1:].flatten()
        losses = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets, reduction="none")
        loss = losses @ weights / weights.sum()
        return (loss, outputs) if return_outputs else loss


def _encode(problem: Problem, tokenizer: PreTrainedTokenizerBase, question_weight: float) -> dict[str, Any]:
    """Tokens and what each counts."""
    messages = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]
    num_question = len(encode_prompt(messages[:1], tokenizer, len(tokenizer), "question"))
    token_ids = tokenize_messages(messages, tokenizer)
    weights = [question_weight] * num_question + [1.0] * (len(token_ids) - num_question)
    return {"input_ids": token_ids, "weights": weights, "length": len(token_ids)}


def _pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Behind the end nothing is learnt, and causal attention hides it from what stands before."""
    length = max(len(row["input_ids"]) for row in rows)

    def stack(name: str) -> torch.Tensor:
        return torch.tensor([row[name] + [0] * (length - len(row[name])) for row in rows])

    return {"input_ids": stack("input_ids"), "weights": stack("weights").float()}
