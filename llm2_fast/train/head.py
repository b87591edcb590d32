"""Training of a `head`: the LLM is frozen, so its hidden states are computed once and the head fits in seconds."""

from __future__ import annotations

import torch

from llm2_fast.errors import ArgumentError
from llm2_fast.kernel_ops import pairwise_loss
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.pairs import Pairs, collect_pairs
from llm2_fast.train.task import Task, Trained, require_pairs
from llm2_fast.verifier import HeadVerifier, ScoreHead


def train_head(task: Task) -> Trained:
    """Train a `HeadVerifier`. Initial weights and order of pairs come from the seed.

    Raises:
        ArgumentError: There is nothing to train or to measure on, or the weights did not stay finite.
    """
    config = task.config
    train, heldout = (
        collect_pairs(task.lm, solutions, config, progress=task.progress) for solutions in (task.train, task.heldout)
    )
    if train is not None and config.plausible_only:
        train = train.where(train.system1.plausible)
    require_pairs(train, heldout)
    torch.manual_seed(config.seed)
    head = ScoreHead(task.lm.model.config.get_text_config().hidden_size, config.layers, config.mlp_size)
    _fit(head, train, config)
    if not all(parameter.isfinite().all() for parameter in head.parameters()):
        raise ArgumentError("learning_rate", "a rate at which the loss stays finite", config.learning_rate)
    verifier = HeadVerifier(head, base_name=task.base_name, base_fingerprint=fingerprint(task.base.model))
    with torch.no_grad():
        margin = head([heldout.positives])[heldout.positive] - head([heldout.negatives])
    return Trained(verifier, len(train), margin, heldout.system1)


def _fit(head: ScoreHead, pairs: Pairs, config: TrainingConfig) -> None:
    """AdamW with a cosine schedule; the order of pairs comes from torch's generator."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    num_steps = config.epochs * -(-len(pairs) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=num_steps + 1, pct_start=0.1
    )
    for _ in range(config.epochs):
        for batch in torch.randperm(len(pairs)).split(config.batch_size):
            positives, positive = pairs.positive[batch].unique(return_inverse=True)
            loss = pairwise_loss(head([pairs.positives[positives]]), head([pairs.negatives[batch]]), positive)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
