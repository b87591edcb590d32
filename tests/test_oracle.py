"""The reference backend against brute force, for every family, verifier kind and way of sampling."""

from functools import partial

import pytest
import torch

import llm2_fast
import oracle
import tiny
from llm2_fast import GenerationConfig
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.verifier import HeadVerifier, ScoreHead
from verifiers import KINDS, case

load = partial(llm2_fast.load, backend="reference")
generate = partial(llm2_fast.generate, backend="reference")

PROMPTS = tiny.PROMPTS
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "n": 2},
    "top-k candidates": {"alpha": 0.0, "candidate_top_k": 4, "beta": 1.0},
    "processors": tiny.PROCESSORS,
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_equal_the_oracle(family, kind, options):
    model, verifier, score = vars(case(family, kind)).values()
    config = GenerationConfig(max_new_tokens=8, trace=True, **options)
    # Two places for up to six samples: prompts wait, are admitted late and decoded beside others.
    results = load(model, verifier, max_batch_size=2).generate(PROMPTS, config)
    next_logits = oracle.model_logits(model)
    for request, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        for index, sample in enumerate(result.samples):
            tokens, logprobs, candidates, margin = oracle.generate(
                prompt, next_logits, score, config, eos=(2,), sample=index, request=request
            )
            assert sample.token_ids == tokens, f"prompt {request}, sample {index}, smallest margin {margin}"
            torch.testing.assert_close(sample.logprobs, logprobs, rtol=0, atol=1e-4)
            if kind is not None:
                assert [list(step.candidate_ids) for step in sample.trace] == candidates
            assert sample.finish_reason == ("eos" if tokens[-1] == 2 else "length")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_the_trace_are_the_verifiers(kind):
    model, verifier, score = vars(case("llama", kind)).values()
    (result,) = generate(model, verifier, PROMPTS[0], max_new_tokens=8, trace=True)
    prefix, scored = list(PROMPTS[0]), 0
    for step in result.samples[0].trace:
        if len(step.candidate_ids) == 1:
            assert step.scores is None
        else:
            expected = [score(prefix, token) for token in step.candidate_ids]
            torch.testing.assert_close(list(step.scores), expected, rtol=1e-4, atol=1e-4)
            scored += 1
        prefix.append(step.token_id)
    assert scored > 0


def test_system1_choice_is_that_of_beta_zero():
    model, verifier, _ = vars(case("llama", "head")).values()
    options = {"max_new_tokens": 12, "trace": True, "temperature": 1.0}
    (result,) = generate(model, verifier, PROMPTS[0], **options)
    trace = result.samples[0].trace
    interventions = [i for i, step in enumerate(trace) if step.intervention]
    assert len(interventions) == result.stats.interventions > 0
    # Up to the first intervention a run with beta = 0 makes the same choices, there it makes System 1's.
    (plain,) = generate(model, verifier, PROMPTS[0], beta=0.0, **options)
    first = interventions[0]
    assert plain.samples[0].token_ids[: first + 1] == [step.system1_token_id for step in trace[: first + 1]]


def test_beta_zero_is_plain_decoding_with_min_p():
    model, verifier, _ = vars(case("llama", "full")).values()
    options = {"max_new_tokens": 12, "temperature": 1.0, "n": 2}
    truncated = generate(model, verifier, PROMPTS, beta=0.0, alpha=0.2, max_candidates=61, **options)
    min_p = generate(model, None, PROMPTS, min_p=0.2, **options)
    for a, b in zip(truncated, min_p, strict=True):
        assert [s.token_ids for s in a.samples] == [s.token_ids for s in b.samples]


def test_head_reads_the_layers_and_shape_it_was_made_for():
    model = tiny.causal_lm("llama")
    torch.manual_seed(3)
    head = ScoreHead(32, layers=(0, -1), mlp_size=8)
    verifier = HeadVerifier(head, base_name="tiny", base_fingerprint=fingerprint(model))
    config = GenerationConfig(max_new_tokens=8, beta=4.0)
    score = oracle.head_score(model, head.state_dict(), head.layers)
    expected, *_ = oracle.generate(PROMPTS[0], oracle.model_logits(model), score, config, eos=(2,))
    (result,) = generate(model, verifier, PROMPTS[0], config=config)
    assert result.samples[0].token_ids == expected
    assert result.stats.interventions > 0
