"""The cpu backend against the reference, and the same bits in any batch, with any threads, recomputed or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.dlpack import to_dlpack
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma3ForConditionalGeneration

import llm2_fast
import tiny
from llm2_fast import ArgumentError, GenerationConfig, ops
from llm2_fast.backends import cached_decoder
from llm2_fast.backends.compilation import lora_updates
from llm2_fast.backends.cpu import CpuBackend
from llm2_fast.cache.slots import SlotCache
from llm2_fast.engine import _log_reference
from llm2_fast.models.decoder import Decoder, Rows
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.source import MemorySource
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.models.weights import PackedWeights
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import FullVerifier, HeadVerifier, LoraVerifier, ScoreHead
from margins import clear_candidates
from tolerances import TOLERANCES
from verifiers import KINDS, case, full_case, head_verifier, lora_case

pytestmark = [
    pytest.mark.skipif(ops.cpu_extension() is None, reason=str(ops.cpu_extension_problem())),
    pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning"),
]

PROMPTS = tiny.PROMPTS
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
ISAS = ops.cpu_extension().cpu_isas() if ops.cpu_extension() else []
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "n": 3},
    "processors": tiny.PROCESSORS,
}


def generate(backend, model, verifier, prompts=PROMPTS, *, max_batch_size=2, quantization=None, **options):
    loading = {"backend": backend, "max_batch_size": max_batch_size, "quantization": quantization}
    engine = llm2_fast.load(model, verifier, **loading)
    assert engine.backend == backend
    return engine.generate(prompts, GenerationConfig(**{"max_new_tokens": 10, "ignore_eos": True, **options}))


def assert_same(results, expected, verifier=None):
    """Tokens, candidates and statistics exactly, numbers within the tolerances of two orders of summation."""
    for result, reference in zip(results, expected, strict=True):
        stats, reference_stats = result.stats, reference.stats
        assert stats.candidate_histogram == reference_stats.candidate_histogram
        if isinstance(verifier, LoraVerifier):  # lazy in the reference, while the joint step scores every branch
            assert stats.verifier_rows == sum(n * steps for n, steps in stats.candidate_histogram.items())
        else:
            assert stats.verifier_rows == reference_stats.verifier_rows
        assert stats.interventions == reference_stats.interventions
        assert stats.cut_steps == reference_stats.cut_steps
        for sample, other in zip(result.samples, reference.samples, strict=True):
            assert sample.token_ids == other.token_ids
            tolerance = TOLERANCES["decoder.logits", torch.float32]
            torch.testing.assert_close(sample.logprobs, other.logprobs, **tolerance)
            for step, other_step in zip(sample.trace or [], other.trace or [], strict=True):
                assert step.candidate_ids == other_step.candidate_ids
                assert (step.token_id, step.system1_token_id) == (other_step.token_id, other_step.system1_token_id)
                torch.testing.assert_close(step.logprobs, other_step.logprobs, **tolerance)
                torch.testing.assert_close(step.adjusted_logits, other_step.adjusted_logits, **tolerance)
                assert (step.scores is None) == (other_step.scores is None)
                if step.scores is not None:
                    torch.testing.assert_close(
                        step.scores, other_step.scores, **TOLERANCES["verifier.score", torch.float32]
                    )


def everything(results):
    """Tokens and the exact logprobs and scores of all samples."""
    return [
        (sample.token_ids, sample.logprobs, [(step.scores, step.logprobs) for step in sample.trace])
        for result in results
        for sample in result.samples
    ]


def compare_with_reference(model, verifier, **options):
    with clear_candidates():
        expected = generate("reference", model, verifier, **options)
    assert_same(generate("cpu", model, verifier, **options), expected, verifier)


# --- The reference's tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_reference(family, kind, options):
    # Two places for up to nine samples: prompts wait, are admitted late and decoded beside others.
    model, verifier, _ = vars(case(family, kind)).values()
    compare_with_reference(model, verifier, trace=True, **options)


ROPE_SCALINGS = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 24},
}


@pytest.mark.parametrize("rope_type", ROPE_SCALINGS)
def test_rope_scalings(rope_type):
    parameters = {"rope_type": rope_type, "rope_theta": 100.0, **ROPE_SCALINGS[rope_type]}
    model = tiny.causal_lm("llama", rope_parameters=parameters)
    compare_with_reference(model, head_verifier(model), alpha=0.11)


def test_rotary_positions_of_each_type_of_layer():
    sliding = {"rope_type": "default", "rope_theta": 20.0}
    full = {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}
    parameters = {"sliding_attention": sliding, "full_attention": full}
    model = tiny.causal_lm("gemma3", rope_parameters=parameters)
    compare_with_reference(model, head_verifier(model))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"intermediate_size": 47, "vocab_size": 67}),
        ("llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}),
        ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 1}),
        ("gemma3", {"tie_word_embeddings": True, "attention_bias": True}),
        ("gemma3", {"head_dim": 6, "intermediate_size": 47, "query_pre_attn_scalar": 3}),
    ],
    ids=str,
)
def test_shapes(family, overrides):
    model = tiny.causal_lm(family, **overrides)
    compare_with_reference(model, head_verifier(model))
    compare_with_reference(model, None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_hidden_states(family, adapted, isa):
    model = tiny.causal_lm(family).to(torch.bfloat16)
    reference, updates = Decoder(model.base_model), None
    if adapted:
        loaded, verifier = LoadedModel(model, None, "tiny"), case(family, "lora").verifier
        reference, updates = verifier.scorer(loaded).decoder, lora_updates(loaded, verifier)
    extension = tiny.extension_of(isa)
    weights = PackedWeights.pack(extension, model)
    compiled = cached_decoder.CachedDecoder(
        extension, weights.decoder(updates), weights.spec, len(PROMPTS), adapted=adapted
    )
    for prompt in PROMPTS:
        slot, cache = compiled.allocate(), SlotCache()
        compiled.extend([slot], [prompt])
        (expected,) = reference.forward(cache, [Rows(cache.allocate(), chain=prompt)])
        tolerance = TOLERANCES["decoder.hidden_states", torch.bfloat16]
        torch.testing.assert_close(compiled.hidden_state(slot), expected[0, -1], **tolerance)


def test_float32_model_with_a_bfloat16_adapter():
    model, verifier, _ = vars(case("llama", "lora")).values()
    tensors = {name: tensor.bfloat16() for name, tensor in verifier._tensors.items()}
    compare_with_reference(model, LoraVerifier(verifier._config, tensors), trace=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_embeddings_are_those_of_the_model(dtype, tied):
    model = tiny.causal_lm("gemma3", tie_word_embeddings=tied).to(dtype)
    for layer in model.model.layers:  # nothing is added to the embeddings, a head reads one of their features
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    extension = ops.cpu_extension()
    weights = PackedWeights.pack(extension, model)
    decoder = cached_decoder.CachedDecoder(extension, weights.decoder(), weights.spec, num_blocks=1)
    slot = decoder.allocate()
    decoder.reserve(slot, 1)
    rows = cached_decoder.PassRows.empty()
    for token in range(tiny.VOCAB):
        rows.add(slot, token, 0, stored=False)
    for feature in (0, 17, 31):
        weight = torch.zeros(32)
        weight[feature] = 1
        head = extension.ScoreHead([0], 32, 0, None, None, to_dlpack(weight), 0.0)
        expected = model.model.embed_tokens(torch.arange(tiny.VOCAB))[:, feature].float()
        assert torch.equal(decoder.forward(rows, head), expected)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_text_of_a_model_that_can_see_images(kind):
    model = tiny.plausible(tiny.randomize(AutoModelForCausalLM.from_config(tiny.image_text_config()), seed=0))
    assert type(model) is Gemma3ForConditionalGeneration
    if kind is None:
        verifier = None
    elif kind == "head":
        verifier = head_verifier(model)
    elif kind == "lora":
        verifier = lora_case(model).verifier
    else:
        classifier = AutoModelForSequenceClassification.from_config(tiny.image_text_config(num_labels=1))
        verifier = full_case(model, tiny.randomize(classifier, seed=1)).verifier
    compare_with_reference(model, verifier, trace=True)


def test_head_with_a_hidden_layer_over_two_layers():
    model = tiny.causal_lm("llama")
    torch.manual_seed(3)
    head = ScoreHead(32, layers=(0, -1), mlp_size=8)
    verifier = HeadVerifier(head, base_name="tiny", base_fingerprint=fingerprint(model))
    compare_with_reference(model, verifier, beta=4.0, trace=True)


def test_prompts_longer_than_a_pass_and_a_lazy_verifier_that_catches_up():
    model = tiny.causal_lm("qwen2", max_position_embeddings=512)
    classifier = tiny.classifier("mistral", max_position_embeddings=512)
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    prompts = [[(7 * i + start) % tiny.VOCAB for i in range(size)] for start, size in ((0, 300), (5, 31), (6, 33))]
    compare_with_reference(model, verifier, prompts=prompts, n=2, temperature=1.0)


def test_ids_beyond_the_verifiers_vocabulary_are_no_candidates():
    model = tiny.causal_lm("llama", vocab_size=80)
    classifier = tiny.classifier("llama")
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    verifier.check_compatible = lambda model: None  # as with padded vocabularies of one tokenizer
    plain = generate("cpu", model, None)
    assert any(max(result.samples[0].token_ids) >= tiny.VOCAB for result in plain)
    compare_with_reference(model, verifier, alpha=0.01, trace=True)


@pytest.mark.parametrize("kind", [None, "head"])
def test_a_row_without_usable_logits_ends_alone(kind):
    model = tiny.causal_lm("llama")
    verifier = None if kind is None else head_verifier(model)
    model.lm_head.weight.data[60] = 0  # never proposed
    model.model.embed_tokens.weight.data[60] = float("nan")
    if verifier is not None:
        verifier.base_fingerprint = fingerprint(model)
    bad, good = generate("cpu", model, verifier, [[5, 60], [3, 4]])
    assert (bad.samples[0].finish_reason, bad.samples[0].token_ids) == ("error", [])
    assert "logits" in bad.samples[0].error
    (expected,) = generate("reference", model, verifier, [[3, 4]])
    assert_same([good], [expected])


# --- The same bits -------------------------------------------------------------------------------------------------


@pytest.fixture
def divide_small_models(monkeypatch):
    """Threads share even tiny layers."""
    monkeypatch.setattr(cached_decoder, "MIN_SHARED_WEIGHTS", 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_bits_depend_neither_on_the_batch_nor_on_threads(kind, dtype, quantization, divide_small_models):
    model, verifier, _ = vars(case("llama", kind)).values()
    if dtype == torch.bfloat16:
        model = tiny.causal_lm("llama").to(dtype)
        if isinstance(verifier, FullVerifier):
            verifier = FullVerifier(tiny.classifier("llama").base_model.to(dtype), verifier.head.weight.data)
    options = {"temperature": 1.0, "n": 2, "trace": True, "quantization": quantization}
    expected = everything(generate("cpu", model, verifier, max_batch_size=6, **options))
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        assert everything(generate("cpu", model, verifier, max_batch_size=4, **options)) == expected
    engine = llm2_fast.load(model, verifier, backend="cpu", max_batch_size=1, quantization=options.pop("quantization"))
    alone = [
        engine.generate([prompt], GenerationConfig(max_new_tokens=10, ignore_eos=True, **options), request_ids=[i])[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert everything(alone) == expected


# Two are longer than a pass over prompts. In twelve blocks the samples of the first have no room to go on together.
LONG_PROMPTS = [[(7 * i + size) % tiny.VOCAB for i in range(size)] for size in (300, 270, 9)]
TIGHT_BLOCKS = 12


@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.bfloat16, None), (torch.float32, "int8")], ids=["bfloat16", "int8"]
)
@pytest.mark.parametrize(("family", "shape"), [("gemma3", {"sliding_window": 40}), ("qwen3", {})])
def test_bits_of_long_prompts_depend_on_nothing_else(family, shape, dtype, quantization, divide_small_models):
    model = tiny.causal_lm(family, max_position_embeddings=512, **shape).to(dtype)
    verifier, bound = head_verifier(model), TIGHT_BLOCKS * cached_decoder.block_bytes(DecoderSpec.from_model(model))

    def run(num_threads, max_batch_size, kv_cache_memory_bytes=None):
        torch.set_num_threads(num_threads)
        options = {"max_batch_size": max_batch_size, "kv_cache_memory_bytes": kv_cache_memory_bytes}
        engine = llm2_fast.load(model, verifier, backend="cpu", quantization=quantization, **options)
        sampling = {"temperature": 1.0, "n": 2, "trace": True}
        return engine.generate(LONG_PROMPTS, GenerationConfig(max_new_tokens=24, ignore_eos=True, **sampling))

    expected = everything(run(1, 6))
    for num_threads, max_batch_size in ((3, 6), (1, 1), (3, 1)):
        assert everything(run(num_threads, max_batch_size)) == expected
    for num_threads in (1, 3):
        preempted = run(num_threads, 4, bound)
        assert sum(result.stats.preemptions for result in preempted) > 0
        assert everything(preempted) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_lora_do_not_depend_on_whether_the_twins_run_first(dtype):
    # 8 candidates: of one sequence they are one pass with their twins, of three the LLM runs for the chosen ones alone.
    model, verifier, _ = vars(case("llama", "lora")).values()
    if dtype == torch.bfloat16:
        model = tiny.causal_lm("llama").to(dtype)
    options = {"alpha": 0.0, "candidate_top_k": 8, "trace": True}
    together, alone = (generate("cpu", model, verifier, max_batch_size=size, **options) for size in (3, 1))
    assert all(result.stats.candidate_histogram == {8: 10} for result in alone)
    assert everything(together) == everything(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, "head"])  # the LLM's cache with lora and full is that of plain decoding
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_bitwise_that_of_a_fresh_prefill(kind, family, dtype):
    model, verifier, _ = vars(case(family, kind)).values()
    if dtype == torch.bfloat16:
        model = tiny.causal_lm(family).to(dtype)
    backend = llm2_fast.load(model, verifier, backend="cpu")._backend
    config = GenerationConfig(max_new_tokens=40)
    sequences = [Sequence(i, 0, config, prompt) for i, prompt in enumerate(PROMPTS)]
    backend.prefill(sequences)
    for _ in range(40):  # beyond the first block
        for sequence, output in zip(sequences, backend.step(sequences), strict=True):
            sequence.token_ids.append(output.token_id)
    for sequence in sequences:
        cached = backend.prefix(sequence)
        length = cached[0][0].shape[1]
        # The last token is cached already if it was a branch of the joint step, else only with the next step.
        assert length == len(sequence) - (kind != "head")
        fresh = Sequence(9, 0, config, sequence.tokens_from(0)[:length])
        backend.prefill([fresh])
        for (keys, values), (fresh_keys, fresh_values) in zip(cached, backend.prefix(fresh), strict=True):
            assert torch.equal(keys, fresh_keys)
            assert torch.equal(values, fresh_values)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_tier_gives_the_references_tokens(isa, quantization, monkeypatch):
    extension = tiny.extension_of(isa)
    monkeypatch.setattr(ops, "cpu_extension", lambda: extension)
    for family, kind in (("qwen3", None), ("qwen3", "head"), ("gemma3", "head")):
        model, verifier, _ = vars(case(family, kind)).values()
        if quantization is None:
            compare_with_reference(model, verifier)
        else:
            compare_with_rounded_reference(model, verifier, quantization)


def test_all_slots_come_back():
    engine = llm2_fast.load(*list(vars(case("llama", "full")).values())[:2], backend="cpu", max_batch_size=2)
    for _ in range(3):
        engine.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=4)
    plan = engine._backend._plan
    for decoder in (engine._backend._llm, plan._verifier):
        assert decoder.lengths == {}
        assert decoder._tables.num_slots <= 2 + len(PROMPTS) + 1
    assert plan._twins._slots == {}


# --- int8 weights --------------------------------------------------------------------------------------------------


def compare_with_rounded_reference(model, verifier, quantization, **options):
    """Against the reference with models whose weights are what int8 keeps of them."""
    results = generate("cpu", model, verifier, quantization=quantization, **options)
    rounding = Quantization.from_name(quantization)
    rounded = tiny.rounded(model, rounding)
    verifier = copy.copy(verifier)
    if isinstance(verifier, FullVerifier):
        verifier = FullVerifier(tiny.rounded(verifier.network, rounding), verifier.head.weight.data)
    elif verifier is not None:
        verifier.base_fingerprint = fingerprint(rounded)
    with clear_candidates():
        expected = generate("reference", rounded, verifier, **options)
    assert_same(results, expected, verifier)


@pytest.mark.parametrize("quantization", ["int8", "int8-channel"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_tokens_equal_the_reference_with_rounded_weights(family, kind, quantization):
    model, verifier, _ = vars(case(family, kind)).values()
    compare_with_rounded_reference(model, verifier, quantization, trace=True, alpha=0.11)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"intermediate_size": 47, "vocab_size": 67}),
        ("llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}),
        ("gemma3", {"tie_word_embeddings": True, "attention_bias": True}),
    ],
    ids=str,
)
def test_int8_shapes(family, overrides):
    model = tiny.causal_lm(family, **overrides)
    compare_with_rounded_reference(model, head_verifier(model), "int8")
    compare_with_rounded_reference(model, None, "int8-channel")


def test_int8_weights_are_others():
    model = tiny.causal_lm("llama")
    steps = [
        generate("cpu", model, None, quantization=name, trace=True)[0].samples[0].logprobs
        for name in (None, "int8", "int8-channel")
    ]
    assert len({tuple(logprobs) for logprobs in steps}) == 3


def test_generate_takes_a_quantization():
    model, options = tiny.causal_lm("llama"), {"max_new_tokens": 10, "ignore_eos": True}
    (result,) = llm2_fast.generate(model, None, PROMPTS[0], quantization="int8", **options)
    (expected,) = generate("cpu", model, None, [PROMPTS[0]], quantization="int8")
    assert result.samples[0].logprobs == expected.samples[0].logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_check_knows_the_quantization(dtype):
    model, extension = tiny.causal_lm("llama").to(dtype), ops.cpu_extension()
    weights = PackedWeights.pack(extension, model, Quantization(None))
    decoder = cached_decoder.CachedDecoder(extension, weights.decoder(), weights.spec, num_blocks=1)
    source = MemorySource(model)
    with source.running(Quantization(None)) as running:
        decoder.check(running)
    if dtype == torch.float32:  # what bfloat16 rounds after every op is more than int8 loses here
        for other in (None, Quantization(32)):
            with (
                pytest.raises(ArgumentError, match="layers that compute what their type says"),
                source.running(other) as running,
            ):
                decoder.check(running)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_needs_finite_weights(bad):
    model = tiny.causal_lm("llama")
    model.model.layers[1].mlp.up_proj.weight.data[5, 7] = bad
    with pytest.raises(ArgumentError, match=r"model: expected finite weights .* layers\.1\.mlp\.up_proj\.weight"):
        llm2_fast.load(model, quantization="int8")
    classifier = tiny.classifier("llama")
    classifier.model.layers[0].self_attn.o_proj.weight.data[0, 0] = bad
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    with pytest.raises(ArgumentError, match=r"model: expected finite weights .* layers\.0\.self_attn\.o_proj\.weight"):
        llm2_fast.load(tiny.causal_lm("llama"), verifier, quantization="int8")


# --- The choice ----------------------------------------------------------------------------------------------------


def test_auto_is_cpu_where_that_is_supported(caplog):
    assert llm2_fast.load(tiny.causal_lm("qwen3")).backend == "cpu"
    assert caplog.records == []


def test_auto_says_once_why_it_is_not_cpu(caplog):
    _log_reference.cache_clear()
    for _ in range(2):
        assert llm2_fast.load(tiny.causal_lm("gpt2")).backend == "reference"
    (record,) = caplog.records
    assert "'reference'" in record.getMessage()
    assert "GPT2Model" in record.getMessage()


# --- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.causal_lm("gpt2"), "GPT2Model"),
        (lambda: tiny.causal_lm("llama").half(), "float16"),
        (lambda: tiny.causal_lm("llama", hidden_act="gelu"), "activation 'silu' or 'gelu_pytorch_tanh'"),
        (lambda: tiny.causal_lm("gemma3", final_logit_softcapping=30.0), "no final_logit_softcapping"),
        (lambda: tiny.causal_lm("gemma3", attn_logit_softcapping=50.0), "no attn_logit_softcapping"),
        (lambda: tiny.causal_lm("gemma3", use_bidirectional_attention=True), "causal attention"),
        (
            lambda: tiny.causal_lm(
                "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
            ),
            "rope_type",
        ),
    ],
    ids=["gpt2", "float16", "gelu", "capped-logits", "capped-attention", "bidirectional", "dynamic"],
)
def test_what_is_not_supported_is_refused_by_name(model, message):
    with pytest.raises(ArgumentError, match=f"backend: expected .*{message}"):
        llm2_fast.load(model(), backend="cpu")


def test_int8_is_refused_by_name_where_the_cpu_backend_does_not_run():
    with pytest.raises(ArgumentError, match="quantization: expected None with backend 'reference', .* got int8"):
        llm2_fast.load("no such model", backend="reference", quantization="int8")
    with pytest.raises(ArgumentError, match="quantization: expected None, since .* GPT2Model.*, got int8"):
        llm2_fast.load(tiny.causal_lm("gpt2"), quantization="int8")
    with pytest.raises(ArgumentError, match="backend: expected .* GPT2Model"):
        llm2_fast.load(tiny.causal_lm("gpt2"), backend="cpu", quantization="int8")
    with pytest.raises(ArgumentError, match="quantization: expected None or one of 'int8', .* got 'int4'"):
        llm2_fast.load("no such model", quantization="int4")


def test_an_adapted_model_is_refused_by_name():
    model = tiny.causal_lm("llama")
    layer = model.model.layers[1].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)
    assert "layers.1.self_attn.q_proj" in CpuBackend.unsupported(LoadedModel(model, None, "tiny"), None)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_patched_model_is_refused(quantization):
    model = tiny.causal_lm("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))
    with pytest.raises(ArgumentError, match="model: expected layers that compute what their type says"):
        llm2_fast.load(model, backend="cpu", quantization=quantization)


def test_an_unsupported_verifier_is_refused_by_name():
    classifier = tiny.classifier("gpt2")
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    with pytest.raises(ArgumentError, match="GPT2Model"):
        llm2_fast.load(tiny.causal_lm("llama"), verifier, backend="cpu")


def decoder_and_cache(num_slots=2, num_blocks=3, block_size=4):
    extension = ops.cpu_extension()
    weights = PackedWeights.pack(extension, tiny.causal_lm("llama"))
    storage = [torch.zeros(3, num_blocks, 2, block_size, 8) for _ in range(2)]
    table = torch.tensor([[0, 1], [2, 99]], dtype=torch.int32)[:num_slots]
    cache = extension.PagedCache(*map(to_dlpack, (*storage, table, torch.zeros(num_slots, 32))))
    return weights.decoder(), cache


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([61], [0], [0], [1]), r"token_ids: expected indices in \[0, 61\), got 61"),
        (([-1], [0], [0], [1]), "token_ids: expected indices"),
        (([1], [2], [0], [1]), r"slots: expected indices in \[0, 2\), got 2"),
        (([1], [0], [8], [1]), r"positions: expected indices in \[0, 8\), got 8"),
        (([1], [0], [-1], [1]), "positions: expected >= 0, got -1"),
        (([1], [1], [4], [1]), r"block_table: expected indices in \[0, 3\), got 99"),
        (([1, 2], [0], [0], [1]), "size of slots: expected 2, got 1"),
        (([1], [0], [0, 1], [1]), "size of positions: expected 1, got 2"),
        (([1], [0], [0], []), "size of stored: expected 1, got 0"),
    ],
)
def test_bad_rows_are_refused_by_name(rows, message):
    decoder, cache = decoder_and_cache()
    with pytest.raises(ValueError, match=message):
        decoder.forward(cache, *rows, False, None, None, 1)


def test_a_cache_of_another_shape_and_rows_of_no_pass_are_refused():
    decoder, cache = decoder_and_cache()
    with pytest.raises(ValueError, match="row: expected indices"):
        decoder.keep_row(cache, 0)
    extension = ops.cpu_extension()
    storage = [torch.zeros(2, 3, 2, 4, 8) for _ in range(2)]
    other = extension.PagedCache(*map(to_dlpack, (*storage, torch.zeros(1, 1).int(), torch.zeros(1, 32))))
    with pytest.raises(ValueError, match="keys: expected shape"):
        decoder.forward(other, [1], [0], [0], [1], False, None, None, 1)
