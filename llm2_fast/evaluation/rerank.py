"""`Reranker`: a verifier's scores of whole solutions, to choose among plain samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from llm2_fast.engine import Engine
from llm2_fast.results import Generation, Sample
from llm2_fast.verifier.session import VerifierSession

_ROWS = 2048  # tokens scored in one pass, unless a single solution is longer


class Reranker:
    """Scores solutions with the verifier of an engine.

    Args:
        engine: With a verifier. Its model, not its backend, runs the passes of `head` and `lora` verifiers.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.verifier.base is None:
            engine.verifier.bind(engine.model)
        self._session = engine.verifier.session()

    def scores(self, generation: Generation) -> list[float | None]:
        """The sum of the scores of each sample's tokens, each token given those before it.

        None, so that it is never chosen, for a sample that ended with an error or is empty, of which the verifier does
        not know a token, or whose sum is not finite.
        """
        samples = [sample.token_ids for sample in generation.samples]
        usable = [i for i, sample in enumerate(generation.samples) if self._can_score(sample)]
        totals: list[float | None] = [None] * len(samples)
        if not usable:
            return totals
        with _prefix(self._session, generation.prompt_token_ids) as prefix:
            per_pass = max(1, _ROWS // max(len(samples[i]) for i in usable))
            for start in range(0, len(usable), per_pass):
                group = usable[start : start + per_pass]
                slots = [self._session.fork(prefix) for _ in group]
                try:
                    scored = self._session.score_tokens(slots, [samples[i] for i in group])
                finally:
                    for slot in slots:
                        self._session.free(slot)
                for index, scores in zip(group, scored, strict=True):
                    total = float(scores.double().sum())
                    totals[index] = total if math.isfinite(total) else None
        return totals

    def _can_score(self, sample: Sample) -> bool:
        """There are tokens, all of which the verifier knows, and no error cut them off."""
        known = all(token < self._session.vocab_size for token in sample.token_ids)
        return bool(sample.token_ids) and known and sample.error is None


@contextmanager
def _prefix(session: VerifierSession, token_ids: list[int]) -> Iterator[int]:
    """A slot whose sequence is computed, as long as the context lasts."""
    slot = session.add(token_ids)
    try:
        session.compute([slot])
        yield slot
    finally:
        session.free(slot)
