"""Training of a language model on solutions: System 1, and the fine-tuned model that a verifier competes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from llm2_fast.problems import Problem
from llm2_fast.prompts import encode_prompt
from llm2_fast.supervision import tokenize_messages

_IGNORED = -100  # no loss here


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
    whole_text: bool = False,
) -> None:
    """Teach a model the reference solutions of problems, in place, and save it with its tokenizer.

    Args:
        model: In float32.
        tokenizer: With a chat template.
        problems: With solutions.
        output_dir: Gets model and tokenizer.
        epochs, learning_rate, batch_size, seed: Of AdamW with a cosine schedule and 5 % warm-up.
        whole_text: Learn the questions, too. A model that begins with random weights learns to look back sooner.
    """
    examples = [_encode(problem, tokenizer, whole_text) for problem in problems]
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
    rows = [{"input_ids": ids, "labels": labels, "length": len(ids)} for ids, labels in examples]
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=_pad).train()
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def _encode(problem: Problem, tokenizer: PreTrainedTokenizerBase, whole_text: bool) -> tuple[list[int], list[int]]:
    """Tokens, and labels for those that are learnt."""
    messages = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]
    prompt = encode_prompt(messages[:1], tokenizer, len(tokenizer), "question")
    token_ids = tokenize_messages(messages, tokenizer)
    return token_ids, token_ids if whole_text else [_IGNORED] * len(prompt) + token_ids[len(prompt) :]


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Behind the end nothing is learnt, and causal attention hides it from what stands before."""
    length = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    return {"input_ids": stack("input_ids", 0), "labels": stack("labels", _IGNORED)}
