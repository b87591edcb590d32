"""The cpu backend in little memory: the same bits as with plenty, nothing left behind, and clear refusals."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm2_fast
import tiny
from llm2_fast import ArgumentError, GenerationConfig, ops
from llm2_fast.backends import cache_budget
from llm2_fast.backends.cached_decoder import BLOCK_SIZE, CachedDecoder, block_bytes
from llm2_fast.models.spec import DecoderSpec
from tiny_tokenizer import tokenizer
from verifiers import KINDS, case

pytestmark = [
    pytest.mark.skipif(ops.cpu_extension() is None, reason=str(ops.cpu_extension_problem())),
    pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning"),
]

# Of zero to two blocks, with new tokens up to three.
PROMPTS = [[(7 * i + size) % tiny.VOCAB for i in range(size)] for size in (40, 1, 33, 5, 31, 20)]
SAMPLING = {"greedy": {}, "sampled": {"temperature": 1.0, "n": 3}}
SMALLEST = 4  # blocks: the three of the longest sample and one to spare


def bytes_per_block(kind):
    """Of the LLM's cache, and of the verifier's if it has one."""
    model, verifier, _ = vars(case("llama", kind)).values()
    cached = {None: [model], "head": [model], "lora": [model, model]}
    decoders = cached.get(kind, [model, getattr(verifier, "network", None)])
    return sum(block_bytes(DecoderSpec.from_model(decoder)) for decoder in decoders)


def load(kind, num_blocks=None, max_batch_size=4, **options):
    model, verifier, _ = vars(case("llama", kind)).values()
    bound = None if num_blocks is None else num_blocks * bytes_per_block(kind)
    return llm2_fast.load(
        model, verifier, backend="cpu", max_batch_size=max_batch_size, kv_cache_memory_bytes=bound, **options
    )


def config(**options):
    return GenerationConfig(**{"max_new_tokens": 45, "ignore_eos": True, "trace": True, **options})


def decoders(engine):
    plan = engine._backend._plan
    verifiers = [getattr(plan, name) for name in ("_adapted", "_verifier") if hasattr(plan, name)]
    return [engine._backend._llm, *verifiers]


def assert_all_free(engine):
    for decoder in decoders(engine):
        assert decoder.lengths == {}
        assert decoder._tables.num_free_blocks == decoder._tables.capacity


def everything(results):
    """Tokens, numbers and counts, apart from times and what recomputation adds."""
    stats = [(r.stats.steps, r.stats.interventions, r.stats.cut_steps, r.stats.candidate_histogram) for r in results]
    return stats, [[(sample.token_ids, sample.logprobs, sample.trace) for sample in r.samples] for r in results]


@functools.cache
def unbounded(kind, sampling, max_new_tokens=45):
    return everything(load(kind).generate(PROMPTS, config(max_new_tokens=max_new_tokens, **SAMPLING[sampling])))


# --- The same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_preempted_samples_are_bitwise_the_same(kind, sampling):
    for num_blocks in (SMALLEST, 7):
        engine = load(kind, num_blocks)
        results = engine.generate(PROMPTS, config(**SAMPLING[sampling]))
        assert everything(results) == unbounded(kind, sampling)
        assert sum(result.stats.preemptions for result in results) > 0
        assert_all_free(engine)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from([None, *KINDS]),
    sampling=st.sampled_from(list(SAMPLING)),
    max_new_tokens=st.sampled_from([1, 14, 34]),
    num_blocks=st.integers(SMALLEST, 16),
    max_batch_size=st.integers(1, 7),
)
def test_any_bound_gives_the_same_bits(kind, sampling, max_new_tokens, num_blocks, max_batch_size):
    engine = load(kind, num_blocks, max_batch_size)
    results = engine.generate(PROMPTS, config(max_new_tokens=max_new_tokens, **SAMPLING[sampling]))
    assert everything(results) == unbounded(kind, sampling, max_new_tokens)
    assert_all_free(engine)


@pytest.mark.parametrize("kind", ["head", "full"])
def test_streams_go_on_after_they_made_room(kind):
    options = config(temperature=1.0, n=3, stop=["w7 w"])
    (expected,) = load(kind, tokenizer=tokenizer()).generate([PROMPTS[0]], options)
    engine = load(kind, SMALLEST + 1, tokenizer=tokenizer())
    events = []
    for event in engine.stream(PROMPTS[0], options):
        events.append(event)
        if len(events) % 20 == 1:
            engine.generate(PROMPTS[2], max_new_tokens=40)  # needs what the stream holds
    for index, sample in enumerate(expected.samples):
        mine = [event for event in events if event.sample_index == index]
        assert [(event.token_id, event.logprob, event.trace) for event in mine] == [
            *zip(sample.token_ids, sample.logprobs, sample.trace, strict=True)
        ]
        assert "".join(event.text for event in mine) == sample.text
    assert_all_free(engine)


def test_recomputation_is_counted():
    (without,) = load("full").generate([PROMPTS[0]], config(temperature=1.0, n=3))
    (result,) = load("full", SMALLEST).generate([PROMPTS[0]], config(temperature=1.0, n=3))
    assert without.stats.preemptions == 0 < result.stats.preemptions
    assert result.stats.verifier_rows > without.stats.verifier_rows
    assert result.stats.prefill_seconds > 0 < result.stats.decode_seconds


# --- Failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "full"])
@pytest.mark.parametrize("failing", [0, 1, 3, 30])
def test_running_out_of_memory_in_a_pass_loses_nothing(kind, failing, caplog):
    engine = load(kind)
    passes = iter(range(10**6))

    def run_out(name, run):
        def method(*args):
            if next(passes) == failing:
                raise MemoryError
            return run(*args)

        return name, method

    for decoder in decoders(engine):
        methods = ("forward", "joint_step", "propose")
        decoder.decoder = Overridden(decoder.decoder, dict(run_out(m, getattr(decoder.decoder, m)) for m in methods))
    results = engine.generate(PROMPTS, config(**SAMPLING["sampled"]))
    assert everything(results) == unbounded(kind, "sampled")
    assert "out of memory: going on with at most" in caplog.text
    assert_all_free(engine)


class Overridden:
    """An object with some other methods."""

    def __init__(self, wrapped, methods):
        self._wrapped, self._methods = wrapped, methods

    def __getattr__(self, name):
        return self._methods[name] if name in self._methods else getattr(self._wrapped, name)


@pytest.mark.parametrize("kind", [None, "full"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_call_leaves_nothing_behind(kind, error):
    engine = load(kind, SMALLEST)
    stream = engine.stream(PROMPTS[0], config(**SAMPLING["sampled"]))
    for _ in range(60):
        next(stream)
    engine._backend._plan.step = raise_(error)
    with pytest.raises(error):
        list(stream)
    assert_all_free(engine)
    del engine._backend._plan.step
    assert everything(engine.generate(PROMPTS, config())) == unbounded(kind, "greedy")


def raise_(error):
    def raising(*_args):
        raise error

    return raising


# --- Long prompts --------------------------------------------------------------------------------------------------


def test_prompts_are_packed_into_passes_of_bounded_size(monkeypatch):
    passes, forward = [], CachedDecoder.forward
    model = tiny.causal_lm("llama", max_position_embeddings=1024)
    engine = llm2_fast.load(model, backend="cpu")

    def counted(self, rows, *args):
        passes.append(len(rows))
        return forward(self, rows, *args)

    monkeypatch.setattr(CachedDecoder, "forward", counted)
    prompts = [[3] * 700, [4] * 5, [5] * 100]
    together = engine.generate(prompts, max_new_tokens=3)
    assert passes == [256, 256, 256, 37]
    alone = [engine.generate(prompt, max_new_tokens=3)[0] for prompt in prompts]
    assert [result.samples for result in together] == [result.samples for result in alone]


# --- The bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_can_never_fit_is_refused_before_any_work(kind):
    engine = load(kind, 3)
    need, bound = 4 * bytes_per_block(kind), 3 * bytes_per_block(kind)
    message = rf"kv_cache_memory_bytes: expected at least {need}, for the 65 tokens of prompts\[1\] .*, got {bound}"
    for call in (engine.generate, lambda prompts, **options: engine.generate(prompts, n=2, **options)):
        with pytest.raises(ArgumentError, match=message):
            call([[1], [2] * 20], max_new_tokens=45)
    with pytest.raises(ArgumentError, match=r"kv_cache_memory_bytes: .* the 65 tokens of prompts\[0\]"):
        engine.stream([2] * 20, max_new_tokens=45)
    assert_all_free(engine)
    (result,) = engine.generate([2] * 20, max_new_tokens=44, ignore_eos=True, n=2)
    assert [len(sample.token_ids) for sample in result.samples] == [44, 44]


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (0, "kv_cache_memory_bytes: expected an integer >= 1, got 0"),
        ("4G", "kv_cache_memory_bytes: expected an integer >= 1, got '4G'"),
        (5000, f"kv_cache_memory_bytes: expected at least 24576, for the {BLOCK_SIZE} tokens of a block, got 5000"),
        (1 << 60, "kv_cache_memory_bytes: expected no more than this machine can provide, got "),
    ],
)
def test_bad_bounds_are_refused_at_loading(bound, message):
    with pytest.raises(ArgumentError, match=message):
        llm2_fast.load(tiny.causal_lm("llama"), backend="cpu", kv_cache_memory_bytes=bound)


def test_the_reference_refuses_a_bound_by_name():
    with pytest.raises(ArgumentError, match="kv_cache_memory_bytes: expected None with the reference backend, .* 9999"):
        llm2_fast.load(tiny.causal_lm("llama"), backend="reference", kv_cache_memory_bytes=9999)


def test_the_bound_covers_all_caches():
    for kind in (None, *KINDS):
        engine = load(kind, 9)
        stored = sum(tensor.nbytes for d in decoders(engine) for tensor in (d._keys, d._values))
        assert stored == 9 * bytes_per_block(kind)


@pytest.mark.parametrize(("limit", "expected"), [("4096\n", 2048), ("max\n", None), (None, None)])
def test_half_of_the_memory_is_the_default(limit, expected, tmp_path, monkeypatch):
    path = tmp_path / "memory.max"
    if limit is not None:
        path.write_text(limit)
    monkeypatch.setattr(cache_budget, "_CONTAINER_LIMIT", path)
    monkeypatch.setattr(cache_budget, "block_bytes", lambda spec: 1)
    budget = cache_budget.CacheBudget([None], None)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert budget.num_blocks == (machine // 2 if expected is None else expected)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_that_nothing_was_written_to_is_not_used():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        before = resident_bytes()
        engine = llm2_fast.load(tiny.causal_lm("llama"), backend="cpu", kv_cache_memory_bytes=1 << 30)
        assert resident_bytes() - before < 1 << 28
        engine.generate([5, 6, 7], max_new_tokens=3)
    finally:
        torch.use_deterministic_algorithms(False)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
