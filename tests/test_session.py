"""`VerifierSession` against full forward passes, one per score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tiny
from llm2_fast import ArgumentError
from llm2_fast.models.loading import LoadedModel
from llm2_fast.verifier import VerifierSession
from tiny import VOCAB
from tolerances import TOLERANCES
from verifiers import KINDS, case

PREFIX = [5, 6, 7, 8, 9, 10, 11, 12]  # longer than the sliding windows
TOLERANCE = TOLERANCES["verifier.score", torch.float32]
MAX_LENGTH, MAX_SLOTS = 40, 3


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def session(kind):
    return make_session("llama", kind)


@pytest.fixture
def score(kind):
    """Brute force."""
    return case("llama", kind).score


def make_session(family, kind) -> VerifierSession:
    model, verifier, _ = vars(case(family, kind)).values()
    return VerifierSession(verifier.scorer(LoadedModel(model, None, "tiny")))


def scores_of(session, slot, candidates) -> torch.Tensor:
    """Scores of one slot's candidates."""
    ((scores, _),) = session.score([slot], [candidates])
    return scores


def assert_scores(actual, score, prefix, candidates):
    expected = [score(prefix, c) if c < VOCAB else float("-inf") for c in candidates]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), **TOLERANCE)


@contextmanager
def hooked(session, hook) -> Iterator[None]:
    """`hook(module, args, output)` on the first layer of the verifier's decoder."""
    handle = session._scorer.decoder.model.layers[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted_rows(session) -> Iterator[list[int]]:
    """Token rows of every pass of the decoder."""
    rows: list[int] = []

    def count(module, args, kwargs):
        rows.append(kwargs["input_ids"].numel())

    handle = session._scorer.decoder.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


class Programs(RuleBasedStateMachine):
    """Any order of calls gives the scores of a fresh full pass."""

    slots = Bundle("slots")
    tokens = st.lists(st.integers(3, 6), max_size=4)  # few, so that the tokens taken are often ones just scored
    taken = st.lists(st.integers(3, 6), min_size=1, max_size=4)
    candidates = st.lists(st.integers(3, 6) | st.integers(0, VOCAB + 2), max_size=6)

    def __init__(self, family, kind):
        super().__init__()
        self.session, self.score = make_session(family, kind), case(family, kind).score
        self.sequences: dict[int, list[int]] = {}

    @precondition(lambda self: len(self.sequences) < MAX_SLOTS)
    @rule(target=slots, tokens=tokens)
    def add(self, tokens):
        slot = self.session.add(tokens)
        assert slot not in self.sequences
        self.sequences[slot] = list(tokens)
        return slot

    @rule(slot=slots, tokens=tokens)
    def extend(self, slot, tokens):
        if len(self.sequences[slot]) + len(tokens) < MAX_LENGTH:
            self.session.extend(slot, tokens)
            self.sequences[slot] += tokens

    @precondition(lambda self: self.sequences)  # a list of what is not there is a program to be thrown away
    @rule(some=st.lists(slots, max_size=2))
    def compute(self, some):
        self.session.compute(list(set(some)))

    @rule(slot=slots, share=st.floats(0, 1))
    def rollback(self, slot, share):
        length = round(share * len(self.sequences[slot]))
        self.session.rollback(slot, length)
        del self.sequences[slot][length:]

    @precondition(lambda self: len(self.sequences) < MAX_SLOTS)
    @rule(target=slots, slot=slots)
    def fork(self, slot):
        child = self.session.fork(slot)
        assert child not in self.sequences
        self.sequences[child] = list(self.sequences[slot])
        return child

    @rule(slot=consumes(slots))
    def free(self, slot):
        self.session.free(slot)
        del self.sequences[slot]

    @precondition(lambda self: self.sequences)
    @rule(asked=st.lists(st.tuples(slots, candidates), min_size=1, max_size=3))
    def score_some(self, asked):
        candidates = dict(asked)
        results = self.session.score(list(candidates), list(candidates.values()))
        for (slot, ids), (scores, _) in zip(candidates.items(), results, strict=True):
            assert_scores(scores, self.score, self.sequences[slot], ids)

    @rule(slot=slots, tokens=tokens)
    def score_tokens(self, slot, tokens):
        if len(self.sequences[slot]) + len(tokens) < MAX_LENGTH:
            (scores,) = self.session.score_tokens([slot], [tokens])
            assert len(scores) == len(tokens)
            for token, score in zip(tokens, scores, strict=True):
                assert_scores(score[None], self.score, self.sequences[slot], [token])
                self.sequences[slot].append(token)

    # What a decoding loop does with candidates just scored; single calls in a row seldom meet on one slot.

    @rule(slot=slots, candidates=taken, share=st.sampled_from([0.0, 0.5, 1.0]))
    def score_go_back_and_take_one(self, slot, candidates, share):
        self.score_some([(slot, candidates)])
        self.rollback(slot, share)
        self.extend(slot, [candidates[-1]])

    @precondition(lambda self: len(self.sequences) < MAX_SLOTS)
    @rule(target=slots, slot=slots, candidates=taken)
    def score_fork_and_take_two(self, slot, candidates):
        self.score_some([(slot, candidates)])
        child = self.fork(slot)
        self.extend(slot, [candidates[0]])
        self.extend(child, [candidates[-1]])
        return child

    @invariant()
    def tokens_are_kept(self):
        for slot, tokens in self.sequences.items():
            assert self.session.token_ids(slot) == tokens

    def teardown(self):
        for slot, tokens in self.sequences.items():
            assert_scores(scores_of(self.session, slot, [4]), self.score, tokens, [4])


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "head"), ("llama", "lora"), ("llama", "full"), ("gemma3", "full"), ("gpt2", "head")]
)
def test_any_program_equals_brute_force(family, kind):
    run_state_machine_as_test(
        lambda: Programs(family, kind), settings=settings(max_examples=30, stateful_step_count=20, deadline=None)
    )


