"""`Schedule`: which samples of a call are decoded, which wait, and which make room for others."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress

from llm2_fast.backends.backend import Backend
from llm2_fast.errors import CacheFullError
from llm2_fast.prefixes import Prefixes
from llm2_fast.request import Request, Sampling
from llm2_fast.results import StepOutput, StreamEvent

_LOGGER = logging.getLogger(__name__)


class Schedule:
    """Decodes the samples of requests, first come, first served, as many together as there are places and room for.

    Samples are ordered by request and sample index. Live ones always come before waiting ones: the first that waits is
    the next to be admitted, and the last that lives is the first to be preempted. A preempted sample keeps its tokens;
    when it is admitted again, its keys and values are computed from them, and it goes on as if nothing had happened.

    What prompts begin with in common is computed once, see `Prefixes`.

    A step may begin before the tokens of the one before it are recorded, so that a device does not wait for the host.
    What it then computes for a sample that has ended meanwhile is dropped.

    So every sample ends: `Backend.check_fits` has found that each fits alone, the first live one is preempted for other
    calls only, and every turn adds a token to it.

    Args:
        backend: Runs the models. Calls that share it take turns.
        requests: The prompts.
        max_batch_size: Samples decoded together.
        others: Schedules over the same backend, which come and go. What they keep goes before anybody here waits.
        may_pause: The caller may do anything between two turns.
    """

    def __init__(
        self,
        backend: Backend,
        requests: list[Request],
        max_batch_size: int,
        *,
        others: Collection[Schedule] = (),
        may_pause: bool = False,
    ) -> None:
        self.may_pause = may_pause
        self._backend, self._requests, self._others, self._places = backend, requests, others, max_batch_size
        self._live: list[Sampling] = []
        self._waiting = deque(sampling for request in requests for sampling in request.samples)
        self._prefixes = Prefixes(backend, max_kept=max_batch_size)
        for sampling in self._waiting:
            self._prefixes.wait(sampling)
        self._begun: tuple[list[Sampling], Callable[[], list[StepOutput]]] | None = None  # a step not recorded yet

    @property
    def finished(self) -> bool:
        """Every sample has its last token."""
        return not (self._live or self._waiting)

    @property
    def holds_slots(self) -> bool:
        """Something could make room, beside what is kept."""
        return bool(self._live)

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
            if self._places == 1 and not self._prefixes.max_kept:  # else what is kept may be too much
                raise
            self._retreat(len(self._live) // 2)
            return []
        steps = zip(stepped, outputs, strict=True)
        events = [sampling.record(output) for sampling, output in steps if sampling in self._live]
        self._close()
        return events

    def make_room(self, *, keep: int) -> bool:
        """Free a prompt that is kept, else preempt the last live sample unless only `keep` are left.

        Returns:
            False if there was nothing to free.
        """
        if self._free_kept():
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
        self._prefixes.clear()
        for request in self._requests:
            for sampling in request.samples:
                self._backend.free(sampling.sequence)

    def _admit(self) -> None:
        """Give waiting samples slots, in order, and compute what these lack."""
        num_live = len(self._live)
        opened: list[Sampling] = []  # that have not been computed yet
        while self._waiting and len(self._live) < self._places:
            sampling = self._waiting[0]
            if self._prefixes.is_coming(sampling.request):
                self._prefill(opened)
                opened = []
            try:
                self._prefixes.open(sampling)
            except CacheFullError:
                if self._free_kept(needed_by=sampling.request):
                    continue
                if self._live:
                    break
                raise
            opened.append(self._waiting.popleft())
            self._live.append(sampling)
        self._prefill(opened)
        if len(self._live) > num_live:
            self._prefixes.refresh(self._waiting[0].request if self._waiting else None)

    def _prefill(self, opened: list[Sampling]) -> None:
        """Compute what newly admitted samples lack."""
        if not opened:
            return
        start = time.perf_counter()
        self._backend.prefill([sampling.sequence for sampling in opened])
        seconds = time.perf_counter() - start
        for request in {sampling.request for sampling in opened}:
            request.prefilled(seconds)
        for sampling in opened:
            self._prefixes.computed(sampling)

    def _close(self) -> None:
        """Give back what finished samples hold."""
        finished = [sampling for sampling in self._live if sampling.finished]
        self._live = [sampling for sampling in self._live if not sampling.finished]
        try:
            for sampling in finished:
                self._prefixes.close(sampling)
        except MemoryError:  # while a prompt was to be kept
            self._retreat(self._places)

    def _free_kept(self, needed_by: Request | None = None) -> bool:
        """Free a prompt that is kept, see `Prefixes.make_room`, here or by others. Returns False if there is none."""
        return self._prefixes.make_room(needed_by) or any(other._prefixes.make_room() for other in self._others)

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
            self._backend.can_run_ahead([sampling.sequence for sampling in stepped])
            and stepped == self._live
            and not (self._waiting and len(self._live) < self._places)
            and not any(sampling.is_last_step for sampling in stepped)
        )

    def _preempt(self) -> None:
        """Put the last live sample at the front of the queue."""
        sampling = self._live.pop()
        self._backend.free(sampling.sequence)
        self._waiting.appendleft(sampling)
        self._prefixes.wait(sampling)
        sampling.request.stats.preemptions += 1

    def _retreat(self, places: int) -> None:
        """Start again, keeping nothing: what the interrupted computation left in the caches is unknown."""
        self._places, self._prefixes.max_kept = max(1, places), 0
        _LOGGER.warning("out of memory: going on with at most %d sequences at once", self._places)
        self.release()
