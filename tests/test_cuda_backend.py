"""The cuda backend against the reference: small models, few tokens, one path each.

In Triton's interpreter, or with TRITON_INTERPRET=0 on a GPU; the reference runs on the CPU.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import llm2_fast
import tiny
from llm2_fast import ArgumentError, GenerationConfig, prefixes
from llm2_fast.backends import cache_budget, cached_decoder, cuda_decoder
from llm2_fast.backends.report import Report
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import FullVerifier, LoraVerifier
from margins import clear_candidates
from tolerances import TOLERANCES
from triton_device import DEVICE, INTERPRETED
from verifiers import full_case, head_verifier, lora_case

pytestmark = [
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning"),
]

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
PROMPTS = [[5, 6, 7, 8, 9, 10], [3]]
MEMORY = 1 << 20


def make(family: str, kind: str | None, **shape):
    """A model of two layers and a verifier of a kind; of Gemma-3 a layer of each type."""
    types = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    model = tiny.causal_lm(family, **SHAPE | shape, **types)
    if kind == "head":
        return model, head_verifier(model)
    if kind == "lora":
        return model, lora_case(model).verifier
    if kind in ("full", "always"):
        classifier = tiny.classifier("llama", **SHAPE | {"num_hidden_layers": 1})
        return model, full_case(model, classifier).verifier
    return model, None


def load(model, verifier, kind=None, backend="cuda", max_batch_size=2, memory=MEMORY):
    if backend == "reference":
        return llm2_fast.load(model, verifier, backend=backend, max_batch_size=max_batch_size)
    if not INTERPRETED:
        model, verifier = copy.deepcopy(model).to(DEVICE), copy.deepcopy(verifier)
        if isinstance(verifier, FullVerifier):
            verifier = FullVerifier(verifier.network.to(DEVICE), verifier.head.weight.data)
    options = {"max_batch_size": max_batch_size, "kv_cache_memory_bytes": memory, "always_verify": kind == "always"}
    return llm2_fast.load(model, verifier, backend=backend, **options)


def config(**options):
    return GenerationConfig(
        **{"max_new_tokens": 3, "ignore_eos": True, "max_candidates": 4, "trace": True, "alpha": 0.11, **options}
    )


def assert_same(results, expected, verifier=None, kind=None):
    for result, reference in zip(results, expected, strict=True):
        stats, others = result.stats, reference.stats
        assert stats.candidate_histogram == others.candidate_histogram
        assert (stats.interventions, stats.cut_steps) == (others.interventions, others.cut_steps)
        if isinstance(verifier, LoraVerifier) or kind == "always":  # every branch is scored
            assert stats.verifier_rows == sum(n * steps for n, steps in stats.candidate_histogram.items())
        else:
            assert stats.verifier_rows == others.verifier_rows
        for sample, other in zip(result.samples, reference.samples, strict=True):
            assert sample.token_ids == other.token_ids
            tolerance = TOLERANCES["decoder.logits", torch.float32]
            torch.testing.assert_close(sample.logprobs, other.logprobs, **tolerance)
            for step, other_step in zip(sample.trace, other.trace, strict=True):
                assert step.candidate_ids == other_step.candidate_ids
                assert (step.token_id, step.system1_token_id) == (other_step.token_id, other_step.system1_token_id)
                torch.testing.assert_close(step.logprobs, other_step.logprobs, **tolerance)
                torch.testing.assert_close(step.adjusted_logits, other_step.adjusted_logits, **tolerance)
                assert (step.scores is None) == (other_step.scores is None)
                if step.scores is not None:
                    tolerance_of_scores = TOLERANCES["verifier.score", torch.float32]
                    torch.testing.assert_close(step.scores, other_step.scores, **tolerance_of_scores)


PROCESSORS = {**tiny.PROCESSORS, "max_candidates": 3}
CASES = [
    ("llama", None, {}),
    ("qwen2", None, PROCESSORS),
    ("gemma3", "head", {}),
    ("qwen3", "head", {"temperature": 1.0, "n": 3, "max_new_tokens": 2}),
    ("llama", "head", PROCESSORS),
    ("llama", "lora", {}),
    ("llama", "full", {}),
    ("llama", "always", {}),
]


@pytest.mark.parametrize(("family", "kind", "options"), CASES, ids=lambda value: str(value)[:24])
def test_tokens_equal_the_reference(family, kind, options):
    model, verifier = make(family, kind)
    with clear_candidates():
        expected = load(model, verifier, backend="reference").generate(PROMPTS, config(**options))
    assert_same(load(model, verifier, kind).generate(PROMPTS, config(**options)), expected, verifier, kind)


def everything(results):
    return [
        (sample.token_ids, sample.logprobs, [(step.scores, step.logprobs) for step in sample.trace])
        for result in results
        for sample in result.samples
    ]


def test_bits_depend_neither_on_the_batch_nor_on_recomputation():
    model, verifier = make("llama", "head")
    engine = load(model, verifier)
    together = everything(engine.generate(PROMPTS, config()))
    assert everything(engine.generate([PROMPTS[1]], config(), request_ids=[1])) == together[1:]
    backend = engine._backend
    sequence = Sequence(0, 0, config(), PROMPTS[0])
    backend.prefill([sequence])
    for token in together[0][0][:2]:
        (output,) = backend.step([sequence])
        assert output.token_id == token
        sequence.token_ids.append(token)
    cached = [tuple(x.clone() for x in layer) for layer in backend.prefix(sequence)]
    backend.free(sequence)  # as when it is preempted
    backend.prefill([sequence])
    for layer, again in zip(cached, backend.prefix(sequence), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(layer, again, strict=True))
    (output,) = backend.step([sequence])
    assert (output.token_id, output.logprob) == (together[0][0][2], together[0][1][2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype):
    """Against transformers in float32, on the same weights, along the same tokens: hidden states and candidates."""
    model, verifier = make("llama", "head")
    model, verifier.base_fingerprint = model.to(dtype), fingerprint(model)
    engine = load(model, verifier)
    assert engine._backend._llm.key_cache.dtype == dtype
    (result,) = engine.generate(PROMPTS[0], config())
    tokens = PROMPTS[0] + result.samples[0].token_ids
    with torch.no_grad():
        expected = model.float()(torch.tensor([tokens]), output_hidden_states=True)
    tolerance = TOLERANCES["decoder.hidden_states", dtype]
    hidden_states = engine._backend._llm.last_hidden_state(tokens).float().cpu()
    torch.testing.assert_close(hidden_states, expected.hidden_states[-1][0, -1], **tolerance)
    for step, logits in zip(result.samples[0].trace, expected.logits[0, len(PROMPTS[0]) - 1 :], strict=False):
        logprobs = logits.log_softmax(dim=-1)[list(step.candidate_ids)].tolist()
        torch.testing.assert_close(list(step.logprobs), logprobs, rtol=0.0, atol=8 * tolerance["atol"])
        # What it kept is plausible, give or take what rounding may have moved.
        assert min(logprobs) - max(logprobs) >= math.log(0.11) - 8 * tolerance["atol"]


@pytest.mark.parametrize("kind", ["head", "full"])
def test_preempted_samples_go_on_as_if_nothing_had_happened(kind, monkeypatch):
    for module in (cached_decoder, cache_budget, cuda_decoder):
        monkeypatch.setattr(module, "BLOCK_SIZE", 4)
    model, verifier = make("llama", kind, num_hidden_layers=1)
    prompts, options = [[5, 6, 7], [3, 9]], config(max_candidates=2)
    plenty = load(model, verifier).generate(prompts, options)
    cached = [model] if kind == "head" else [model, verifier.network]
    memory = 3 * sum(cached_decoder.block_bytes(DecoderSpec.from_model(decoder)) for decoder in cached)
    little = load(model, verifier, memory=memory).generate(prompts, options)
    assert everything(little) == everything(plenty)
    assert sum(r.stats.preemptions for r in little) > 0 == sum(r.stats.preemptions for r in plenty)


@pytest.mark.parametrize("kind", ["lora", "full"])  # with caches of their own beside the LLM's
def test_prompts_that_begin_alike_have_the_bits_of_each_alone(kind, monkeypatch):
    for module in (cached_decoder, cache_budget, cuda_decoder):
        monkeypatch.setattr(module, "BLOCK_SIZE", 4)
    monkeypatch.setattr(prefixes, "MIN_SHARED_TOKENS", 4)
    model, verifier = make("llama", kind, num_hidden_layers=1)
    engine, options = load(model, verifier, kind), config(max_candidates=2, max_new_tokens=2)
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 3], [5, 6, 7, 8, 2]]
    results = engine.generate(prompts, options)
    assert [result.stats.cached_prompt_tokens for result in results] == [0, 5, 4]
    alone = [engine.generate([prompts[i]], options, request_ids=[i])[0] for i in (1, 2)]
    assert everything(results[1:]) == everything(alone)


@pytest.mark.parametrize("kind", [None, "full"])
def test_steps_begin_before_the_last_tokens_are_known(kind, monkeypatch):
    """And what they compute for a sample that has ended meanwhile is dropped."""
    model, verifier = make("llama", kind, num_hidden_layers=1)
    engine = load(model, verifier)
    begin, plan, ahead = engine._backend.begin_step, engine._backend._plan, []

    def begin_step(sequences):
        ahead.append(plan.num_unknown)
        return begin(sequences)

    monkeypatch.setattr(engine._backend, "begin_step", begin_step)
    options = config(max_candidates=2)
    full_length = everything(engine.generate(PROMPTS, options))
    assert ahead == [0, 1, 1]
    first, second = (tokens for tokens, _, _ in full_length)
    assert first[1] not in [first[0], *second]
    monkeypatch.setattr(engine, "_eos_token_ids", (first[1],))
    ended, other = everything(engine.generate(PROMPTS, options.merge(ignore_eos=False)))
    assert ended == tuple(values[:2] for values in full_length[0])
    assert other == full_length[1]


@pytest.mark.parametrize("kind", [None, "full"])
def test_a_prompt_is_kept_when_its_sample_ends_behind_a_step_under_way(kind, monkeypatch):
    for module in (cached_decoder, cache_budget, cuda_decoder):
        monkeypatch.setattr(module, "BLOCK_SIZE", 4)
    monkeypatch.setattr(prefixes, "MIN_SHARED_TOKENS", 4)
    model, verifier = make("llama", kind, num_hidden_layers=1)
    engine, options = load(model, verifier, kind), config(max_candidates=2, max_new_tokens=4)
    prompts = [PROMPTS[0], [3], [*PROMPTS[0][:5], 2]]
    alone = [everything(engine.generate([prompt], options, request_ids=[i])) for i, prompt in enumerate(prompts)]
    first, second = (alone[index][0][0] for index in (0, 1))
    assert first[1] not in [first[0], *second]
    monkeypatch.setattr(engine, "_eos_token_ids", (first[1],))
    results = engine.generate(prompts, options.merge(ignore_eos=False))
    assert [result.stats.cached_prompt_tokens for result in results] == [0, 0, 5]
    ended, *others = everything(results)
    assert ended == tuple(values[:2] for values in alone[0][0])
    assert others[0] == alone[1][0]
    assert all(a == b[: len(a)] for a, b in zip(others[1], alone[2][0], strict=True))


def test_reports_outlive_two_more_transfers():
    report = Report({"token": (torch.int32, (2,)), "cut": (torch.bool, (1,))}, torch.device("cpu"))
    receipts = []
    for step in range(4):
        report.device["token"].fill_(step)
        report.device["cut"].fill_(step % 2)
        receipts.append(report.send())
    assert [receipt.wait()["token"].tolist() for receipt in receipts[1:]] == [[1, 1], [2, 2], [3, 3]]
    assert [receipt.wait()["cut"].item() for receipt in receipts[1:]] == [True, False, True]


class OnlyInPlace(TorchDispatchMode):
    """Refuses ops that allocate or wait for the device."""

    ALLOWED = ("copy_", "fill_", "add_", "clamp_", "scatter_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, overload = str(func).split(".")[1:]
        is_view = func._schema.returns and any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        assert overload.endswith("out") or packet in self.ALLOWED or is_view, f"{func} allocates or waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="runs launches outside of the dispatch mode, which the interpreter needs")
@pytest.mark.parametrize("kind", [None, "head", "lora", "always", "full"])
def test_a_step_neither_allocates_nor_waits(kind, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    model, verifier = make("llama", kind)
    backend = load(model, verifier, kind)._backend
    options = config(repetition_penalty=1.2, temperature=0.7, max_candidates=2)
    sequences = [Sequence(0, 0, options, [5, 6])]
    backend.prefill(sequences)
    for sequence in sequences:
        backend._make_room(sequence)
    backend._plan.begin(sequences)()
    step, _ = backend._plan._bound
    launch = GridExecutor.__call__

    def outside(self, *args, **kwargs):  # the interpreter allocates, a GPU does not
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", outside)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("waits for the device"))
    with OnlyInPlace():
        step.decide()
        step.advance()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "head", "lora", "always"])
def test_the_host_does_not_wait_for_the_gpu(kind):
    """Between two steps of the same batch, as torch finds out."""
    model, verifier = make("llama", kind)
    backend = load(model, verifier, kind)._backend
    sequence = Sequence(0, 0, config(repetition_penalty=1.2, temperature=0.7, max_candidates=2), [5, 6])
    backend.prefill([sequence])
    for _ in range(3):  # compile, capture, replay
        (output,) = backend.step([sequence])
        sequence.token_ids.append(output.token_id)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (backend.begin_step([sequence]) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first()[0].token_id is not None
    assert second()[0].token_id is not None


def test_logits_and_forks():
    model, _ = make("llama", None)
    backend = load(model, None)._backend
    parent = Sequence(0, 0, config(), [5, 6, 7])
    backend.prefill([parent])
    child = Sequence(0, 1, config(), [5, 6, 9])
    backend.fork(parent, child, 2)
    backend.reserve(child)
    logits = backend.logits([parent, child])
    expected = torch.stack([model(torch.tensor([s.tokens_from(0)])).logits[0, -1] for s in (parent, child)])
    torch.testing.assert_close(logits, expected.detach(), **TOLERANCES["decoder.logits", torch.float32])


def test_refusals():
    model = tiny.causal_lm("gpt2")
    with pytest.raises(ArgumentError, match="backend: expected .* 'cuda' .*GPT2Model"):
        llm2_fast.load(model, backend="cuda")
    with pytest.raises(ArgumentError, match="quantization: expected None with backend 'cuda'"):
        llm2_fast.load(model, backend="cuda", quantization="int8")
    with pytest.raises(ArgumentError, match="cache_packed: expected False"):
        llm2_fast.load("no such model", backend="cuda", cache_packed=True)
    with pytest.raises(ArgumentError, match="always_verify: expected False with backend 'cpu', got True"):
        llm2_fast.load("no such model", backend="cpu", always_verify=True)
    with pytest.raises(ArgumentError, match="always_verify: expected True or False, got 1"):
        llm2_fast.load("no such model", always_verify=1)
    model = tiny.causal_lm("llama", **SHAPE)
    with pytest.raises(ArgumentError, match="always_verify: .* the cuda backend and a full verifier, got .* head"):
        llm2_fast.load(model, head_verifier(model), backend="cuda", always_verify=True)