def test_what_is_cached_is_not_computed_again(session, score):
    def rows(slot, candidates):
        with counted_rows(session) as passes:
            ((scores, num_rows),) = session.score([slot], [candidates])
        assert passes == [num_rows]
        assert_scores(scores, score, session.token_ids(slot), candidates)
        return num_rows

    slot = session.add(PREFIX)
    assert rows(slot, [3, 4, 5]) == len(PREFIX) + 3
    assert rows(slot, [3, 4]) == 2  # the prefix is cached
    session.extend(slot, [4])
    assert rows(slot, [6, 7]) == 2  # the row of the candidate taken was kept
    session.extend(slot, [7, 8])
    assert rows(slot, [3]) == 1 + 1  # 7 was kept, 8 was not
    session.extend(slot, [9])
    assert rows(slot, [3]) == 1 + 1  # 9 had not been scored
    session.rollback(slot, 6)
    assert rows(slot, [3]) == 1
    child = session.fork(slot)
    session.extend(child, [3])
    assert rows(child, [5, 6]) == 1 + 2  # a fork takes the prefix along, not the candidates' rows
    assert rows(slot, [4]) == 1


def test_sequences_are_scored_in_one_pass(session, score):
    prefixes = [PREFIX, [3], [], [20, 21, 22]]
    candidates = [[3, 4], [5], [6, 7, 8], []]
    slots = [session.add(prefix) for prefix in prefixes]
    with counted_rows(session) as passes:
        results = session.score(slots, candidates)
    assert len(passes) == 1
    for prefix, ids, (scores, num_rows) in zip(prefixes, candidates, results, strict=True):
        assert_scores(scores, score, prefix, ids)
        assert num_rows == len(prefix) + len(ids)


def test_nothing_to_score_is_no_pass(session):
    slot = session.add()
    with counted_rows(session) as passes:
        assert session.score([], []) == []
        assert scores_of(session, slot, []).shape == (0,)
        session.compute([])
    assert passes == []


def test_computed_prefixes_are_shared_by_forks(session, score):
    slot = session.add(PREFIX)
    scores_of(session, slot, [3, 4])
    session.extend(slot, [5, 6])
    with counted_rows(session) as passes:
        session.compute([slot])
        children = [session.fork(slot), session.fork(slot)]
        results = session.score(children, [[3], [4]])
        session.compute([slot, *children])  # nothing is left to compute
    assert passes == [2, 2]
    for (scores, _), token in zip(results, [3, 4], strict=True):
        assert_scores(scores, score, [*PREFIX, 5, 6], [token])


def test_compute_forgets_the_rows_it_overwrites(session, score):
    slot = session.add(PREFIX)
    scores_of(session, slot, [3, 4])
    session.extend(slot, [5])
    session.compute([slot])
    session.extend(slot, [4])
    assert_scores(scores_of(session, slot, [7]), score, [*PREFIX, 5, 4], [7])


def test_candidates_beyond_the_vocabulary_score_minus_infinity(session, score):
    slot = session.add(PREFIX)
    candidates = [3, VOCAB, 4, VOCAB + 100, 2**31 - 1]
    assert_scores(scores_of(session, slot, candidates), score, PREFIX, candidates)


@pytest.mark.parametrize("slot", [-1, 1, 99])
@pytest.mark.parametrize(
    "call",
    [
        lambda session, slot: session.extend(slot, [3]),
        lambda session, slot: session.rollback(slot, 0),
        lambda session, slot: session.fork(slot),
        lambda session, slot: session.free(slot),
        lambda session, slot: session.token_ids(slot),
        lambda session, slot: session.score([slot], [[3]]),
    ],
    ids=["extend", "rollback", "fork", "free", "token_ids", "score"],
)
def test_unknown_slots_are_refused(session, call, slot):
    session.add(PREFIX)
    with pytest.raises(ArgumentError, match="slot: expected a slot in use"):
        call(session, slot)


