"""`train_verifier`: the smallest training path, a head from ground-truth supervision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2_fast.config import GenerationConfig, check_number
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import FINAL_LAYER, LanguageModel
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import load_model
from llm2_fast.problems import Problem, load_problems
from llm2_fast.train.pairs import Pairs, collect_pairs
from llm2_fast.verifier import HeadVerifier, ScoreHead, Verifier

Problems = str | os.PathLike[str] | Iterable[Problem | Mapping[str, Any]]


@dataclass(frozen=True)
class PairwiseAccuracy:
    """Share of held-out pairs in which the ground truth comes before the negative.

    Attributes:
        num_pairs: Pairs measured.
        verifier: By the verifier's score alone.
        system1: By System 1's logit alone.
        combined: By the adjusted logit z + beta * s with the default beta.
    """

    num_pairs: int
    verifier: float
    system1: float
    combined: float


@dataclass(frozen=True)
class TrainingResult:
    """A trained verifier and what was measured on problems it has not seen.

    Attributes:
        verifier: Ready to use and to `save_pretrained`.
        num_pairs: Pairs trained on.
        heldout: On all held-out pairs.
        heldout_plausible: On those whose ground truth was plausible: the ones that decoding meets.
    """

    verifier: Verifier
    num_pairs: int
    heldout: PairwiseAccuracy
    heldout_plausible: PairwiseAccuracy


def train_verifier(
    model: str | os.PathLike[str] | PreTrainedModel,
    examples: Problems,
    kind: str = "head",
    *,
    heldout: Problems | float = 0.1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    alpha: float = 0.1,
    max_candidates: int = 8,
    plausible_only: bool = True,
    layers: tuple[int, ...] = (FINAL_LAYER,),
    mlp_size: int = 0,
    epochs: int = 5,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 256,
    max_length: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> TrainingResult:
    """Train a verifier for `model` on problems with reference solutions.

    Ground-truth supervision: at every position of a solution each plausible token other than the ground truth is a
    negative. The loss is -log sigmoid(s+ - s-), averaged over pairs (LLM2, equation 4). The LLM is frozen, so its
    hidden states are computed once.

    Args:
        model: As for `llm2_fast.load`.
        examples: Problems with `question` and `answer`: the path of a JSON-lines file, or mappings.
        kind: "head".
        heldout: Problems to measure on, or the share of `examples` (the last ones) to hold out; in (0, 1).
        tokenizer: Instead of the one beside the weights.
        alpha, max_candidates: Of the plausible set from which negatives come.
        plausible_only: Train on positions whose ground truth is plausible too. Elsewhere the verifier is never asked
            about the ground truth, and learns the style of the solutions rather than what is right.
        layers, mlp_size: Shape of the `ScoreHead`.
        epochs: Passes over the pairs.
        learning_rate: Peak of a cosine schedule with 10 % warm-up.
        weight_decay: Of AdamW.
        batch_size: Pairs per step.
        max_length: Tokens of prompt and solution; what is longer is cut.
        seed: Of initial weights and order of pairs.
        progress: Show progress bars.

    Returns:
        `TrainingResult`.

    Raises:
        ArgumentError: An argument is unusable, before training starts.
    """
    if kind != "head":
        raise ArgumentError("kind", "'head'", repr(kind))
    check_number("alpha", alpha, minimum=0, maximum=1, exclusive_minimum=True)
    positive = {"max_candidates": max_candidates, "epochs": epochs, "batch_size": batch_size, "max_length": max_length}
    for name, value in positive.items():
        check_number(name, value, integer=True, minimum=1)
    for name, value in {"mlp_size": mlp_size, "seed": seed}.items():
        check_number(name, value, integer=True, minimum=0)
    check_number("weight_decay", weight_decay, minimum=0)
    check_number("learning_rate", learning_rate, minimum=0, exclusive_minimum=True)
    train_problems, heldout_problems = _split(load_problems(examples), heldout)
    loaded = load_model(model, tokenizer=tokenizer)
    if loaded.tokenizer is None:
        raise ArgumentError("tokenizer", "a tokenizer, since the model came without one", None)

    lm = LanguageModel(loaded.model)
    lm.check_layers(layers)
    limits = [limit for limit in (max_length, lm.max_position_embeddings) if limit is not None]
    options = {"layers": layers, "alpha": alpha, "max_candidates": max_candidates, "progress": progress}
    train, test = (
        collect_pairs(lm, loaded.tokenizer, problems, max_length=min(limits), **options)
        for problems in (train_problems, heldout_problems)
    )
    used = train.where(train.plausible) if plausible_only else train
    if len(used) == 0:
        raise ArgumentError("examples", "a position whose ground truth and another token are plausible", "none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ScoreHead(loaded.model.config.get_text_config().hidden_size, layers, mlp_size)
        fit_head(head, used, epochs, learning_rate, weight_decay, batch_size)
    if not all(parameter.isfinite().all() for parameter in head.parameters()):
        raise ArgumentError("learning_rate", "a rate at which the loss stays finite", learning_rate)
    # A local path means nothing elsewhere, its last part may.
    base_name = Path(loaded.name).name if os.path.exists(loaded.name) else loaded.name
    verifier = HeadVerifier(head, base_name=base_name, base_fingerprint=fingerprint(loaded.model))
    every, plausible = (_accuracy(head, test, mask) for mask in (torch.ones_like(test.plausible), test.plausible))
    return TrainingResult(verifier, len(used), every, plausible)


def pairwise_loss(positive_scores: torch.Tensor, negative_scores: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(s+ - s-), averaged over pairs (LLM2, equation 4).

    Args:
        positive_scores, negative_scores: float32 [num_pairs].

    Returns:
        float32 scalar.
    """
    return -torch.nn.functional.logsigmoid(positive_scores - negative_scores).mean()


def fit_head(
    head: ScoreHead, pairs: Pairs, epochs: int, learning_rate: float, weight_decay: float, batch_size: int
) -> None:
    """Minimize `pairwise_loss` with AdamW and a cosine schedule; the order of pairs comes from torch's generator."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    num_steps = epochs * -(-len(pairs) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps + 1, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(pairs)).split(batch_size):
            loss = pairwise_loss(head([pairs.positives[pairs.position[batch]]]), head([pairs.negatives[batch]]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _split(problems: list[Problem], heldout: Problems | float) -> tuple[list[Problem], list[Problem]]:
    if isinstance(heldout, (bool, int)) or heldout is None:
        raise ArgumentError("heldout", "problems, or a share of the examples in (0, 1)", repr(heldout))
    if not isinstance(heldout, float):
        parts = problems, load_problems(heldout)
    else:
        check_number("heldout", heldout, minimum=0, maximum=1, exclusive_minimum=True)
        count = max(1, round(len(problems) * heldout))
        parts = problems[:-count], problems[-count:]
    for name, part in zip(("examples", "heldout"), parts, strict=True):
        if not part:
            raise ArgumentError(name, "at least one problem", "none")
    return parts


@torch.no_grad()
def _accuracy(head: ScoreHead, pairs: Pairs, mask: torch.Tensor) -> PairwiseAccuracy:

    pairs = pairs.where(mask)
    margin = head([pairs.positives])[pairs.position] - head([pairs.negatives])
    system1 = pairs.system1_margin

    def share(x: torch.Tensor) -> float:
        return float((x > 0).float().mean()) if len(x) else float("nan")

    return PairwiseAccuracy(
        len(margin), share(margin), share(system1), share(system1 + GenerationConfig().beta * margin)
    )
