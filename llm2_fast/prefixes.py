"""`Prefixes`: what prompts of a call begin with in common is computed once and forked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from llm2_fast.backends.backend import Backend
from llm2_fast.errors import CacheFullError
from llm2_fast.prefix_index import PrefixIndex
from llm2_fast.request import Request, Sampling
from llm2_fast.sequence import Sequence

# Waiting for another's prompt adds a pass, which reads all weights: a CPU computes about so many rows meanwhile.
MIN_SHARED_TOKENS = 16


class Source(NamedTuple):
    """A sequence that others can be forked from.

    Attributes:
        request: Whose prompt it has.
        sequence: Has a slot.
        length: Tokens of the prompt that are computed.
    """

    request: Request
    sequence: Sequence
    length: int

    def shares(self, common: int, request: Request) -> int:
        """Tokens that a sample of `request` can share, whose prompt has the first `common` in common."""
        shared = min(common, self.length)
        if shared == len(request.prompt_token_ids) and shared < len(self.sequence):
            shared -= 1  # the hidden state of the last token is needed, and is gone
        return shared


class Prefixes:
    """What is computed of the prompts of a call, for others that begin like them.

    Samples are forked from the live ones. Beyond these, a prompt is kept (`Request.prefix`) while a waiting sample has
    more in common with it than with the live ones. What is kept is the first to go where room is needed, so sharing
    never takes a block that samples would have had without it.

    Args:
        backend: Computes and forks.
        max_kept: Prompts kept at once, since not every backend bounds its cache.
    """

    def __init__(self, backend: Backend, max_kept: int) -> None:
        self.max_kept = max_kept
        self._backend = backend
        self._waiting: PrefixIndex[Sampling] = PrefixIndex()
        self._opened: PrefixIndex[Source] = PrefixIndex()  # by live samples that are not computed yet
        self._computed: PrefixIndex[Source] = PrefixIndex()  # by live samples, or kept
        self._kept: dict[Request, Source] = {}  # the oldest first

    def wait(self, sampling: Sampling) -> None:
        """A sample waits; what it has computed cannot be shared any longer."""
        self._forget(sampling)
        self._waiting.add(sampling.request.key, sampling)

    def open(self, sampling: Sampling) -> None:
        """Give a waiting sample a slot with room for its tokens, and of its prompt as much as another has computed.

        Raises:
            CacheFullError: There is no room; it has no slot.
        """
        request, sequence = sampling.request, sampling.sequence
        source, shared = self._best(self._computed, request)
        if source is not None:
            self._fork(source, sequence, shared)
        try:
            self._backend.reserve(sequence)
        except CacheFullError:
            self._backend.free(sequence)
            raise
        self._waiting.discard(request.key, sampling)
        self._opened.add(request.key, _source_of(sampling))
        if source is None or source.request is not request:
            request.opened(shared)

    def is_coming(self, request: Request) -> bool:
        """Much more of the prompt can be shared once the opened samples are computed."""
        _, coming = self._best(self._opened, request)
        return coming > 0 and _is_worth_it(coming - self._best(self._computed, request)[1], request)

    def computed(self, sampling: Sampling) -> None:
        """The prompt of an opened sample has been computed."""
        source = _source_of(sampling)
        self._opened.discard(source.request.key, source)
        self._computed.add(source.request.key, source)

    def close(self, sampling: Sampling) -> None:
        """Give back what a finished sample holds, but for what only it can share with samples that wait."""
        self._forget(sampling)
        request, sequence = sampling.request, sampling.sequence
        # Without the last token, whose hidden state is gone.
        source = Source(request, sequence, len(request.prompt_token_ids) - 1)
        wanted = max((mine for mine, best in self._uses(source) if mine > best), default=0)
        if wanted:
            self._keep(source, wanted)
        self._backend.free(sequence)

    def refresh(self, upcoming: Request | None) -> None:
        """After samples were admitted: keep what those that wait will share, and nothing else.

        Args:
            upcoming: Of the first sample that waits, if one does. A computed prompt that is the same is kept with the
                hidden state of its last token, so that nothing of it is computed again.
        """
        for kept in list(self._kept.values()):
            if not any(mine == best for mine, best in self._uses(kept)):
                self._drop(kept)
        if upcoming is not None:
            source, shared = self._best(self._computed, upcoming)
            if shared == len(upcoming.prompt_token_ids) and source.request not in self._kept:
                self._keep(source, shared)

    def make_room(self, needed_by: Request | None = None) -> bool:
        """Give back a prompt that is kept, that which `needed_by` can share if it is the only one.

        Returns:
            False if none is kept.
        """
        if not self._kept:
            return False
        needed = None if needed_by is None else self._best(self._computed, needed_by)[0]
        others = (kept for kept in self._kept.values() if kept != needed)
        self._drop(next(others, needed))
        return True

    def clear(self) -> None:
        """Nothing is computed any longer."""
        for kept in list(self._kept.values()):
            self._drop(kept)
        self._opened, self._computed = PrefixIndex(), PrefixIndex()

    def _best(self, index: PrefixIndex[Source], request: Request) -> tuple[Source | None, int]:
        """With whom a sample of `request` has most in common, and how many tokens; None and 0 if it is too little."""
        best, most = None, 0
        for common, sources in index.nearest(request.key):
            for source in sources:
                if (shared := source.shares(common, request)) > most:
                    best, most = source, shared
        return (best, most) if _is_worth_it(most, request) else (None, 0)

    def _uses(self, source: Source) -> Iterator[tuple[int, int]]:
        """For waiting prompts nearest to that of `source`: tokens they can share with it, and with the best there is.

        Prompts farther away than these have no more in common with `source` than with what these share.
        """
        for common, samplings in self._waiting.nearest(source.request.key):
            request = next(iter(samplings)).request
            if _is_worth_it(shared := source.shares(common, request), request):
                yield shared, self._best(self._computed, request)[1]

    def _keep(self, source: Source, length: int) -> None:
        """Keep so many tokens of a prompt if there is room."""
        request = source.request
        if (kept := self._kept.get(request)) is not None:
            self._drop(kept)
        if len(self._kept) >= self.max_kept:
            return
        with suppress(CacheFullError):
            self._fork(source, request.prefix, length)
            self._kept[request] = Source(request, request.prefix, length)
            self._computed.add(request.key, self._kept[request])

    def _drop(self, kept: Source) -> None:
        del self._kept[kept.request]
        self._computed.discard(kept.request.key, kept)
        self._backend.free(kept.sequence)

    def _fork(self, source: Source, child: Sequence, length: int) -> None:
        self._backend.fork(source.sequence, child, None if length == len(source.sequence) else length)

    def _forget(self, sampling: Sampling) -> None:
        for index in (self._opened, self._computed):
            index.discard(sampling.request.key, _source_of(sampling))


def _source_of(sampling: Sampling) -> Source:
    """A sample as one that others are forked from."""
    return Source(sampling.request, sampling.sequence, len(sampling.request.prompt_token_ids))


def _is_worth_it(shared: int, request: Request) -> bool:
    """Sharing so many tokens is worth a fork: they are many, or all there are, which saves a pass."""
    return shared >= MIN_SHARED_TOKENS or shared == len(request.prompt_token_ids)