def test_freed_slots_are_refused(session):
    slot = session.add(PREFIX)
    session.free(slot)
    with pytest.raises(ArgumentError, match="slot: expected a slot in use"):
        session.free(slot)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_tokens_outside_the_vocabulary_are_refused(session, score, token):
    slot = session.add(PREFIX)
    with pytest.raises(ArgumentError, match=rf"token_ids: expected ids in \[0, {VOCAB}\), .*, got {token}"):
        session.extend(slot, [3, token])
    assert session.token_ids(slot) == PREFIX
    with pytest.raises(ArgumentError, match="token_ids"):
        session.add([token])
    assert session.add() == slot + 1, "the refused sequence kept its slot"


def test_negative_candidates_are_refused(session, score):
    slot = session.add(PREFIX)
    with pytest.raises(ArgumentError, match=r"candidate_ids: .*got -1"):
        session.score([slot], [[3, -1]])
    assert_scores(scores_of(session, slot, [3]), score, PREFIX, [3])


def test_sequences_beyond_the_context_are_refused(session, score):
    limit = tiny.config("llama").max_position_embeddings
    tokens = [3 + i % 7 for i in range(limit)]
    with pytest.raises(ArgumentError, match=f"token_ids: expected at most {limit} tokens.*got {limit + 1}"):
        session.add([*tokens, 3])
    slot = session.add(tokens[:-1])
    assert_scores(scores_of(session, slot, [4]), score, tokens[:-1], [4])  # the last position
    session.extend(slot, tokens[-1:])
    with pytest.raises(ArgumentError, match=f"at most {limit} tokens"):
        session.extend(slot, [3])
    with pytest.raises(ArgumentError, match=f"at most {limit} tokens"):
        session.score([slot], [[3]])


def test_a_slot_asked_twice_is_refused(session):
    slot = session.add(PREFIX)
    with pytest.raises(ArgumentError, match="slots: expected distinct slots"):
        session.score([slot, slot], [[3], [4]])


def test_candidates_that_do_not_fit_the_slots_are_refused(session):
    slot = session.add(PREFIX)
    with pytest.raises(ArgumentError, match="candidate_ids: expected"):
        session.score([slot], [[3], [4]])


@pytest.mark.parametrize("length", [-1, len(PREFIX) + 1])
def test_lengths_out_of_range_are_refused(session, length):
    slot = session.add(PREFIX)
    with pytest.raises(ArgumentError, match=f"length: expected between 0 and {len(PREFIX)}.*got {length}"):
        session.rollback(slot, length)
    assert session.token_ids(slot) == PREFIX


def nan(module, args, output):
    return output * float("nan")


@pytest.mark.parametrize("forget", ["free", "rollback"])
def test_a_slot_is_clean_after_nan(session, score, forget):
    slot, longer = session.add(PREFIX), session.add([*PREFIX, *PREFIX])
    scores_of(session, longer, [3])
    with hooked(session, nan):
        assert scores_of(session, slot, [3, 4, 5, 6]).isnan().all()
    if forget == "free":
        session.free(slot)
        assert session.add() == slot
    else:
        session.rollback(slot, 0)
    session.extend(slot, [3])
    # One row each: positions where NaN was are masked in this pass, not written.
    results = session.score([slot, longer], [[5], [6]])
    assert_scores(results[0][0], score, [3], [5])
    assert_scores(results[1][0], score, [*PREFIX, *PREFIX], [6])


def test_nan_stays_with_its_sequence(session, score):
    slots = [session.add(PREFIX), session.add([3, 4])]

    def poison_first(module, args, output):
        output = output.clone()
        output[0] = float("nan")
        return output

    with hooked(session, poison_first):
        (bad, _), (good, _) = session.score(slots, [[3, 4], [5, 6]])
    assert bad.isnan().all()
    assert_scores(good, score, [3, 4], [5, 6])


def test_an_interrupted_pass_leaves_no_wrong_rows(session, score):
    slot = session.add(PREFIX)
    scores_of(session, slot, [3, 4])

    def interrupt(module, args, output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hooked(session, interrupt):
        scores_of(session, slot, [5, 6])
    session.extend(slot, [3])  # its row was overwritten in the first layer
    assert_scores(scores_of(session, slot, [7]), score, [*PREFIX, 3], [7])


def test_scoring_tokens_that_cannot_be_appended_changes_nothing(session):
    slot = session.add(PREFIX)
    for slots, tokens, message in (
        ([slot], [[VOCAB]], "token_ids: expected ids in"),
        ([slot], [[3] * 100], "token_ids: expected at most"),
        ([slot, slot], [[3], [3]], "slots: expected distinct slots"),
        ([slot], [], "token_ids: expected tokens for each of 1 slots, got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            session.score_tokens(slots, tokens)
    assert session.token_ids(slot) == PREFIX
