"""Token pairs from measured qualities: which token is the positive, which are negatives, which of them are kept."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.supervision import TokenPair, TokenQuality

_LEAST_WEIGHT = 1e-12

Measured = dict[int, TokenQuality]  # token id -> quality, most probable first


@dataclass
class Pairs:
    """Columns of a `SupervisionExample`."""

    samples: list[TokenPair] = field(default_factory=list)
    quality: list[TokenQuality] = field(default_factory=list)
    spared: list[TokenPair] = field(default_factory=list)
    spared_quality: list[TokenQuality] = field(default_factory=list)

    def add(
        self, position: int, ground_truth_id: int, measured: Measured, config: ExplorationConfig, seed: str
    ) -> None:
        """Judge the tokens of one position.

        Args:
            position: Index of the position.
            ground_truth_id: The solution's own token.
            measured: What was measured, of that token too with `positive="best"`.
            config: Decides.
            seed: Of the draw among negatives, with the position.
        """
        positive = ground_truth_id
        if config.positive == "best":  # the first of the best, unless the solution's own is as good
            positive = max(measured, key=lambda token: (measured[token].quality, token == ground_truth_id))
        negatives = [
            token
            for token, quality in measured.items()
            if token != positive and (config.bypass or quality.is_below(config.threshold))
        ]
        kept = _draw(negatives, measured, config, random.Random(f"{seed}:{position}"))
        for token, quality in measured.items():
            pairs, qualities = (self.samples, self.quality) if token in kept else (self.spared, self.spared_quality)
            pairs.append(TokenPair(position, positive, token))
            qualities.append(quality)


def _draw(negatives: list[int], measured: Measured, config: ExplorationConfig, draw: random.Random) -> set[int]:
    """At most `negatives_per_position` of the negatives, without replacement, weighted by the strategy.

    The tokens with the largest u ** (1 / weight), u uniform in (0, 1): Efraimidis and Spirakis, "Weighted random
    sampling with a reservoir", 2006. In logarithms, so that small weights do not underflow.
    """
    if config.negatives_per_position is None:
        return set(negatives)
    keys = {token: math.log(1.0 - draw.random()) / _weight(measured[token], config.strategy) for token in negatives}
    return set(sorted(keys, key=keys.__getitem__, reverse=True)[: config.negatives_per_position])


def _weight(quality: TokenQuality, strategy: str) -> float:
    if strategy == "base":
        return max(math.exp(quality.logprob), _LEAST_WEIGHT)
    return max(1.0 - quality.quality, _LEAST_WEIGHT) if strategy == "quality" else 1.0
