"""Training of verifiers with the pairwise loss."""

from llm2_fast.train.trainer import TrainingResult, train_verifier

__all__ = ["TrainingResult", "train_verifier"]
