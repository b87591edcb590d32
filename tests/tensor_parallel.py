"""What each process of `test_tensor_parallel.py` runs. As a script it is the second process."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import llm2_fast
import tiny
from llm2_fast import GenerationConfig
from verifiers import head_verifier, lora_case

PROMPTS = [[5, 6, 7, 8], [3]]
SIZE = 2
# Key/value heads dealt out, and one that both processes have; biases of all projections; norms behind the projections.
BIASES = {"attention_bias": True, "mlp_bias": True}
CASES = {
    "plain": ("qwen2", None, {"num_key_value_heads": 2}, {}),
    "head": ("gemma3", "head", {"num_key_value_heads": 1, "layer_types": ["full_attention"]}, {}),
    "lora": ("llama", "lora", {"num_key_value_heads": 2, **BIASES}, {"temperature": 1.0}),
}
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}


def make(case: str):
    """A model, a verifier and options of a case, the same in every process."""
    family, kind, shape, options = CASES[case]
    model = tiny.causal_lm(family, **SHAPE | shape)
    verifier = {None: lambda: None, "head": lambda: head_verifier(model), "lora": lambda: lora_case(model).verifier}
    options = {"max_new_tokens": 2, "ignore_eos": True, "max_candidates": 3, "alpha": 0.11, "trace": True, **options}
    return model, verifier[kind](), GenerationConfig(**options)


def decode(rank: int, store: str):
    """Results of all cases, in a group of two processes that meet in a file."""
    timeout = timedelta(seconds=250)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=SIZE, timeout=timeout)
    try:
        results = {}
        for case in CASES:
            model, verifier, config = make(case)
            engine = llm2_fast.load(
                model, verifier, backend="cuda", kv_cache_memory_bytes=1 << 20,
                process_group=torch.distributed.group.WORLD,
            )  # fmt: skip
            results[case] = engine.generate(PROMPTS, config)
            shapes = engine._backend._llm.key_cache.shape
            assert shapes[2] == 1, "each process has one key/value head"
        return results
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for generations in decode(1, sys.argv[1]).values():
        print([sample.token_ids for generation in generations for sample in generation.samples])
