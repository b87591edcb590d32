"""`GenerationConfig`: defaults, validation, immutability."""

import dataclasses
import math

import pytest

from llm2_fast import ArgumentError, GenerationConfig


def test_defaults_are_the_papers():
    config = GenerationConfig()
    assert (config.alpha, config.beta, config.temperature, config.n) == (0.1, 0.25, 0.0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha: expected a number >= 0 and <= 1, got -0.1"),
        ({"alpha": 1.1}, "alpha: expected a number >= 0 and <= 1, got 1.1"),
        ({"alpha": math.nan}, "alpha: expected a number >= 0 and <= 1, got nan"),
        ({"alpha": "x"}, "alpha: expected a number >= 0 and <= 1, got 'x'"),
        ({"alpha": True}, "alpha: expected a number >= 0 and <= 1, got True"),
        ({"alpha": 0}, "alpha: expected > 0, or candidate_top_k set, .* got alpha = 0 with candidate_top_k = None"),
        ({"beta": -1}, "beta: expected a number >= 0 .*, got -1"),
        ({"beta": math.inf}, "beta: expected a number >= 0 .*, got inf"),
        ({"candidate_top_k": 33}, "candidate_top_k: expected at most max_candidates = 32, got 33"),
        ({"candidate_top_k": 0}, "candidate_top_k: expected an integer >= 1, got 0"),
        ({"max_candidates": 0}, "max_candidates: expected an integer >= 1 and <= 65536, got 0"),
        ({"temperature": -0.5}, "temperature: expected a number >= 0 .*, got -0.5"),
        ({"temperature": 10**400}, "temperature: expected a number >= 0 .*, got 1000"),
        ({"temperature": 1e-6}, "temperature: expected 0 or at least 0.0001, got 1e-06"),
        ({"top_k": 2**40}, "top_k: expected an integer >= 1 .*, got 1099511627776"),
        ({"top_k": 0}, "top_k: expected an integer >= 1 .*, got 0"),
        ({"top_p": 0}, "top_p: expected a number > 0 and <= 1, got 0"),
        ({"min_p": 1.5}, "min_p: expected a number >= 0 and <= 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number > 0 .*, got 0"),
        ({"n": 0}, "n: expected an integer >= 1, got 0"),
        ({"n": 2.0}, "n: expected an integer >= 1, got 2.0"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"seed": 2**64}, "seed: expected an integer >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"stop": ("",)}, r"stop: expected a non-empty string or a sequence of non-empty strings, got \('',\)"),
        ({"stop": 3}, "stop: expected a non-empty string"),
        ({"trace": 1}, "trace: expected True or False, got 1"),
        ({"ignore_eos": "no"}, "ignore_eos: expected True or False, got no"),
    ],
)
def test_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        GenerationConfig(**options)


def test_alpha_zero_with_top_k():
    assert GenerationConfig(alpha=0, candidate_top_k=5).log_alpha == -math.inf


def test_stop_may_be_one_string_or_a_list():
    assert GenerationConfig(stop="x").stop == ("x",)
    assert GenerationConfig(stop=["x", "y"]).stop == ("x", "y")


def test_frozen_and_merged():
    config = GenerationConfig(alpha=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.5
    merged = config.merge(beta=1.0)
    assert (merged.alpha, merged.beta, config.beta) == (0.3, 1.0, 0.25)
    with pytest.raises(ArgumentError, match=r"option: expected one of alpha, .* got 'bta' \(did you mean 'beta'\?\)"):
        config.merge(bta=1.0)
    with pytest.raises(ArgumentError, match="candidate_top_k: expected at most max_candidates = 4, got 5"):
        GenerationConfig(candidate_top_k=5).merge(max_candidates=4)
