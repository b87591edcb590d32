"""Waiting and preemption: every sample gets its tokens, whatever the cache, the neighbours and the failures."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tiny
from llm2_fast import ArgumentError, Engine, GenerationConfig, prefixes
from llm2_fast.models.loading import LoadedModel
from llm2_fast.schedule import Schedule
from paged_backend import VOCAB, AheadBackend, PagedBackend, continuation

HEADERS = [[7 * i % VOCAB for i in range(8)], [7, 14, 21, 5, 5, 5, 5, 5]]
OWN = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)
SHARING = st.builds(lambda header, length, own: header[:length] + own, st.sampled_from(HEADERS), st.integers(1, 8), OWN)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12) | SHARING


@pytest.fixture(autouse=True, scope="module")
def share_little():
    """So that short prompts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MIN_SHARED_TOKENS", 2)
        yield


@functools.cache
def model():
    return LoadedModel(tiny.causal_lm("llama"), None, "tiny")


def engine_of(backend, block_size, capacity, max_batch_size=3):
    return Engine(backend(block_size, capacity), model(), None, max_batch_size=max_batch_size, max_length=None)


@pytest.fixture(params=[PagedBackend, AheadBackend], scope="module", ids=["in step", "ahead"])
def make_engine(request):
    """Tests run twice: with steps that begin when the tokens before them are known, and one step ahead."""
    return functools.partial(engine_of, request.param)


def config(**options):
    return GenerationConfig(ignore_eos=True, **options)


def assert_right(results, prompts, n, max_new_tokens):
    for request_id, (result, prompt) in enumerate(zip(results, prompts, strict=True)):
        expected = [continuation(prompt, request_id, index, max_new_tokens) for index in range(n)]
        assert [sample.token_ids for sample in result.samples] == expected
        assert result.stats.steps == n * max_new_tokens


