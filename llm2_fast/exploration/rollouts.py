"""`RolloutPool`: continuations of many branches, decoded together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

from llm2_fast.backends.backend import Backend
from llm2_fast.config import GenerationConfig
from llm2_fast.errors import CacheFullError
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.exploration.tally import Tally
from llm2_fast.sequence import Sequence

_REQUEST_IDS = 2**31

Result = TypeVar("Result")
T = TypeVar("T")
Task = Generator[list["Branch"], None, Result]


@dataclass(eq=False)
class Branch:
    """A prefix whose continuations are sampled until their tally is decided.

    The random numbers of a continuation are named by the seed, the position and id of the prefix's last token, and the
    index of the sample, so it does not depend on what is decoded beside it.

    Attributes:
        parent: A prefilled sequence with which the prefix has all but its last token in common.
        token_ids: The prefix.
        config: Sampling options; one seed per problem.
        tally: Of the outcomes.
        judge: The outcome of a continuation, from its tokens and whether it came to its end.
        ended: The last token ends the text, so there is nothing to sample.
        continuations: Generated tokens by sample index.
        error: Why a continuation could not be sampled.
    """

    parent: Sequence
    token_ids: list[int]
    config: GenerationConfig
    tally: Tally
    judge: Callable[[list[int], bool], float]
    ended: bool = False
    continuations: dict[int, list[int]] = field(default_factory=dict)
    error: str | None = None
    launched: int = 0

    @property
    def decided(self) -> bool:
        """No further continuation is needed."""
        return self.tally.decided or self.error is not None

    @property
    def wanted(self) -> int:
        """Continuations to launch now, none of which can turn out to be in vain."""
        return 0 if self.decided else self.tally.done + self.tally.needed - self.launched

    def finish(self, index: int, generated: list[int], complete: bool) -> None:
        """Continuation `index` has come to its end, or to its limit."""
        self.continuations[index] = generated
        self.tally.add(index, self.judge(generated, complete))


@dataclass(eq=False)
class _Rollout:
    """One continuation under way.

    Attributes:
        branch: What it continues.
        sequence: Its tokens; it has a slot while it runs.
        limit: Tokens that it may have.
    """

    branch: Branch
    sequence: Sequence
    limit: int


@dataclass(eq=False)
class _Open(Generic[Result]):
    """A task under way and the branches it waits for."""

    start: Callable[[], Task[Result]]
    task: Task[Result]
    branches: list[Branch] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return all(branch.decided for branch in self.branches)


class RolloutPool:
    """Runs tasks that need continuations. As soon as one place is free, the next continuation takes it.

    A task is a generator: it yields branches, is resumed when all of them are decided, and returns its result. Tasks
    are started in order, when those before leave places free.

    Where the backend's cache is bounded and full, the continuations that were launched last are preempted: they give up
    their slots and keep their tokens. A task that finds no room begins anew when others have ended.

    Args:
        backend: Without a verifier.
        max_batch_size: Continuations decoded together.
        vocab_size: Bound on token ids.
        eos_token_ids: Tokens that end a continuation.
        max_length: Bound on prefix and continuation together; None for no bound.
        report: Counts rollouts and tokens.
    """

    def __init__(
        self,
        backend: Backend,
        max_batch_size: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_length: int | None,
        report: ExplorationReport,
    ) -> None:
        self._backend, self._vocab_size, self._max_batch_size = backend, vocab_size, max_batch_size
        self._max_length, self._eos_token_ids, self._report = max_length, eos_token_ids, report
        self._waiting: Iterator[Callable[[], Task[Any]]] = iter(())
        self._open: list[_Open[Any]] = []
        self._live: list[_Rollout] = []
        self._preempted: list[_Rollout] = []

    def run(self, tasks: Iterable[Callable[[], Task[Result]]]) -> Iterator[Result]:
        """Run the tasks that these functions make.

        Yields:
            Their results, as they come.

        Raises:
            CacheFullError: There is not even room for one continuation.
        """
        self._waiting = iter(tasks)
        try:
            while True:
                yield from self._fill()
                if not self._live:
                    return
                while not self._step():
                    pass
        finally:
            for rollout in self._live:
                self._backend.free(rollout.sequence)
            for entry in self._open:
                entry.task.close()
            self._open, self._live, self._preempted = [], [], []

    def _fill(self) -> Iterator[Any]:
        """Take as many places as there are, as there is work, or as the cache allows, which is at least one."""
        while True:
            try:
                yield from self._take_places()
                return
            except CacheFullError:
                if self._live:
                    return
                if len(self._open) == 1:
                    raise
                self._postpone(self._open[-1])

    def _take_places(self) -> Iterator[Any]:
        """Take up what was preempted, resume tasks whose branches are decided, launch what they want, open more."""
        while self._preempted:
            if not self._preempted[-1].branch.decided:  # it is after an error beside it
                self._resume(self._preempted[-1])
                self._live.append(self._preempted[-1])
            self._preempted.pop()
        for entry in list(self._open):
            if entry in self._open:  # it may have been postponed since
                yield from self._advance(entry)
        while len(self._live) < self._max_batch_size and (start := next(self._waiting, None)) is not None:
            self._open.append(_Open(start, start()))
            yield from self._advance(self._open[-1])

    def _postpone(self, entry: _Open[Any]) -> None:
        """Begin a task anew, later."""
        entry.task.close()
        self._open.remove(entry)
        self._preempted = [rollout for rollout in self._preempted if rollout.branch not in entry.branches]
        self._waiting = chain([entry.start], self._waiting)

    def _advance(self, entry: _Open[Any]) -> Iterator[Any]:
        while True:
            self._launch(entry)
            if not entry.ready:
                return
            try:
                entry.branches = next(entry.task)
            except StopIteration as end:
                self._open.remove(entry)
                yield end.value
                return
            except CacheFullError:
                entry.task, entry.branches = entry.start(), []
                raise

    def _launch(self, entry: _Open[Any]) -> None:
        for branch in entry.branches:
            limit = self._limit(branch)
            while branch.wanted > 0 and limit == 0:
                branch.launched += 1
                self._finish(branch, branch.launched - 1, [], complete=branch.ended)
            for _ in range(min(branch.wanted, self._max_batch_size - len(self._live))):
                self._live.append(self._rollout(branch, limit))

    def _limit(self, branch: Branch) -> int:
        """Tokens that a continuation may have."""
        if branch.ended:
            return 0
        limit = branch.config.max_new_tokens
        return limit if self._max_length is None else min(limit, self._max_length - len(branch.token_ids))

    def _rollout(self, branch: Branch, limit: int) -> _Rollout:
        """The branch's next continuation: it shares the parent's keys and values, its own last token is pending."""
        shared = len(branch.token_ids) - 1
        request_id = (shared * self._vocab_size + branch.token_ids[-1]) % _REQUEST_IDS
        sequence = Sequence(request_id, branch.launched, branch.config, branch.token_ids, self._eos_token_ids)
        self._backend.fork(branch.parent, sequence, shared)
        branch.launched += 1
        self._report.rollouts += 1
        self._report.shared_tokens += shared
        return _Rollout(branch, sequence, limit)

    def _resume(self, rollout: _Rollout) -> None:
        """Give a preempted continuation a slot again and compute what it had."""
        sequence = rollout.sequence
        self._backend.fork(rollout.branch.parent, sequence, len(rollout.branch.token_ids) - 1)
        try:
            self._backend.prefill([sequence])
        except CacheFullError:
            self._backend.free(sequence)
            raise
        self._report.prefilled_tokens += 1 + len(sequence.token_ids)

    def _step(self) -> bool:
        """One token for each. Returns whether a place has become free."""
        first = self._live[0].branch
        outputs = self._with_room(lambda: self._backend.step([r.sequence for r in self._live]), first, keep=1)
        ended = []
        for rollout, output in zip(list(self._live), outputs, strict=True):
            sequence = rollout.sequence
            if output.error is not None:
                rollout.branch.error = output.error
            else:
                sequence.token_ids.append(output.token_id)
                self._report.generated_tokens += 1
            complete = output.token_id in self._eos_token_ids
            if complete or output.error is not None or len(sequence.token_ids) >= rollout.limit:
                ended.append((rollout, complete))
        for rollout, _ in ended:
            self._backend.free(rollout.sequence)
            self._live.remove(rollout)
        for rollout, complete in ended:
            if rollout.branch.error is None:
                sequence = rollout.sequence
                self._finish(rollout.branch, sequence.sample_index, sequence.token_ids, complete)
        return bool(ended)

    def _finish(self, branch: Branch, index: int, generated: list[int], complete: bool) -> None:
        self._with_room(lambda: branch.finish(index, generated, complete), branch, keep=0)

    def _with_room(self, action: Callable[[], T], branch: Branch, keep: int) -> T:
        """The result of an action on `branch`. While the cache is too full for it, others give way, the last first.

        First continuations are preempted, except for `keep` of them, then the tasks that do not own the branch.
        """
        while True:
            try:
                return action()
            except CacheFullError:
                others = [entry for entry in self._open if branch not in entry.branches]
                if len(self._live) > keep:
                    self._preempt(self._live.pop())
                elif others:
                    self._postpone(others[-1])
                else:
                    raise

    def _preempt(self, rollout: _Rollout) -> None:
        self._backend.free(rollout.sequence)
        self._preempted.append(rollout)
