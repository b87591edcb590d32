"""Evaluation: what System 2 adds to a model's answers, against the baselines that a gain has to beat."""
