"""The baseline of the benchmarks computes the same thing as what it is compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import llm2_fast
from verifiers import case

EOS = 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [20, 21, 22, 4]]
OPTIONS = {"max_new_tokens": 16, "alpha": 0.2, "beta": 0.5}


@pytest.fixture(scope="module")
def naive():
    path = Path(__file__).resolve().parent.parent / "bench" / "naive.py"
    spec = importlib.util.spec_from_file_location("naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network_and_head(kind):
    model, verifier, _ = vars(case("llama", kind)).values()
    if kind == "head":
        return model.base_model, verifier.head.score
    return verifier.network, lambda hidden_states: verifier.head([hidden_states]).unsqueeze(-1)


@pytest.mark.parametrize("kind", ["head", "full"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_tokens_equal_the_engine(naive, kind, prompt):
    model, verifier, _ = vars(case("llama", kind)).values()
    (expected,) = llm2_fast.generate(model, verifier, prompt, **OPTIONS)
    scorer = naive.NaiveVerifier(*network_and_head(kind))
    token_ids, num_candidates = naive.generate(model, scorer, prompt, eos_token_ids=(EOS,), **OPTIONS)
    assert token_ids == expected.samples[0].token_ids
    assert sum(num_candidates) == sum(n * steps for n, steps in expected.stats.candidate_histogram.items())


@pytest.mark.parametrize("kind", ["head", "full"])
def test_the_verifier_steers(naive, kind):
    """Or equality above would say nothing about scores."""
    model, _, _ = vars(case("llama", kind)).values()
    plain = llm2_fast.generate(model, None, PROMPTS, max_new_tokens=16)
    steered = [
        naive.generate(model, naive.NaiveVerifier(*network_and_head(kind)), p, eos_token_ids=(EOS,), **OPTIONS)[0]
        for p in PROMPTS
    ]
    assert steered != [result.samples[0].token_ids for result in plain]