def all_free(engine):
    tables = engine._backend.tables
    return tables.num_free_blocks == tables.capacity and engine._schedules == []


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=6),
    n=st.integers(1, 4),
    max_new_tokens=st.integers(1, 12),
    block_size=st.integers(1, 5),
    spare=st.integers(0, 12),
    max_batch_size=st.integers(1, 6),
)
def test_tokens_do_not_depend_on_the_cache(make_engine, prompts, n, max_new_tokens, block_size, spare, max_batch_size):
    longest = max(map(len, prompts)) + max_new_tokens
    capacity = -(-longest // block_size) + 1 + spare
    engine = make_engine(block_size, capacity, max_batch_size)
    results = engine.generate(prompts, config(n=n, max_new_tokens=max_new_tokens))
    assert_right(results, prompts, n, max_new_tokens)
    assert all_free(engine)
    # A preempted sample comes back only when another has finished, so the cache does not thrash.
    num_samples = n * len(prompts)
    assert sum(result.stats.preemptions for result in results) <= num_samples * max_batch_size
    with pytest.raises(ArgumentError):
        make_engine(block_size, -(-longest // block_size)).generate(prompts, config(max_new_tokens=max_new_tokens))


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=4),
    n=st.integers(1, 3),
    capacity=st.integers(14, 30),
    failing=st.sets(st.integers(0, 40), max_size=2),
)
def test_running_out_of_memory_loses_nothing(make_engine, prompts, n, capacity, failing):
    engine = make_engine(2, capacity, max_batch_size=8)
    calls = iter(range(10**6))

    def fail():
        if next(calls) in failing:
            raise MemoryError

    engine._backend.fail = fail
    try:
        results = engine.generate(prompts, config(n=n, max_new_tokens=8))
    except MemoryError:
        assert len(failing) == 2  # one is never too many
        results = engine.generate(prompts, config(n=n, max_new_tokens=8))
    assert_right(results, prompts, n, 8)
    assert all_free(engine)


def test_memory_that_stays_out_is_an_error_and_leaks_nothing(make_engine):
    engine = make_engine(2, 30, max_batch_size=8)

    def fail():
        raise MemoryError

    engine._backend.fail = fail
    with pytest.raises(MemoryError):
        engine.generate([[1, 2], [3]], config(max_new_tokens=3))
    assert all_free(engine)


def test_samples_are_admitted_in_order_and_the_last_is_preempted(make_engine):
    engine = make_engine(1, 13)  # twelve tokens and one block to spare
    order = watch(engine, [[1] * 4, [2] * 4, [3] * 3], max_new_tokens=8)
    assert order == [
        ("admitted", 0),
        ("admitted", 1),  # there is room for two prompts
        ("preempted", 1),  # but not for two samples that grow
        ("finished", 0),
        ("admitted", 1),  # before the one that has waited, but came later
        ("admitted", 2),
        ("preempted", 2),
        ("finished", 1),
        ("admitted", 2),
        ("finished", 2),
    ]


def watch(engine, prompts, **options):
    """What happens to the sequences of a call, in order."""
    backend, log, admitted = engine._backend, [], set()
    reserve, free = backend.reserve, backend.free

    def watched_reserve(sequence):
        reserve(sequence)
        if sequence not in admitted:
            admitted.add(sequence)
            log.append(("admitted", sequence.request_id))

    def watched_free(sequence):
        free(sequence)
        if sequence in admitted:
            admitted.remove(sequence)
            done = len(sequence.token_ids) == sequence.config.max_new_tokens
            log.append(("finished" if done else "preempted", sequence.request_id))

    backend.reserve, backend.free = watched_reserve, watched_free
    results = engine.generate(prompts, config(**options))
    assert_right(results, prompts, 1, options["max_new_tokens"])
    return log


def test_samples_of_a_prompt_share_it_again_after_preemption(make_engine):
    engine = make_engine(4, 16, max_batch_size=4)
    prompt = list(range(30))
    (result,) = engine.generate([prompt], config(n=4, max_new_tokens=20))
    assert_right([result], [prompt], 4, 20)
    assert result.stats.preemptions > 0
    # The prompt was computed once, then only tokens of preempted samples.
    assert engine._backend.prefilled <= len(prompt) + result.stats.preemptions * 20


def test_a_finished_prompt_is_given_back(make_engine):
    engine = make_engine(4, 1000, max_batch_size=2)
    prompts = [[index] for index in range(20)]
    assert_right(engine.generate(prompts, config(n=2, max_new_tokens=3)), prompts, 2, 3)
    assert engine._backend.tables.num_slots == 2  # one sample and another that shares its prompt


def test_what_can_never_fit_is_refused_before_any_work(make_engine):
    engine = make_engine(4, 5)
    with pytest.raises(ArgumentError, match=r"enough for prompts\[1\] with max_new_tokens, got 5"):
        engine.generate([[1], [2] * 10], config(max_new_tokens=7))
    assert engine._backend.prefilled == 0
    assert_right(engine.generate([[1], [2] * 10], config(max_new_tokens=6)), [[1], [2] * 10], 1, 6)


class CallMachine(RuleBasedStateMachine):
    """Streams come, are read, pause and go while other calls run, in a cache that holds few of their samples."""

    backend = PagedBackend

    @initialize(block_size=st.integers(1, 4), spare=st.integers(0, 8))
    def start(self, block_size, spare):
        self.engine = engine_of(self.backend, block_size, -(-20 // block_size) + 1 + spare, max_batch_size=2)
        self.streams = []

    @rule(prompt=PROMPTS, n=st.integers(1, 3), max_new_tokens=st.integers(1, 8))
    def open_stream(self, prompt, n, max_new_tokens):
        stream = self.engine.stream(prompt, config(n=n, max_new_tokens=max_new_tokens))
        expected = [continuation(prompt, 0, index, max_new_tokens) for index in range(n)]
        self.streams.append((stream, expected, [[] for _ in range(n)]))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), count=st.integers(1, 9))
    def read(self, data, count):
        stream, expected, received = entry = data.draw(st.sampled_from(self.streams))
        for _ in range(count):
            event = next(stream, None)
            if event is None:
                assert received == expected
                self.streams.remove(entry)
                return
            received[event.sample_index].append(event.token_id)
            assert received[event.sample_index] == expected[event.sample_index][: len(received[event.sample_index])]

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def abandon(self, data):
        entry = data.draw(st.sampled_from(self.streams))
        entry[0].close()
        self.streams.remove(entry)

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=3), n=st.integers(1, 2), max_new_tokens=st.integers(1, 8))
    def generate(self, prompts, n, max_new_tokens):
        results = self.engine.generate(prompts, config(n=n, max_new_tokens=max_new_tokens))
        assert_right(results, prompts, n, max_new_tokens)

    @invariant()
    def nothing_is_held_for_nobody(self):
        assert getattr(self, "streams", None) != [] or all_free(self.engine)

    def teardown(self):
        for stream, _, _ in getattr(self, "streams", []):
            stream.close()
        assert not hasattr(self, "engine") or all_free(self.engine)


TestCalls = CallMachine.TestCase
TestCalls.settings = settings(max_examples=20, stateful_step_count=30)


class CallMachineAhead(CallMachine):
    backend = AheadBackend


TestCallsAhead = CallMachineAhead.TestCase
TestCallsAhead.settings = TestCalls.settings


