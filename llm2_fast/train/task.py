"""`Task`: what a verifier is trained on, checked and tokenized, and `Trained`: what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any

import torch

from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import LanguageModel
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import LoadedModel, tokenizer_hash
from llm2_fast.prompts import chat_template_hash
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Solution, System1View
from llm2_fast.verifier import Verifier


@dataclass(frozen=True)
class Task:
    """Everything that decides how a verifier comes out.

    Attributes:
        kind: Of verifier.
        config: Complete: nothing is left to a default.
        base: The LLM, with its tokenizer.
        lm: The same, ready to run.
        base_name: What the verifier records as its base.
        train, heldout: Solutions, at least one each.
        init: The network that a `full` verifier starts from; None for the LLM's own.
        progress: Show progress bars.
    """

    kind: str
    config: TrainingConfig
    base: LoadedModel
    lm: LanguageModel
    base_name: str
    train: list[Solution]
    heldout: list[Solution]
    init: LoadedModel | None
    progress: bool

    def describe(self) -> dict[str, Any]:
        """What tells this task from others, as JSON: options, models and data."""
        return {
            "kind": self.kind,
            "config": dataclasses.asdict(self.config),
            "base_model": self.base_name,
            "base_fingerprint": fingerprint(self.base.model),
            "tokenizer_hash": tokenizer_hash(self.base.tokenizer),
            "chat_template_hash": chat_template_hash(self.base.tokenizer),
            "init_fingerprint": self.init and fingerprint(self.init.model),
            "train_hash": _digest(self.train),
            "heldout_hash": _digest(self.heldout),
        }


@dataclass(frozen=True)
class Trained:
    """A verifier, and its scores of held-out pairs.

    Attributes:
        verifier: Ready to use.
        num_pairs: Trained on.
        margin: float32 [num_heldout], score of the positive minus score of the negative.
        system1: Of the held-out pairs.
        log: Loss, learning rate and so on by step, as Trainer logs them; empty for a head.
        attention: How packed passes attended, and why; None for a head, which has none.
    """

    verifier: Verifier
    num_pairs: int
    margin: torch.Tensor
    system1: System1View
    log: list[dict[str, float]] = field(default_factory=list)
    attention: str | None = None


def require_pairs(train: Sized | None, heldout: Sized | None) -> None:
    """Raise `ArgumentError` unless there are pairs to train and to measure on."""
    if not train:
        raise ArgumentError("supervision", "a pair to train on, its positive plausible with plausible_only", "none")
    if not heldout:
        raise ArgumentError("heldout", "a pair to measure on", "none")


def _digest(solutions: list[Solution]) -> str:
    """Hash of tokens and pairs, 32 hexadecimal digits."""
    content = json.dumps([[solution.input_ids, solution.start, solution.pairs] for solution in solutions])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
