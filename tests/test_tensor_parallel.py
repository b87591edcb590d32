"""Two processes that share a model on the CPU, in Triton's interpreter, against the reference in one."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llm2_fast
import tensor_parallel
import tiny
from llm2_fast import ArgumentError
from llm2_fast.backends.shard import Shard
from llm2_fast.models.spec import DecoderSpec
from margins import clear_candidates
from test_cuda_backend import assert_same
from triton_device import INTERPRETED

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED or not torch.distributed.is_gloo_available(), reason="runs on the CPU, with gloo"
    ),
    pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning"),
]


@pytest.mark.timeout(300)
def test_two_processes_give_the_tokens_of_one(tmp_path):
    command = [sys.executable, Path(tensor_parallel.__file__), tmp_path / "store"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            results = tensor_parallel.decode(0, str(tmp_path / "store"))
        finally:
            output, _ = other.communicate(timeout=200)
    assert other.returncode == 0
    tokens = [[s.token_ids for generation in case for s in generation.samples] for case in results.values()]
    assert [ast.literal_eval(line) for line in output.splitlines()] == tokens
    for case, result in results.items():
        model, verifier, config = tensor_parallel.make(case)
        with clear_candidates():
            expected = llm2_fast.load(model, verifier, backend="reference").generate(tensor_parallel.PROMPTS, config)
        assert_same(result, expected, verifier)


class Group:
    """A process of a group of four."""

    def rank(self):
        return 3

    def size(self):
        return 4


def test_shares():
    spec = DecoderSpec.from_model(tiny.causal_lm("llama", num_attention_heads=8, num_key_value_heads=2))
    shard = Shard(Group())
    shard.check(spec)
    assert shard.spec(spec) == replace(spec, num_heads=2, num_kv_heads=1, intermediate_size=12)
    cuts = {name: shard.rows(spec, f"layers.0.{name}") for name in ("q_proj", "k_proj", "up_proj", "down_proj")}
    assert cuts == {"q_proj": slice(48, 64), "k_proj": slice(8, 16), "up_proj": slice(36, 48), "down_proj": slice(None)}
    cuts = {name: shard.columns(spec, f"layers.0.{name}") for name in ("q_proj", "o_proj", "down_proj")}
    assert cuts == {"q_proj": slice(None), "o_proj": slice(48, 64), "down_proj": slice(36, 48)}
    for sizes in ({"num_heads": 6}, {"num_heads": 12, "num_kv_heads": 3}, {"intermediate_size": 50}):
        with pytest.raises(ArgumentError, match="process_group: expected a size that divides .*, got 4"):
            shard.check(replace(spec, **sizes))


def test_other_backends_refuse_a_group():
    with pytest.raises(ArgumentError, match="process_group: expected None with backend 'cpu', got Group"):
        llm2_fast.load("no such model", backend="cpu", process_group=Group())
