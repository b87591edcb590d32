"""`Prefixes`: what prompts of a call begin with in common is computed once and forked."""

from __future__ import annotations

from collections.abc import Iterator

from llm2_fast.backends.backend import Backend
from llm2_fast.errors import CacheFullError
from llm2_fast.prefix_index import PrefixIndex, beginning
from llm2_fast.request import Request, Sampling
from llm2_fast.sequence import Sequence

# Waiting for another's prompt adds a pass, which reads all weights: a CPU computes about so many rows meanwhile.
MIN_SHARED_TOKENS = 16


class Prefixes:
    """What is computed of the prompts of a call, for others that begin like them.

    Samples are forked from the live ones. Beyond these, the beginning of a prompt is kept when its last sample ends
    while one that waits would have to compute much more without it. What is kept is the first to go where room is
    needed, so sharing never takes a block that samples would have had without it.

    Args:
        backend: Computes and forks.
        max_kept: Prompts kept at once, since not every backend bounds its cache.
    """

    def __init__(self, backend: Backend, max_kept: int) -> None:
        self.max_kept = max_kept
        self._backend = backend
        self._waiting: PrefixIndex[Sampling] = PrefixIndex()
        self._opened: PrefixIndex[Sequence] = PrefixIndex()  # of live samples that are not computed yet
        self._computed: PrefixIndex[Sequence] = PrefixIndex()  # of live samples, or kept
        self._kept: dict[bytes, Sequence] = {}  # whole prompts, by the key of what is computed; the oldest first

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
        self._opened.add(request.key, sequence)
        request.opened(shared)

    def is_coming(self, request: Request) -> bool:
        """Much more of the prompt can be shared once the opened samples are computed."""
        _, coming = self._best(self._opened, request)
        return coming > 0 and _is_worth_it(coming - self._best(self._computed, request)[1], request)

    def computed(self, sampling: Sampling) -> None:
        """The prompt of an opened sample has been computed."""
        self._opened.discard(sampling.request.key, sampling.sequence)
        self._computed.add(sampling.request.key, sampling.sequence)

    def close(self, sampling: Sampling) -> None:
        """Give back what a finished sample holds, but for what only it can share with samples that wait."""
        self._forget(sampling)
        request, sequence = sampling.request, sampling.sequence
        key = beginning(request.key, len(request.prompt_token_ids) - 1)  # the last token's hidden state is gone
        wanted = [mine for mine, best in self._uses(sequence, key) if mine - best >= MIN_SHARED_TOKENS]
        if wanted:
            self._keep(sequence, key, max(wanted))
        self._backend.free(sequence)

    def refresh(self, upcoming: Request | None) -> None:
        """After samples were admitted: keep what those that wait will share, and nothing else.

        Args:
            upcoming: Of the first sample that waits, if one does. A computed prompt that is the same is kept with the
                hidden state of its last token, so that nothing of it is computed again.
        """
        for key, kept in list(self._kept.items()):
            if not any(mine == best for mine, best in self._uses(kept, key)):
                self._drop(key)
        if upcoming is not None:
            source, shared = self._best(self._computed, upcoming)
            if shared == len(upcoming.prompt_token_ids) and source is not self._kept.get(upcoming.key):
                self._keep(source, upcoming.key, shared)

    def make_room(self, needed_by: Request | None = None) -> bool:
        """Give back a prompt that is kept, that which `needed_by` can share if it is the only one.

        Returns:
            False if none is kept.
        """
        if not self._kept:
            return False
        needed = None if needed_by is None else self._best(self._computed, needed_by)[0]
        self._drop(next((key for key, kept in self._kept.items() if kept is not needed), next(iter(self._kept))))
        return True

    def clear(self) -> None:
        """Nothing is computed any longer."""
        for key in list(self._kept):
            self._drop(key)
        self._opened, self._computed = PrefixIndex(), PrefixIndex()

    def _best(self, index: PrefixIndex[Sequence], request: Request) -> tuple[Sequence | None, int]:
        """With whom a sample of `request` has most in common, and how many tokens; None and 0 if it is too little."""
        best, most = None, 0
        for common, sources in index.nearest(request.key):
            for source in sources:
                if (shared := _shared(source, common, request)) > most:
                    best, most = source, shared
                if shared == common:
                    break  # as many as any with this prompt
        return (best, most) if _is_worth_it(most, request) else (None, 0)

    def _uses(self, source: Sequence, key: bytes) -> Iterator[tuple[int, int]]:
        """For waiting prompts nearest to `key`: tokens they can share with `source`, and with the best there is.

        Prompts farther away than these have no more in common with `source` than with what these share.
        """
        for common, samplings in self._waiting.nearest(key):
            request = next(iter(samplings)).request
            if _is_worth_it(shared := _shared(source, common, request), request):
                yield shared, self._best(self._computed, request)[1]

    def _keep(self, source: Sequence, key: bytes, length: int) -> None:
        """Keep the first `length` tokens of a prompt if there is room."""
        key = beginning(key, length)
        if key in self._kept:
            self._drop(key)
        if len(self._kept) >= self.max_kept:
            return
        self._kept[key] = kept = Sequence(source.request_id, -1, source.config, source.prompt_token_ids)
        try:
            self._fork(source, kept, length)
        except CacheFullError:
            del self._kept[key]
        else:
            self._computed.add(key, kept)

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key)
        self._computed.discard(key, kept)
        self._backend.free(kept)

    def _fork(self, source: Sequence, child: Sequence, length: int) -> None:
        self._backend.fork(source, child, None if length == len(source) else length)

    def _forget(self, sampling: Sampling) -> None:
        for index in (self._opened, self._computed):
            index.discard(sampling.request.key, sampling.sequence)


def _shared(source: Sequence, common: int, request: Request) -> int:
    """Tokens that a sample of `request` can share with `source`, whose first `common` are the same and computed."""
    whole = common == len(request.prompt_token_ids)
    return common - 1 if whole and common < len(source) else common  # the last one's hidden state is needed, and gone


def _is_worth_it(shared: int, request: Request) -> bool:
    """Sharing so many tokens is worth a fork: they are many, or all there are, which saves a pass."""
    return shared >= MIN_SHARED_TOKENS or shared == len(request.prompt_token_ids)
