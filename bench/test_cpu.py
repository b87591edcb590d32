"""The cpu backend, prefill included, beside the reference backend and transformers' own loop, in float32 and bfloat16.

`cpu int8` is the cpu backend with int8 weights, a scale per output feature, and activations of the dtype.

The model is SmolLM2-135M-Instruct, the `head` verifier the one that comes with the package. `full` has the shape of the
LLM and random weights: it costs what a trained one costs, but chooses other tokens. End-of-sequence tokens are ignored.

Environment:
    LLM2_FAST_BENCH_NEW_TOKENS: Tokens per prompt, 64 by default.
    LLM2_FAST_BENCH_ROUNDS: Rounds per benchmark, 3 by default.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from transformers import AutoModel

import llm2_fast
from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.models.smollm2 import default_verifier, model_file
from llm2_fast.verifier import FullVerifier, Verifier

pytest_plugins = ["harness"]  # prints the closing table

NEW_TOKENS = int(os.environ.get("LLM2_FAST_BENCH_NEW_TOKENS", 64))
ROUNDS = int(os.environ.get("LLM2_FAST_BENCH_ROUNDS", 3))
QUESTION = "A baker makes {} loaves and sells 7 of them. How many are left?"

Decode = Callable[[int], list[int]]  # new tokens -> the number of candidates of every step, empty without a verifier


@pytest.fixture(scope="module")
def models() -> dict[str, LoadedModel]:
    """SmolLM2-135M-Instruct by dtype."""
    try:
        loaded = {dtype: load_model(model_file(), dtype=dtype) for dtype in ("float32", "bfloat16")}
    except llm2_fast.MissingDependencyError as error:
        pytest.skip(str(error))
    for model in loaded.values():
        # `generate` has no switch for this; its own way to suppress the token would change the logits.
        model.model.generation_config.eos_token_id = None
    return loaded


def make_verifier(kind: str, model: LoadedModel) -> Verifier | None:
    if kind == "none":
        return None
    if kind == "head":
        return Verifier.from_pretrained(default_verifier())
    torch.manual_seed(0)
    network = AutoModel.from_config(copy.deepcopy(model.model.config)).to(model.model.dtype).eval()
    return FullVerifier(network, torch.randn(1, model.model.config.hidden_size) * 0.02)


def int8_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights if those of its linear layers are int8, with a float32 scale per output feature."""
    linear = {m.weight.data_ptr(): m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)}
    saved = sum(weight.numel() * (weight.element_size() - 1) - 4 * len(weight) for weight in linear.values())
    return harness.parameter_bytes(module) - saved


def decode_with_engine(decoder: str, model: LoadedModel, verifier: Verifier | None, prompts: list[list[int]]) -> Decode:
    backend, *quantization = decoder.split()
    loading = {"backend": backend, "quantization": next(iter(quantization), None), "max_batch_size": len(prompts)}
    engine = llm2_fast.load(model.model, verifier, **loading)

    def decode(new_tokens: int) -> list[int]:
        results = engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        assert all(len(result.samples[0].token_ids) == new_tokens for result in results)
        return [n for r in results for n, steps in r.stats.candidate_histogram.items() for _ in range(steps)]

    return decode


def decode_with_transformers(model: LoadedModel, prompts: list[list[int]]) -> Decode:
    ids = torch.tensor(prompts)

    def decode(new_tokens: int) -> list[int]:
        mask = torch.ones_like(ids)
        output = model.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        assert output.shape[1] == ids.shape[1] + new_tokens
        return []

    return decode


CASES = [
    (decoder, dtype, kind, batch)
    for batch in (1, 8)
    for dtype in ("bfloat16", "float32")
    for kind in ("none", "head", "full")
    for decoder in ("cpu", "cpu int8", "reference", "transformers")
    if (decoder != "transformers" or kind == "none") and (decoder.startswith("cpu") or batch == 1)
]


@pytest.mark.parametrize(("decoder", "dtype", "kind", "batch"), CASES)
def test_cpu(benchmark: Any, models: dict[str, LoadedModel], decoder: str, dtype: str, kind: str, batch: int) -> None:
    model = models[dtype]
    verifier = make_verifier(kind, model)
    prompts = [model.tokenizer(QUESTION.format(10 + i))["input_ids"] for i in range(batch)]
    if decoder == "transformers":
        decode = decode_with_transformers(model, prompts)
    else:
        decode = decode_with_engine(decoder, model, verifier, prompts)
    decode(3)
    benchmark.group = f"{dtype}, {batch} at a time"
    counts = decode(NEW_TOKENS)
    benchmark.pedantic(decode, (NEW_TOKENS,), rounds=ROUNDS)
    weight_bytes = int8_bytes if "int8" in decoder else harness.parameter_bytes
    workload = harness.Workload(
        steps=NEW_TOKENS,
        tokens=NEW_TOKENS * batch,
        prompt_tokens=sum(map(len, prompts)),
        weight_bytes=weight_bytes(model.model),
        verifier_bytes=weight_bytes(verifier.network) if kind == "full" else 0,
    )
    facts = {"mean |C|": round(sum(counts) / len(counts), 2)} if counts else {}
    harness.record(benchmark, workload, decoder=f"{decoder} {dtype}", verifier=kind, batch=batch, **facts)
