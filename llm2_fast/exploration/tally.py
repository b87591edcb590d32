"""`Tally`: outcomes of a candidate's continuations, until more could not change the verdict."""

from __future__ import annotations

import functools

from llm2_fast.supervision import below_threshold


class Tally:
    """Counts outcomes in the order of their sample indices, whatever order they come in.

    So a verdict, and where counting stopped, do not depend on which continuation happened to finish first.

    Args:
        n: Continuations in all.
        thresholds: Stop as soon as it is known for each whether `right / n` will be below it, however the rest turns
            out. None: count all `n`, whose outcomes may then be any numbers.

    Attributes:
        done: Outcomes counted.
        total: Their sum.
    """

    def __init__(self, n: int, thresholds: tuple[float, ...] | None) -> None:
        self.n, self._thresholds = n, thresholds
        self.done = 0
        self.total = 0.0
        self._early: dict[int, float] = {}  # outcomes that wait for one with a lower index

    def add(self, index: int, outcome: float) -> None:
        """The outcome of continuation `index`: 1 right, 0 wrong if there are thresholds."""
        self._early[index] = outcome
        while self.done in self._early and not self.decided:
            self.total += self._early.pop(self.done)
            self.done += 1

    @property
    def decided(self) -> bool:
        """No further continuation matters."""
        return self.needed == 0

    @property
    def needed(self) -> int:
        """Further continuations without which there can be no verdict: so many may run at once, and none in vain."""
        if self._thresholds is None:
            return self.n - self.done
        return _needed(round(self.total), self.done, self.n, self._thresholds)


@functools.cache
def _needed(right: int, done: int, n: int, thresholds: tuple[float, ...]) -> int:
    """Fewest further outcomes, of any kind, after which every threshold is decided."""
    for more in range(n - done):
        ends = ((right + more_right, done + more) for more_right in range(more + 1))
        if any(all(below_threshold(*end, n, threshold) is not None for threshold in thresholds) for end in ends):
            return more
    return n - done
