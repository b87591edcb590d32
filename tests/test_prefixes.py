"""What prompts begin with in common is computed once, and nothing but time and memory depends on it."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm2_fast
import tiny
from llm2_fast import Engine, GenerationConfig, ops, prefix_index, prefixes
from llm2_fast.backends.cached_decoder import CachedDecoder, block_bytes
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.prefix_index import PrefixIndex, common_length, prompt_key
from llm2_fast.prefixes import MIN_SHARED_TOKENS
from llm2_fast.schedule import Schedule
from margins import clear_candidates
from paged_backend import AheadBackend, PagedBackend, continuation
from verifiers import KINDS, case

pytestmark = pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning")
needs_extension = pytest.mark.skipif(ops.cpu_extension() is None, reason=str(ops.cpu_extension_problem()))

HEADER = [(7 * i + 3) % tiny.VOCAB for i in range(40)]  # more than a block of the cpu backend's cache
OTHER = [*HEADER[:18], *((5 * i + 1) % tiny.VOCAB for i in range(28))]


# --- The index -----------------------------------------------------------------------------------------------------

SHORT = st.lists(st.sampled_from([0, 1, 256]), max_size=5)


def in_common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(one=SHORT, other=SHORT)
def test_common_length(one, other):
    assert common_length(prompt_key(one), prompt_key(other)) == in_common(one, other)


@given(prompts=st.lists(SHORT, max_size=12), gone=st.sets(st.integers(0, 11)), prompt=SHORT)
def test_the_nearest_have_most_in_common(prompts, gone, prompt):
    index = PrefixIndex()
    for item, token_ids in enumerate(prompts):
        index.add(prompt_key(token_ids), item)
    for item in gone & set(range(len(prompts))):
        index.discard(prompt_key(prompts[item]), item)
        index.discard(prompt_key(prompts[item]), item)  # nothing is there any longer
    left = {item: token_ids for item, token_ids in enumerate(prompts) if item not in gone}
    found = [(common, item) for common, items in index.nearest(prompt_key(prompt)) for item in items]
    assert all(common == in_common(left[item], prompt) for common, item in found)
    assert max(found, default=(-1,))[0] == max((in_common(other, prompt) for other in left.values()), default=-1)
    assert {item for _, item in found} >= {item for item, other in left.items() if other == prompt}


# --- The schedule, over a backend that knows which tokens it has computed ------------------------------------------


@functools.cache
def model():
    return LoadedModel(tiny.causal_lm("llama"), None, "tiny")


def paged(backend=PagedBackend, block_size=4, capacity=200, max_batch_size=4):
    return Engine(backend(block_size, capacity), model(), None, max_batch_size=max_batch_size, max_length=None)


def generate(engine, prompts, n=1, max_new_tokens=3):
    results = engine.generate(prompts, GenerationConfig(n=n, max_new_tokens=max_new_tokens, ignore_eos=True))
    for request_id, (result, prompt) in enumerate(zip(results, prompts, strict=True)):
        expected = [continuation(prompt, request_id, index, max_new_tokens) for index in range(n)]
        assert [sample.token_ids for sample in result.samples] == expected
    tables = engine._backend.tables
    assert tables.num_free_blocks == tables.capacity
    return [result.stats.cached_prompt_tokens for result in results]


@pytest.fixture
def prefills(monkeypatch):
    """The tokens that each call of `prefill` computes."""
    calls, prefill = [], PagedBackend.prefill

    def counted(self, sequences):
        before = self.prefilled
        prefill(self, sequences)
        calls.append(self.prefilled - before)

    monkeypatch.setattr(PagedBackend, "prefill", counted)
    return calls


def test_a_system_prompt_is_computed_once(prefills):
    prompts = [[*HEADER, *[i] * 5] for i in range(8)]
    assert generate(paged(), prompts) == [0] + [40] * 7
    assert prefills == [45, 15, 20]  # the first of a turn, those who share, and a turn of four


def test_it_is_kept_from_one_sample_to_the_next(prefills):
    prompts = [[*HEADER, i] for i in range(4)]
    assert generate(paged(max_batch_size=1), prompts) == [0, 40, 40, 40]
    assert prefills == [41, 1, 1, 1]


def test_groups_share_what_they_have_in_common(prefills):
    prompts = [[*header, *[i] * 3] for i in range(4) for header in (HEADER, OTHER)]
    cached = [0, 18, 40, 46, 40, 46, 40, 46]
    for max_batch_size in (2, 8):
        prefills.clear()
        assert generate(paged(max_batch_size=max_batch_size), prompts) == cached
        assert sum(prefills) == sum(map(len, prompts)) - sum(cached)


def test_identical_prompts_and_beginnings_of_others(prefills):
    prompts = [HEADER, HEADER, HEADER[:30], [*HEADER, 1, 2], HEADER[:30]]
    assert generate(paged(max_batch_size=8), prompts) == [0, 40, 29, 40, 29]
    assert prefills == [40, 4]


def test_too_little_is_not_shared(prefills):
    prompts = [[*HEADER[: MIN_SHARED_TOKENS - 1], *[i] * 3] for i in range(4)]
    assert generate(paged(), prompts) == [0] * 4
    assert prefills == [72]  # in one pass, for which nobody had to wait


@pytest.mark.parametrize("length", [1, 40])
def test_samples_of_a_prompt_compute_nothing(prefills, length):
    assert generate(paged(max_batch_size=2), [HEADER[:length]], n=7) == [0]  # it was no other prompt
    assert sum(prefills) == length


def test_a_prompt_that_nobody_waits_for_is_given_back():
    engine = paged(max_batch_size=1)
    prompts = [[*header, i] for header in (HEADER, OTHER[18:]) for i in range(2)]
    config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
    schedule = Schedule(engine._backend, engine._make_requests(prompts, config, None), 1)
    slots = []
    while not schedule.finished:
        schedule.take_turn()
        slots.append(len(engine._backend.tables._tables))
    # Beside the live sample, one prompt is kept between two that share it, and goes when the second is admitted.
    assert slots == [1, 1, 1, 0, 1, 1, 1, 0]


def test_little_is_not_kept(monkeypatch):
    """While others are decoded that have almost as much in common with those that wait."""
    forked, fork = [], PagedBackend.fork
    monkeypatch.setattr(PagedBackend, "fork", lambda self, *args: forked.append(args[1]) or fork(self, *args))
    engine, requests = paged(max_batch_size=3), []
    for index in range(20):
        config = GenerationConfig(max_new_tokens=(3, 4, 5)[index] if index < 3 else 3, ignore_eos=True)
        requests += engine._make_requests([[*HEADER, index % 5, index]], config, [index])
    list(engine._decode(Schedule(engine._backend, requests, 3)))
    assert forked == [request.samples[0].sequence for request in requests[1:]]


GROUPED = st.lists(
    st.builds(
        lambda header, length, own: header[:length] + own,
        st.sampled_from([HEADER, OTHER]),
        st.integers(15, 46),
        st.lists(st.integers(0, 60), max_size=3),
    ),
    min_size=2,
    max_size=8,
)


@pytest.mark.parametrize("backend", [PagedBackend, AheadBackend])
@settings(max_examples=30)
@given(
    prompts=GROUPED,
    n=st.integers(1, 3),
    block_size=st.sampled_from([1, 4, 32]),
    spare=st.integers(0, 40),
    max_batch_size=st.integers(1, 5),
)
def test_nobody_makes_room_while_sharing_costs_a_block(backend, prompts, n, block_size, spare, max_batch_size):
    capacity = -(-70 // block_size) + 1 + -(-spare // block_size)
    engine = paged(backend, block_size, capacity, max_batch_size)
    with pytest.MonkeyPatch.context() as patch:
        preempt = Schedule._preempt

        def watched(schedule):
            tables = engine._backend.tables
            separately = sum(-(-(len(s.sequence) + 2) // block_size) for s in schedule._live)
            assert capacity - tables.num_free_blocks <= separately
            preempt(schedule)

        patch.setattr(Schedule, "_preempt", watched)
        generate(engine, prompts, n, max_new_tokens=16)


def test_a_kept_prompt_makes_room_for_another_call():
    """Whose sample the earlier call would keep waiting otherwise."""
    engine = paged(block_size=1, capacity=70, max_batch_size=1)
    config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
    requests = engine._make_requests([[*HEADER, 1], [1, 2], [*HEADER, 2]], config, None)
    schedule = Schedule(engine._backend, requests, 1)
    earlier = engine._decode(schedule)
    for _ in range(3):
        next(earlier)
    assert schedule._prefixes._kept
    assert generate_tokens(engine, OTHER) == continuation(OTHER, 0, 0, 3)
    assert not schedule._prefixes._kept
    list(earlier)
    assert [request.stats.cached_prompt_tokens for request in requests] == [0, 0, 0]


@pytest.mark.parametrize("capacity", range(50, 75, 3))
def test_no_call_waits_for_what_another_keeps(capacity, monkeypatch):
    engine, batches = paged(block_size=1, capacity=capacity, max_batch_size=2), []
    config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
    requests = engine._make_requests([[*HEADER, 1], [1, 2], [*HEADER, 2]], config, None)
    earlier = engine._decode(Schedule(engine._backend, requests, 1))
    for _ in range(3):
        next(earlier)
    step = functools.partial(PagedBackend.step, engine._backend)
    monkeypatch.setattr(engine._backend, "step", lambda group: (step(group), batches.append(len(group)))[0])
    results = engine.generate([[3] * 10, [4] * 10], GenerationConfig(max_new_tokens=3, ignore_eos=True))
    assert batches == [2, 2, 2]
    assert [result.stats.preemptions for result in results] == [0, 0]
    list(earlier)


def generate_tokens(engine, prompt):
    (result,) = engine.generate([prompt], GenerationConfig(max_new_tokens=3, ignore_eos=True))
    return result.samples[0].token_ids


def test_what_is_kept_goes_when_memory_runs_out(caplog):
    engine = paged(max_batch_size=1)
    calls = iter(range(100))

    def fail():
        if next(calls) == 6:  # the pass over what the second prompt lacks
            raise MemoryError

    engine._backend.fail = fail
    assert generate(engine, [[*HEADER, i] for i in range(4)]) == [0, 0, 0, 0]
    assert "going on with at most 1 sequences at once" in caplog.text


def test_memory_may_run_out_while_a_prompt_is_kept(caplog):
    engine = paged(max_batch_size=2)
    prompts = [[*header, i] for i in range(2) for header in (HEADER, OTHER[18:])]
    calls = iter(range(100))

    def fail():
        if next(calls) == 2:  # after a pass over two prompts and a step that ended both
            raise MemoryError

    engine._backend.fail = fail
    assert generate(engine, prompts, max_new_tokens=1) == [0, 0, 0, 0]
    assert "going on with at most 2 sequences at once" in caplog.text  # those that were being decoded fit


def test_thousands_of_waiting_prompts_do_not_slow_admission(monkeypatch):
    calls, compare = [], prefix_index.common_length
    monkeypatch.setattr(prefix_index, "common_length", lambda one, other: calls.append(1) or compare(one, other))

    def comparisons(count):
        calls.clear()
        prompts = [[*(HEADER, OTHER)[i % 2][: 16 + i % 14], i % 60, i // 60] for i in range(count)]
        generate(paged(block_size=16, capacity=5000), prompts, max_new_tokens=1)
        return len(calls) / count

    few, many = comparisons(100), comparisons(3000)
    assert many < 1.5 * few < 100


def test_many_samples_of_a_prompt_do_not_slow_admission(monkeypatch):
    calls, shared = [], prefixes._shared
    monkeypatch.setattr(prefixes, "_shared", lambda *args: calls.append(1) or shared(*args))

    def looks(n):
        calls.clear()
        generate(paged(block_size=16, capacity=5000, max_batch_size=n), [HEADER], n, max_new_tokens=1)
        return len(calls) / n

    assert looks(500) < looks(50) + 1


# --- Models and verifiers ------------------------------------------------------------------------------------------


def everything(results):
    return [[(sample.token_ids, sample.logprobs, sample.trace) for sample in result.samples] for result in results]


def bytes_per_block(kind):
    model, verifier, _ = vars(case("llama", kind)).values()
    cached = {None: [model], "head": [model], "lora": [model, model]}
    decoders = cached.get(kind, [model, getattr(verifier, "network", None)])
    return sum(block_bytes(DecoderSpec.from_model(decoder)) for decoder in decoders)


@functools.cache
def load(kind, backend="cpu", num_blocks=None, max_batch_size=3):
    model, verifier, _ = vars(case("llama", kind)).values()
    bound = None if num_blocks is None else num_blocks * bytes_per_block(kind)
    return llm2_fast.load(model, verifier, backend=backend, kv_cache_memory_bytes=bound, max_batch_size=max_batch_size)


def config(n=1, max_new_tokens=10, alpha=0.11, **options):
    if n > 1:
        options |= {"temperature": 1.0, "n": n}
    return GenerationConfig(ignore_eos=True, trace=True, max_new_tokens=max_new_tokens, alpha=alpha, **options)


@functools.cache
def alone(kind, backend, prompt, request_id, n):
    results = load(kind, backend).generate([list(prompt)], config(n), request_ids=[request_id])
    assert results[0].stats.cached_prompt_tokens == 0
    return everything(results)[0]


@needs_extension
@settings(max_examples=40)
@given(
    kind=st.sampled_from([None, *KINDS]),
    prompts=GROUPED,
    n=st.integers(1, 2),
    num_blocks=st.integers(4, 9),  # of the three that a sample may need, and one to spare
    max_batch_size=st.sampled_from([1, 3, 6]),
)
def test_bits_are_those_of_the_prompt_alone(kind, prompts, n, num_blocks, max_batch_size):
    engine = load(kind, "cpu", num_blocks, max_batch_size)
    results = engine.generate(prompts, config(n))
    assert everything(results) == [alone(kind, "cpu", tuple(p), i, n) for i, p in enumerate(prompts)]
    plan = engine._backend._plan
    for decoder in (engine._backend._llm, *(getattr(plan, name, None) for name in ("_adapted", "_verifier"))):
        assert decoder is None or (decoder.lengths, decoder._tables.num_free_blocks) == ({}, num_blocks)


PROMPTS = [[*HEADER, 1], [*OTHER, 2, 3], [*HEADER, 4, 5], OTHER, HEADER[:30], [*OTHER, 6], [*HEADER, 1], [9]]


@needs_extension
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_samples_are_preempted_and_share_again(kind):
    results = load(kind, "cpu", 5, 6).generate(PROMPTS, config(2, 14))
    assert sum(result.stats.preemptions for result in results) > 0
    assert sum(result.stats.cached_prompt_tokens for result in results) > 100
    assert everything(results) == everything(load(kind).generate(PROMPTS, config(2, 14), request_ids=range(8)))


@needs_extension
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_shared_tokens_are_computed_once(kind, monkeypatch):
    rows, pending_rows = {}, CachedDecoder.pending_rows

    def counted(self, slots, token_ids):
        rows[self] = rows.get(self, 0) + sum(map(len, token_ids))
        return pending_rows(self, slots, token_ids)

    engine = load(kind, max_batch_size=4)
    monkeypatch.setattr(CachedDecoder, "pending_rows", counted)
    results = engine.generate(PROMPTS, config(max_new_tokens=1, alpha=0.0, candidate_top_k=3))
    cached = [result.stats.cached_prompt_tokens for result in results]
    assert cached == [0, 18, 40, 45, 29, 45, 40, 0]
    expected = sum(map(len, PROMPTS)) - sum(cached)
    assert set(rows.values()) == {expected}
    assert len(rows) == (2 if kind in ("lora", "full") else 1)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_reference_chooses_the_tokens_of_the_prompt_alone(kind):
    for n in (1, 2):
        with clear_candidates():
            results = load(kind, "reference").generate(PROMPTS, config(n))
            expected = [alone(kind, "reference", tuple(p), i, n) for i, p in enumerate(PROMPTS)]
        tokens = [[token_ids for token_ids, _, _ in samples] for samples in expected]
        assert [[sample.token_ids for sample in result.samples] for result in results] == tokens
        assert sum(result.stats.cached_prompt_tokens for result in results) > 100