def test_threads_wait_for_one_another(make_engine):
    engine = make_engine(2, 14, max_batch_size=3)  # a sample of 20 tokens leaves room for few others
    prompts = [[index] * (1 + index % 8) for index in range(12)]

    def run(index):
        prompt, options = prompts[index], config(n=1 + index % 3, max_new_tokens=12)
        if index % 4 == 3:
            received = [[] for _ in range(options.n)]
            for event in engine.stream(prompt, options):
                received[event.sample_index].append(event.token_id)
        else:
            received = [sample.token_ids for sample in engine.generate([prompt], options)[0].samples]
        return received == [continuation(prompt, 0, sample, 12) for sample in range(options.n)]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(len(prompts))))
    assert all_free(engine)


def start(engine, prompts, max_batch_size, **options):
    """A call of `generate` that goes on when its events are asked for."""
    requests = engine._make_requests(prompts, config(**options), None)
    return engine._decode(Schedule(engine._backend, requests, max_batch_size)), requests


def test_a_later_call_makes_room_for_an_earlier_one(make_engine):
    engine = make_engine(1, 13)
    (earlier, first), (later, second) = (start(engine, [[token] * 4], 1, max_new_tokens=8) for token in (1, 2))
    next(earlier)
    next(later)
    list(earlier)
    list(later)
    for requests, prompt in ((first, [1] * 4), (second, [2] * 4)):
        assert_right([request.generation for request in requests], [prompt], 1, 8)
    assert (first[0].stats.preemptions, second[0].stats.preemptions) == (0, 1)


def test_a_later_call_waits_until_an_earlier_one_has_room_to_spare(make_engine):
    engine = make_engine(1, 13)
    prompts = [[1] * 8, [2]]
    earlier, requests = start(engine, prompts, 1, max_new_tokens=4)
    next(earlier)
    with ThreadPoolExecutor(1) as threads:
        later = threads.submit(engine.generate, [[3] * 5], config(max_new_tokens=3))
        while not requests[0].samples[0].finished:
            assert not later.done()
            next(earlier)
        assert_right(later.result(60), [[3] * 5], 1, 3)  # while the earlier call is under way
    assert not requests[1].samples[0].finished
    list(earlier)
    assert_right([request.generation for request in requests], prompts, 1, 4)
    assert requests[0].stats.preemptions == 0


def test_a_loop_of_ones_own_has_the_whole_cache(make_engine):
    engine = make_engine(2, 40)
    stream = engine.stream([1, 2, 3], config(n=2, max_new_tokens=9))
    received = [[], []]
    for event in itertools.islice(stream, 7):
        received[event.sample_index].append(event.token_id)
    with engine.exclusive_backend() as backend:
        assert backend.tables.num_free_blocks == 40
    for event in stream:
        received[event.sample_index].append(event.token_id)
    assert received == [continuation([1, 2, 3], 0, index, 9) for index in range(2)]


def test_a_full_cache_that_no_call_can_empty_is_an_error(make_engine):
    engine = make_engine(1, 9)
    engine._backend.tables.reserve(engine._backend.tables.allocate(), 5)  # somebody else's
    with pytest.raises(MemoryError, match="cache blocks are needed"):
        engine.generate([[1] * 4], config(max_new_tokens=4))
    assert engine._schedules == []


def test_steps_run_ahead_until_somebody_ends(make_engine):
    engine = make_engine(2, 40, max_batch_size=2)
    prompts = [[1, 2, 3], [4]]
    results = engine.generate(prompts, config(max_new_tokens=6))
    assert_right(results, prompts, 1, 6)
    if isinstance(engine._backend, AheadBackend):
        # All but the first, and none too many: it is known when samples reach their length.
        assert (engine._backend.num_steps, engine._backend.num_ahead) == (6, 5)


def test_tokens_behind_the_end_are_dropped(make_engine):
    """An end-of-sequence token, or an interrupted stream, comes when the next step has begun."""
    engine = make_engine(2, 40, max_batch_size=2)
    prompts = [[1, 2, 3], [4]]
    expected = [continuation(prompt, index, 0, 8) for index, prompt in enumerate(prompts)]
    eos = expected[0][3]
    assert eos not in expected[0][:3] + expected[1]
    engine._eos_token_ids = (eos,)
    results = engine.generate(prompts, max_new_tokens=8)
    assert [result.samples[0].token_ids for result in results] == [expected[0][:4], expected[1]]
    assert [result.stats.steps for result in results] == [4, 8]
    stream = engine.stream(prompts[1], config(max_new_tokens=8))
    next(stream)
    stream.close()
    assert all_free(engine)
