"""`RolloutPool`: continuations of many branches, decoded together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from llm2_fast.backends.backend import Backend
from llm2_fast.config import GenerationConfig
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.exploration.tally import Tally
from llm2_fast.sequence import Sequence

_REQUEST_IDS = 2**31

Result = TypeVar("Result")


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
    """One continuation under way."""

    branch: Branch
    sequence: Sequence
    limit: int


@dataclass(eq=False)
class _Open:
    """A task under way and the branches it waits for."""

    task: Generator[list[Branch], None, object]
    branches: list[Branch]

    @property
    def ready(self) -> bool:
        return all(branch.decided for branch in self.branches)


class RolloutPool:
    """Runs tasks that need continuations. As soon as one place is free, the next continuation takes it.

    A task is a generator: it yields branches, is resumed when all of them are decided, and returns its result. Tasks
    are started in order, when those before leave places free.

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
        self._open: list[_Open] = []
        self._live: list[_Rollout] = []

    def run(self, tasks: Iterator[Generator[list[Branch], None, Result]]) -> Iterator[Result]:
        """Run the tasks.

        Yields:
            Their results, as they come.
        """
        try:
            while True:
                yield from self._fill(tasks)
                if not self._live:
                    return
                while not self._step():
                    pass
        finally:
            for rollout in self._live:
                self._backend.free(rollout.sequence)
            for entry in self._open:
                entry.task.close()
            self._live, self._open = [], []

    def _fill(self, tasks: Iterator[Generator[list[Branch], None, Result]]) -> Iterator[Result]:
        """Resume tasks whose branches are decided, launch what the open ones want, open more while places are free."""
        for entry in list(self._open):
            yield from self._advance(entry)
        while len(self._live) < self._max_batch_size and (task := next(tasks, None)) is not None:
            entry = _Open(task, [])
            self._open.append(entry)
            yield from self._advance(entry)

    def _advance(self, entry: _Open) -> Iterator[Result]:
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

    def _launch(self, entry: _Open) -> None:
        for branch in entry.branches:
            limit = self._limit(branch)
            while branch.wanted > 0 and limit == 0:
                branch.launched += 1
                branch.finish(branch.launched - 1, [], complete=branch.ended)
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

    def _step(self) -> bool:
        """One token for each. Returns whether a place has become free."""
        outputs = self._backend.step([rollout.sequence for rollout in self._live])
        live = []
        for rollout, output in zip(self._live, outputs, strict=True):
            branch, sequence = rollout.branch, rollout.sequence
            if output.error is not None:
                branch.error = output.error
                self._backend.free(sequence)
                continue
            sequence.token_ids.append(output.token_id)
            self._report.generated_tokens += 1
            complete = output.token_id in self._eos_token_ids
            if complete or len(sequence.token_ids) >= rollout.limit:
                self._backend.free(sequence)
                branch.finish(sequence.sample_index, sequence.token_ids, complete)
            else:
                live.append(rollout)
        some_ended = len(live) < len(self._live)
        self._live = live
        return some_ended
