"""`Schedule`: which samples of a call are decoded, which wait, and which make room for others."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from llm2_fast.backends.backend import Backend
from llm2_fast.errors import CacheFullError
from llm2_fast.request import Request, Sampling
from llm2_fast.results import StepOutput, StreamEvent
from llm2_fast.sequence import Sequence

_LOGGER = logging.getLogger(__name__)


class Schedule:
    """Decodes the samples of requests, first come, first served, as many together as there are places and room for.

    Samples are ordered by request and sample index. Live ones always come before waiting ones: the first that waits is
    the next to be admitted, and the last that lives is the first to be preempted. A preempted sample keeps its tokens;
    when it is admitted again, its keys and values are computed from them, and it goes on as if nothing had happened.

    A step may begin before the tokens of the one before it are recorded, so that a device does not wait for the host.
    What it then computes for a sample that has ended meanwhile is dropped.

    So every sample ends: `Backend.check_fits` has found that each fits alone, the first live one is preempted for other
    calls only, and every turn adds a token to it.

    Args:
        backend: Runs the models. Calls that share it take turns.
        requests: The prompts.
        max_batch_size: Samples decoded together.
        may_pause: The caller may do anything between two turns.
    """

    def __init__(
        self, backend: Backend, requests: list[Request], max_batch_size: int, *, may_pause: bool = False
    ) -> None:
        self.may_pause = may_pause
        self._backend, self._requests, self._places = backend, requests, max_batch_size
        self._live: list[Sampling] = []
        self._waiting = deque(sampling for request in requests for sampling in request.samples)
        self._begun: tuple[list[Sampling], Callable[[], list[StepOutput]]] | None = None  # a step not recorded yet

    @property
    def finished(self) -> bool:
        """Every sample has its last token."""
        return not (self._live or self._waiting)

    @property
    def holds_slots(self) -> bool:
        """Something could make room."""
        return any(sequence.slot is not None for request in self._requests for sequence in request.sequences)

    def take_turn(self) -> list[StreamEvent]:
        """Admit, step, record, free.

        Returns:
            An event per sample that was stepped; none if memory ran out, in which case fewer samples are decoded from
            now on.

        Raises:
            CacheFullError: Not even one sample has room beside what other calls hold. The turn can be taken again.
            MemoryError: Not even one sample can be computed.
        """
        try:
            if self._begun is None:
                self._admit()
            stepped, outputs = self._step()
        except CacheFullError:
            raise
        except MemoryError:
            if self._places == 1:
                raise
            self._retreat()
            return []
        steps = zip(stepped, outputs, strict=True)
        events = [sampling.record(output) for sampling, output in steps if sampling in self._live]
        for sampling in self._live:
            if sampling.finished:
                self._close(sampling)
        self._live = [sampling for sampling in self._live if not sampling.finished]
        return events

    def make_room(self, *, keep: int) -> bool:
        """Free a prompt that no live sample shares, else preempt the last live sample unless only `keep` are left.

        Returns:
            False if there was nothing to free.
        """
        in_use = {sampling.request for sampling in self._live}
        if keep and not self._live:
            in_use.add(self._waiting[0].request)
        for request in self._requests:
            if request.prefix is not None and request.prefix.slot is not None and request not in in_use:
                self._backend.free(request.prefix)
                return True
        if len(self._live) <= keep:
            return False
        self._preempt()
        return True

    def release(self) -> None:
        """Preempt all samples and give back every slot."""
        self._begun = None
        while self._live:
            self._preempt()
        for request in self._requests:
            for sequence in request.sequences:
                self._backend.free(sequence)

    def _admit(self) -> None:
        """Give waiting samples slots, in order, and compute what these lack."""
        new: list[Sampling] = []
        while self._waiting and len(self._live) < self._places:
            try:
                self._open(self._waiting[0])
            except CacheFullError:
                if self._live:
                    break
                if not self.make_room(keep=1):
                    raise
                continue
            new.append(self._waiting.popleft())
            self._live.append(new[-1])
        self._prefill([sampling.sequence for sampling in new], {sampling.request for sampling in new})

    def _open(self, sampling: Sampling) -> None:
        """Give a sample a slot with room for its tokens; what it shares with others of its request is computed once."""
        request, sequence = sampling.request, sampling.sequence
        if request.prefix is not None:
            if request.prefix.slot is None:
                self._backend.reserve(request.prefix)
                self._prefill([request.prefix], {request})
            self._backend.fork(request.prefix, sequence)
        try:
            self._backend.reserve(sequence)
        except CacheFullError:
            self._backend.free(sequence)
            raise

    def _close(self, sampling: Sampling) -> None:
        """Give back what a finished sample holds, the last of its request also what it shared."""
        self._backend.free(sampling.sequence)
        if sampling.request.prefix is not None and sampling.request.finished:
            self._backend.free(sampling.request.prefix)

    def _prefill(self, sequences: list[Sequence], requests: set[Request]) -> None:
        if not sequences:
            return
        start = time.perf_counter()
        self._backend.prefill(sequences)
        seconds = time.perf_counter() - start
        for request in requests:
            request.prefilled(seconds)

    def _step(self) -> tuple[list[Sampling], list[StepOutput]]:
        """One token for every sample of a step, and the step after it has begun if it can."""
        stepped, outputs = self._begun or self._begin()
        self._begun = None
        if self._may_run_ahead(stepped):
            with suppress(CacheFullError):  # somebody has to end first
                self._begun = stepped, self._backend.begin_step([sampling.sequence for sampling in stepped])
        return stepped, outputs()

    def _begin(self) -> tuple[list[Sampling], Callable[[], list[StepOutput]]]:
        """A step for every live sample, after the last ones have made room for the others."""
        while True:
            live = list(self._live)
            try:
                return live, self._backend.begin_step([sampling.sequence for sampling in live])
            except CacheFullError:
                if not self.make_room(keep=1):
                    raise

    def _may_run_ahead(self, stepped: list[Sampling]) -> bool:
        """The same samples go on after this step, as far as one can know, and nobody waits for a place that is free."""
        return (
            stepped == self._live
            and not (self._waiting and len(self._live) < self._places)
            and not any(sampling.is_last_step for sampling in stepped)
            and self._backend.can_run_ahead([sampling.sequence for sampling in stepped])
        )

    def _preempt(self) -> None:
        """Put the last live sample at the front of the queue."""
        sampling = self._live[-1]
        self._backend.free(sampling.sequence)
        self._waiting.appendleft(self._live.pop())
        sampling.request.stats.preemptions += 1

    def _retreat(self) -> None:
        """Start again with half as many samples: what the interrupted computation left in the caches is unknown."""
        self._places = max(1, len(self._live) // 2)
        _LOGGER.warning("out of memory: going on with at most %d sequences at once", self._places)
        self.release()
