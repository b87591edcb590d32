"""The engine: batching, queueing, streaming, statistics, isolation of errors, interruption."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import BatchEncoding

import llm2_fast
import tiny
from llm2_fast import ArgumentError, GenerationConfig, IncompatibleVerifierError, Llm2FastError
from llm2_fast.cache.slots import SlotCache
from llm2_fast.models.decoder import LanguageModel, Rows
from llm2_fast.sequence import Sequence
from tiny_tokenizer import tokenizer
from tolerances import TOLERANCES
from verifiers import KINDS, case, full_case, head_verifier

load = partial(llm2_fast.load, backend="reference")
generate = partial(llm2_fast.generate, backend="reference")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [20, 21, 22, 4], [30, 31], [40, 41, 42]]
NAN_TOKEN = 60


def engine(kind="head", family="llama", **options):
    model, verifier, _ = vars(case(family, kind)).values()
    return load(model, verifier, **options)


def tokens(generation):
    return [sample.token_ids for sample in generation.samples]


def model_without(token, *, nan):
    """A model that never proposes `token`, and whose logits are NaN after it if `nan`."""
    model = tiny.causal_lm("llama")
    model.lm_head.weight.data[token] = 0
    if nan:
        model.model.embed_tokens.weight.data[token] = float("nan")
    return model


# --- Batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "n": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_prompt_does_not_depend_on_its_batch(kind, sampling):
    together = engine(kind, max_batch_size=4).generate(PROMPTS, max_new_tokens=6, **sampling)
    alone = engine(kind, max_batch_size=1)
    for request_id, (prompt, expected) in enumerate(zip(PROMPTS, together, strict=True)):
        (result,) = alone.generate(prompt, max_new_tokens=6, request_ids=[request_id], **sampling)
        assert tokens(result) == tokens(expected)
        assert result.stats.candidate_histogram == expected.stats.candidate_histogram


def test_samples_differ_and_repeat_with_the_seed():
    options = {"max_new_tokens": 8, "temperature": 1.5, "n": 4}
    (first,) = engine().generate(PROMPTS[0], seed=1, **options)
    (again,) = engine().generate(PROMPTS[0], seed=1, **options)
    (other,) = engine().generate(PROMPTS[0], seed=2, **options)
    assert len({tuple(ids) for ids in tokens(first)}) > 1
    assert tokens(first) == tokens(again) != tokens(other)


def test_same_request_id_gives_the_same_samples():
    results = engine().generate([PROMPTS[0]] * 2, request_ids=[7, 7], temperature=1.0, n=2, max_new_tokens=6)
    assert tokens(results[0]) == tokens(results[1])


def test_empty_list_gives_empty_list():
    assert engine().generate([]) == []


def test_prompt_is_prefilled_once_for_all_its_samples():
    model, verifier, _ = vars(case("llama", "full")).values()
    prompt = list(range(3, 43))
    rows_of = {}
    for name, module in {"llm": model.model, "verifier": verifier.network}.items():
        rows_of[name] = []

        def count(_module, _args, kwargs, rows=rows_of[name]):
            rows.append(tuple(kwargs["input_ids"].shape))

        module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        built = load(model, verifier, max_batch_size=2)
        for rows in rows_of.values():
            rows.clear()  # of the checks made at loading
        # Six samples, two places: those admitted later still fork from the prompt's prefix.
        built.generate(prompt, n=6, temperature=1.0, max_new_tokens=4, max_candidates=8)
    finally:
        for module in (model.model, verifier.network):
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
    for shapes in rows_of.values():
        assert [shape for shape in shapes if shape[1] >= len(prompt)] == [(1, len(prompt))]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_one_forward_pass_per_model_and_step(kind):
    model, verifier, _ = vars(case("llama", kind)).values()
    built = load(model, verifier, max_batch_size=len(PROMPTS))
    calls = {"llm": 0, "verifier": 0}
    # The LoRA verifier runs inside the LLM's modules, so it is told apart by whether its hooks are in place.
    adapted = model.model.layers[0].self_attn.q_proj

    def count_llm(_module, _args):
        calls["verifier" if adapted._forward_hooks else "llm"] += 1

    def count_verifier(_module, _args):
        calls["verifier"] += 1

    handles = [model.model.register_forward_pre_hook(count_llm)]
    if kind == "full":
        handles.append(verifier.network.register_forward_pre_hook(count_verifier))
    steps = 6
    try:
        results = built.generate(PROMPTS, max_new_tokens=steps, ignore_eos=True)
    finally:
        for handle in handles:
            handle.remove()
    ambiguous = sum(result.stats.ambiguous_steps for result in results)
    assert (ambiguous > 0) == (kind is not None)
    # A prefill, then a pass per step; the joint step needs its pass to score, the others none before the first token.
    assert calls["llm"] == (1 + steps if kind == "head" else steps)
    assert calls["verifier"] <= (steps if kind in ("lora", "full") else 0)
    if kind in ("lora", "full"):
        assert calls["verifier"] > 0


# --- The cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_branch_leaks_into_the_cache(kind, family):
    model, verifier, _ = vars(case(family, kind)).values()
    backend = load(model, verifier)._backend
    config = GenerationConfig(max_new_tokens=8)
    sequences = [Sequence(i, 0, config, prompt) for i, prompt in enumerate(PROMPTS)]
    backend.prefill(sequences)
    for _ in range(8):
        for sequence, output in zip(sequences, backend.step(sequences), strict=True):
            sequence.token_ids.append(output.token_id)
    for sequence in sequences:
        cached = backend.prefix(sequence)
        length = cached[0][0].shape[1]
        # The last token is cached already if it was a branch of the joint step, else only with the next step.
        assert length == len(sequence) - (0 if kind == "head" else 1)
        fresh = SlotCache()
        slot = fresh.allocate()
        LanguageModel(model).forward(fresh, [Rows(slot, sequence.tokens_from(0)[:length])])
        for (keys, values), (fresh_keys, fresh_values) in zip(cached, fresh.prefix(slot), strict=True):
            torch.testing.assert_close(keys, fresh_keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, fresh_values, rtol=1e-4, atol=1e-5)
        backend.free(sequence)


# --- Streaming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_stream_equals_generate(kind):
    model, verifier, _ = vars(case("llama", kind)).values()
    built = load(model, verifier, tokenizer=tokenizer())
    options = {"max_new_tokens": 12, "temperature": 1.0, "n": 2, "trace": True, "stop": ["w7 w"]}
    (expected,) = built.generate(PROMPTS[0], **options)
    events = list(built.stream(PROMPTS[0], **options))
    for index, sample in enumerate(expected.samples):
        mine = [event for event in events if event.sample_index == index]
        assert [event.token_id for event in mine] == sample.token_ids
        assert [event.logprob for event in mine] == sample.logprobs
        assert [event.trace for event in mine] == sample.trace
        assert "".join(event.text for event in mine) == sample.text
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [sample.finish_reason]


def test_abandoned_stream_frees_its_slots():
    built = engine()
    stream = built.stream(PROMPTS[0], max_new_tokens=8)
    next(stream)
    stream.close()
    cache = built._backend._cache
    assert len(cache._free) == len(cache.lengths)


def test_stream_checks_its_arguments_at_the_call():
    with pytest.raises(ArgumentError, match="prompt: expected one prompt, got 2 prompts"):
        engine().stream([[1, 2], [3]])


# --- Stopping --------------------------------------------------------------------------------------------


def test_eos_ends_a_sample_and_ignore_eos_does_not():
    model = tiny.causal_lm("llama")
    (free,) = generate(model, None, PROMPTS[0], max_new_tokens=10, ignore_eos=True)
    ids = free.samples[0].token_ids
    assert free.samples[0].finish_reason == "length"
    assert len(ids) == 10
    model.generation_config.eos_token_id = [ids[4], 59]
    (ended,) = generate(model, None, PROMPTS[0], max_new_tokens=10)
    assert ended.samples[0].token_ids == ids[: ids.index(ids[4]) + 1]
    assert ended.samples[0].finish_reason == "eos"


def test_stop_string_cuts_the_text():
    model, verifier, _ = vars(case("llama", "head")).values()
    built = load(model, verifier, tokenizer=tokenizer())
    (free,) = built.generate(PROMPTS[0], max_new_tokens=10, ignore_eos=True)
    stop = free.text.split()[3]
    (stopped,) = built.generate(PROMPTS[0], max_new_tokens=10, ignore_eos=True, stop=stop)
    assert stopped.samples[0].finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.samples[0].token_ids == free.samples[0].token_ids[: len(stopped.samples[0].token_ids)]


# --- Statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_add_up(kind):
    (result,) = engine(kind).generate(PROMPTS[0], max_new_tokens=10, n=2, temperature=1.0, trace=True, max_candidates=3)
    stats, traces = result.stats, [sample.trace for sample in result.samples]
    steps = [step for trace in traces for step in trace]
    assert stats.steps == len(steps) == sum(stats.candidate_histogram.values())
    assert stats.ambiguous_steps == sum(len(step.candidate_ids) > 1 for step in steps) > 0
    assert stats.interventions == sum(step.intervention for step in steps)
    assert max(stats.candidate_histogram) == 3
    assert stats.cut_steps > 0  # this prompt has steps with more than three plausible tokens
    candidates = sum(len(step.candidate_ids) for step in steps if len(step.candidate_ids) > 1)
    if kind == "head":
        assert stats.verifier_rows == candidates
    else:  # beside the candidates, the prompt and the tokens of unambiguous steps
        assert candidates < stats.verifier_rows <= candidates + 2 * len(PROMPTS[0]) + stats.steps
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


def test_logprobs_are_those_of_the_adjusted_logits():
    (result,) = engine("full").generate(PROMPTS[0], max_new_tokens=8, temperature=0.7, trace=True)
    sample = result.samples[0]
    for logprob, step in zip(sample.logprobs, sample.trace, strict=True):
        expected = torch.tensor(step.adjusted_logits).log_softmax(-1)[step.candidate_ids.index(step.token_id)]
        assert logprob == pytest.approx(float(expected), abs=1e-6)


# --- Errors of one sequence ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "head", "full"])
def test_nan_logits_end_one_sequence_only(kind):
    clean_model, nan_model = (model_without(NAN_TOKEN, nan=nan) for nan in (False, True))
    make = {None: lambda _: None, "head": head_verifier, "full": lambda _: case("llama", "full").verifier}[kind]
    clean = load(clean_model, make(clean_model)).generate(PROMPTS, max_new_tokens=6)
    built = load(nan_model, make(nan_model))
    prompts = [*PROMPTS[:2], [4, NAN_TOKEN], *PROMPTS[2:]]
    results = built.generate(prompts, max_new_tokens=6, request_ids=[0, 1, 9, 2, 3, 4])
    (failed,) = results.pop(2).samples
    assert failed.finish_reason == "error"
    assert "logits" in failed.error
    assert failed.token_ids == []
    assert [tokens(result) for result in results] == [tokens(expected) for expected in clean]
    # The slot that held NaN is used again without harm.
    (again,) = built.generate(PROMPTS[0], max_new_tokens=6)
    assert tokens(again) == tokens(clean[0])


def test_all_minus_infinity_logits_are_an_error(monkeypatch):
    built = engine(None)
    logits = built._backend._lm.logits
    monkeypatch.setattr(built._backend._lm, "logits", lambda h: torch.full_like(logits(h), float("-inf")))
    (result,) = built.generate(PROMPTS[0], max_new_tokens=4)
    assert result.samples[0].finish_reason == "error"
    assert "finite" in result.samples[0].error


def test_nan_scores_end_one_sequence_only():
    model, _, _ = vars(case("llama", "full")).values()
    classifier = tiny.classifier("llama", num_hidden_layers=2)
    classifier.model.embed_tokens.weight.data[PROMPTS[1][0]] = float("nan")
    broken = full_case(model, classifier).verifier
    good = [PROMPTS[0], PROMPTS[3]]
    results = generate(model, broken, [good[0], PROMPTS[1], good[1]], max_new_tokens=4, backend="reference")
    clean = generate(model, case("llama", "full").verifier, good, max_new_tokens=4, backend="reference")
    (failed,) = results[1].samples
    assert failed.finish_reason == "error"
    assert "scores" in failed.error
    assert [tokens(results[0]), tokens(results[2])] == [tokens(result) for result in clean]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupt_leaves_the_engine_usable(kind):
    built = engine(kind, max_batch_size=2)
    expected = built.generate(PROMPTS, max_new_tokens=6)
    calls = 0

    def interrupt(_module, _args):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    handle = built.model.model.base_model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            built.generate(PROMPTS, max_new_tokens=6)
    finally:
        handle.remove()
    cache = built._backend._cache
    assert len(cache._free) == len(cache.lengths)
    assert [tokens(r) for r in built.generate(PROMPTS, max_new_tokens=6)] == [tokens(r) for r in expected]


def test_generation_leaves_the_model_as_it_was():
    model = tiny.causal_lm("llama")
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter = case("llama", "lora").verifier
    generate(model, adapter, PROMPTS, max_new_tokens=4)
    assert [module.training for module in model.modules()] == flags
    assert all(not module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.requires_grad
    # Gradients still flow.
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


# --- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", r"prompts\[0\]: expected at least one token, got an empty prompt"),
        ([[]], r"prompts\[0\]: expected at least one token"),
        ([[1, 2], ""], r"prompts\[1\]: expected at least one token"),
        ([1, 61], r"prompts\[0\]: expected token ids in \[0, 61\), got 61"),
        ([-1], r"prompts\[0\]: expected token ids in \[0, 61\), got -1"),
        (
            [1] * 90,
            r"prompts\[0\]: expected prompt and max_new_tokens within .* of 96 tokens, got 90 \+ 8 = 98",
        ),
        ([1] * 97, r"within the context of 96 tokens"),
        ("text", r"prompts\[0\]: expected token ids, since the model came without a tokenizer, got str"),
        (3, r"prompts: expected a string, chat messages .* got int"),
        ({"role": "user"}, r"prompts: expected a string, .* got dict"),
        (b"bytes", r"prompts: expected a string, .* got bytes"),
        (BatchEncoding({"input_ids": [[1]]}), r"prompts: expected a string, .* got BatchEncoding"),
        (torch.tensor(3), r"prompts: expected a string, .* got a zero-dimensional array"),
        ([1.5], r"prompts\[0\]: expected a string, .* got 1.5"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(ArgumentError, match=message):
        engine().generate(prompts, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, "backend: expected 'auto' or one of 'cpu', 'cuda', 'reference', got 'tpu'"),
        ({"max_batch_size": 0}, "max_batch_size: expected an integer >= 1, got 0"),
        ({"max_length": 1}, "max_length: expected an integer >= 2, got 1"),
        ({"dtype": "int3"}, "dtype: expected 'auto', .* got 'int3'"),
        ({"dtype": "bfloat16"}, "dtype: expected 'auto' or torch.float32, the loaded model's"),
        ({"device": "nowhere"}, "device: expected 'auto' or a torch device of this machine, got 'nowhere'"),
        ({"device": "meta"}, "device: expected a device that computes, got 'meta'"),
        ({"dtype": ["float32"]}, r"dtype: expected 'auto', .* got \['float32'\]"),
        ({"backend": ["cpu"]}, "backend: expected 'auto' or one of"),
        ({"tokenizer": "gpt2"}, "tokenizer: expected a transformers tokenizer or None, got 'gpt2'"),
        ({"request_ids": 5}, "request_ids: expected integers, one per prompt, got 5"),
        ({"verifier": 3}, "verifier: expected a path, a hub id, .* got int"),
        ({"temprature": 1.0}, r"option: expected one of .* got 'temprature' \(did you mean 'temperature'\?\)"),
        ({"config": {"alpha": 1}}, "config: expected a GenerationConfig or None, got dict"),
        ({"request_ids": [1, 2]}, "request_ids: expected one per prompt, 1, got 2"),
        ({"request_ids": [2**31]}, "request_ids: expected an integer >= 0 and <= 2.14748e"),
        ({"stop": "x"}, "stop: expected no stop strings, since the model came without a tokenizer"),
    ],
)
def test_bad_options(options, message):
    options = dict(options)
    with pytest.raises(ArgumentError, match=message):
        generate(tiny.causal_lm("llama"), options.pop("verifier", None), [1, 2], **options)


def test_model_of_another_type():
    with pytest.raises(ArgumentError, match=r"model: expected a path, a hub id or .*, got int"):
        load(3)


def test_unsupported_attention_is_refused():
    model = tiny.causal_lm("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArgumentError, match="model: expected attn_implementation 'eager' or 'sdpa', got 'flash"):
        load(model)


def test_rotary_frequencies_that_depend_on_the_batch_are_refused():
    model = tiny.causal_lm("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ArgumentError, match="frequencies that do not depend on the batch, got rope_type 'dynamic'"):
        load(model)


def test_window_that_the_model_ignores_is_refused():
    model = tiny.causal_lm("llama")
    model.config.sliding_window = 8  # Llama's code does not read it
    with pytest.raises(ArgumentError, match="whose cached hidden states differ"):
        load(model)


def test_running_out_of_memory_leaves_the_cache_usable(monkeypatch):
    built = engine("head")
    (expected,) = built.generate(PROMPTS[0], max_new_tokens=6)
    built = engine("head")

    def fail(*_args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SlotCache, "_resize", fail)
        with pytest.raises(MemoryError):
            built.generate(PROMPTS[0], max_new_tokens=6)
    assert tokens(built.generate(PROMPTS[0], max_new_tokens=6)[0]) == tokens(expected)


@pytest.mark.parametrize(("n", "failing"), [(1, 1), (2, 0), (2, 7)])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_running_out_of_memory_once_changes_no_token(kind, n, failing, monkeypatch, caplog):
    built = engine(kind)
    options = {"max_new_tokens": 8, "n": n, "temperature": 1.0}
    expected = [tokens(result) for result in built.generate(PROMPTS, **options)]
    passes, forward = iter(range(1000)), LanguageModel.forward

    def fail_once(*args):
        if next(passes) == failing:
            raise MemoryError
        return forward(*args)

    monkeypatch.setattr(LanguageModel, "forward", fail_once)
    assert [tokens(result) for result in built.generate(PROMPTS, **options)] == expected
    assert "out of memory: going on with at most" in caplog.text
    cache = built._backend._cache
    assert len(cache._free) == len(cache.lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_an_engine(kind):
    built = engine(kind)
    expected = [tokens(built.generate([prompt], max_new_tokens=6)[0]) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda prompt: built.generate([prompt], max_new_tokens=6)[0], PROMPTS * 3))
    assert [tokens(result) for result in results] == expected * 3


def test_model_with_other_cache_conventions_is_refused(monkeypatch):
    model = tiny.causal_lm("llama")
    forward = model.model.forward
    # Stands for an architecture that ignores the positions it is given.
    monkeypatch.setattr(model.model, "forward", lambda *a, position_ids=None, **k: forward(*a, **k))
    with pytest.raises(
        ArgumentError, match="model: expected a decoder-only model .* whose cached hidden states differ"
    ):
        load(model)


@pytest.mark.parametrize("kind", ["head"])
def test_verifier_of_another_base_is_refused(kind):
    other = tiny.causal_lm("llama", seed=9)
    with pytest.raises(IncompatibleVerifierError, match="verifier: expected a model with fingerprint .* got"):
        load(other, case("llama", kind).verifier)


def test_verifier_with_another_vocabulary_is_refused():
    with pytest.raises(IncompatibleVerifierError, match="verifier: expected a vocabulary of 71 tokens, got 61"):
        load(tiny.causal_lm("llama", vocab_size=71), case("llama", "full").verifier)


def test_every_error_is_a_package_error():
    for error in (ArgumentError("a", "b", "c"), IncompatibleVerifierError()):
        assert isinstance(error, Llm2FastError)
        assert isinstance(error, ValueError)


# --- Prompts ---------------------------------------------------------------------------------------------


def test_forms_of_prompts():
    built = load(tiny.causal_lm("llama"), tokenizer=tokenizer())
    words = built.tokenizer
    chat = [{"role": "user", "content": "w5 w6"}]
    as_text = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    as_chat = words(as_text, add_special_tokens=False)["input_ids"]
    mixed = built.generate(["w5 w6", chat, [5, 6], torch.tensor([7, 8])], max_new_tokens=2)
    assert [r.prompt_token_ids for r in mixed] == [words("w5 w6")["input_ids"], as_chat, [5, 6], [7, 8]]
    for single in ("w5 w6", chat, [5, 6], torch.tensor([5, 6])):
        assert len(built.generate(single, max_new_tokens=1)) == 1
    assert all(isinstance(r.text, str) for r in mixed)


def test_text_is_none_without_a_tokenizer():
    (result,) = engine().generate(PROMPTS[0], max_new_tokens=2)
    assert result.text is None


# --- Forks and logits for loops of one's own ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_one_prefilled_sequence_serves_every_position(backend, family):
    model = tiny.causal_lm(family)
    token_ids = [(5 * i + 3) % tiny.VOCAB for i in range(40)]  # longer than a block of the cache
    config = GenerationConfig(max_new_tokens=3, ignore_eos=True)
    parent = Sequence(0, 0, config, token_ids)
    with llm2_fast.load(model, backend=backend).exclusive_backend() as running:
        running.prefill([parent])
        forked = [Sequence(0, 0, config, token_ids[:length]) for length in range(1, 41)]
        other = Sequence(0, 0, config, [*token_ids[:20], 7, 8])  # goes on otherwise, two tokens behind the fork
        for child in forked:
            running.fork(parent, child, len(child) - 1)
        running.fork(parent, other, 20)
        with torch.no_grad():
            expected = model(torch.tensor([token_ids]), use_cache=False).logits[0]
            expected_other = model(torch.tensor([other.prompt_token_ids]), use_cache=False).logits[0, -1:]
        logits = running.logits([*forked, other])
        tolerance = TOLERANCES["decoder.logits", torch.float32]
        torch.testing.assert_close(logits, torch.cat([expected, expected_other]), **tolerance)
        for child in (forked[4], other):
            assert running.step([child])[0].token_id == int(running.logits([child]).argmax())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forks_at_a_length_are_checked(backend):
    with llm2_fast.load(tiny.causal_lm("llama"), backend=backend).exclusive_backend() as running:
        parent, child = (Sequence(0, 0, GenerationConfig(), PROMPTS[0]) for _ in range(2))
        running.prefill([parent])
        for length in (-1, 8):
            with pytest.raises(ArgumentError, match="length: expected"):
                running.fork(parent, child, length)
