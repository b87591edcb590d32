"""The cpu backend beside the reference backend, transformers' own loop and the naive LLM2 on it.

Whole generations, prefill included, in float32 and bfloat16; then, in bfloat16, prompts alone, and the time of a step
against the length of the prefix and the number of branches. `cpu int8` is the cpu backend with int8 weights, a scale
per 32 inputs, and activations of the dtype; `cpu int8-channel` has one scale per output feature.

The model is SmolLM2-135M-Instruct, the `head` verifier the one that comes with the package. `lora` (rank 16) and `full`
(the shape of the LLM) have random weights: they cost what trained ones cost, but choose other tokens. End-of-sequence
tokens are ignored.

Environment:
    LLM2_FAST_BENCH_NEW_TOKENS: Tokens per prompt, 64 by default.
    LLM2_FAST_BENCH_ROUNDS: Rounds per benchmark, 3 by default.
    LLM2_FAST_BENCH_PROBLEMS: A JSON-lines file with "question" to take prompts from, e.g. GSM8K's.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import naive
import pytest
import torch
from random_models import random_full, random_lora

import llm2_fast
from llm2_fast import Engine
from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.smollm2 import default_verifier, model_file
from llm2_fast.verifier import Verifier

pytest_plugins = ["harness"]  # prints the closing table

NEW_TOKENS = int(os.environ.get("LLM2_FAST_BENCH_NEW_TOKENS", 64))
ROUNDS = int(os.environ.get("LLM2_FAST_BENCH_ROUNDS", 3))
PROBLEMS = os.environ.get("LLM2_FAST_BENCH_PROBLEMS")
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
    return {"lora": random_lora, "full": random_full}[kind](model.model)


def make_prompts(model: LoadedModel, count: int) -> list[list[int]]:
    questions = (QUESTION.format(10 + i) for i in range(count))
    if PROBLEMS is not None:
        lines = Path(PROBLEMS).read_text(encoding="utf-8").splitlines()
        questions = (json.loads(line)["question"] for line in itertools.islice(itertools.cycle(lines), count))
    return [model.tokenizer(question)["input_ids"] for question in questions]


def weight_bytes(module: torch.nn.Module, quantization: str | None) -> int:
    """Bytes of a module's weights if those of its linear layers are quantized, their float32 scales included."""
    total = harness.parameter_bytes(module)
    if quantization is None:
        return total
    group_size = Quantization.from_name(quantization).group_size
    for weight in {m.weight.data_ptr(): m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)}.values():
        num_scales = len(weight) * -(-weight.shape[1] // (group_size or weight.shape[1]))
        total -= weight.numel() * (weight.element_size() - 1) - 4 * num_scales
    return total


def decode_with_engine(decoder: str, model: LoadedModel, verifier: Verifier | None, prompts: list[list[int]]) -> Decode:
    backend, _, quantization = decoder.partition(" ")
    loading = {"backend": backend, "quantization": quantization or None, "max_batch_size": len(prompts)}
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


def decode_with_naive(model: LoadedModel, verifier: Verifier, prompts: list[list[int]]) -> Decode:
    (prompt,) = prompts

    def decode(new_tokens: int) -> list[int]:
        scorer = naive.NaiveVerifier.of(model.model, verifier)
        return naive.generate(model.model, scorer, prompt, max_new_tokens=new_tokens)[1]

    return decode


def is_measured(decoder: str, dtype: str, kind: str, batch: int) -> bool:
    if decoder == "naive":
        return kind in ("head", "full") and batch == 1
    if decoder in ("reference", "transformers"):
        return kind in (("none", "head", "full") if decoder == "reference" else ("none",)) and batch == 1
    if decoder == "cpu int8-channel":
        return kind == "none" and dtype == "bfloat16" and batch <= 8
    return batch <= 8 or (decoder == "cpu" and dtype == "bfloat16")


CASES = [
    case
    for case in itertools.product(
        ("cpu", "cpu int8", "cpu int8-channel", "reference", "transformers", "naive"),
        ("bfloat16", "float32"),
        ("none", "head", "lora", "full"),
        (1, 8, 16, 32),
    )
    if is_measured(*case)
]


@pytest.mark.parametrize(("decoder", "dtype", "kind", "batch"), CASES)
def test_cpu(benchmark: Any, models: dict[str, LoadedModel], decoder: str, dtype: str, kind: str, batch: int) -> None:
    model = models[dtype]
    verifier = make_verifier(kind, model)
    prompts = make_prompts(model, batch)
    if decoder == "transformers":
        decode = decode_with_transformers(model, prompts)
    elif decoder == "naive":
        decode = decode_with_naive(model, verifier, prompts)
    else:
        decode = decode_with_engine(decoder, model, verifier, prompts)
    decode(3)
    benchmark.group = f"{dtype}, {batch} at a time"
    counts = decode(NEW_TOKENS)
    benchmark.pedantic(decode, (NEW_TOKENS,), rounds=ROUNDS)
    quantization = decoder.partition(" ")[2] or None
    workload = harness.Workload(
        steps=NEW_TOKENS,
        tokens=NEW_TOKENS * batch,
        prompt_tokens=sum(map(len, prompts)),
        weight_bytes=weight_bytes(model.model, quantization),
        verifier_bytes=weight_bytes(verifier.network, quantization) if kind == "full" else 0,  # others: next to none
    )
    facts = {"mean |C|": round(sum(counts) / len(counts), 2)} if counts else {}
    harness.record(benchmark, workload, decoder=f"{decoder} {dtype}", verifier=kind, batch=batch, **facts)


@pytest.mark.parametrize("decoder", ["cpu", "cpu int8", "transformers"])
def test_prompt(benchmark: Any, models: dict[str, LoadedModel], decoder: str) -> None:
    """512 tokens, to the first new one."""
    prompts = [list(range(1000, 1512))]
    if decoder == "transformers":
        decode = decode_with_transformers(models["bfloat16"], prompts)
    else:
        decode = decode_with_engine(decoder, models["bfloat16"], None, prompts)
    decode(1)
    benchmark.group = "a prompt of 512 tokens, bfloat16"
    benchmark.pedantic(decode, (1,), rounds=ROUNDS)


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
def test_common_beginning(benchmark: Any, models: dict[str, LoadedModel], alike: bool) -> None:
    """Sixteen prompts that differ in their last 16 tokens only, or in the first one, too, to their first new token."""
    prompts = [[1000 + (0 if alike else i), *range(2000, 2255), *range(3000 + i, 3016 + i)] for i in range(16)]
    decode = decode_with_engine("cpu", models["bfloat16"], None, prompts)
    decode(1)
    benchmark.group = "16 prompts of 272 tokens, bfloat16"
    benchmark.pedantic(decode, (1,), rounds=ROUNDS)


def benchmark_steps(benchmark: Any, engine: Engine, prompt: list[int], **options: Any) -> None:
    """Whole generations of 24 tokens; what a step took is in `extra_info`."""
    milliseconds = []

    def generate() -> None:
        (result,) = engine.generate([prompt], max_new_tokens=24, ignore_eos=True, **options)
        milliseconds.append(1e3 * result.stats.decode_seconds / result.stats.steps)

    benchmark.pedantic(generate, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["ms/step"] = round(sorted(milliseconds)[len(milliseconds) // 2], 2)


@pytest.mark.parametrize("length", [128, 512, 1024, 2048, 4096])
def test_prefix(benchmark: Any, models: dict[str, LoadedModel], length: int) -> None:
    benchmark.group = "plain steps against the length of the prefix, bfloat16"
    benchmark_steps(
        benchmark, llm2_fast.load(models["bfloat16"].model, backend="cpu"), list(range(1000, 1000 + length))
    )


@pytest.mark.parametrize("branches", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["head", "lora"])
def test_branches(benchmark: Any, models: dict[str, LoadedModel], kind: str, branches: int) -> None:
    benchmark.group = f"{kind} steps against the number of branches, bfloat16"
    model = models["bfloat16"]
    engine = llm2_fast.load(model.model, make_verifier(kind, model), backend="cpu")
    benchmark_steps(benchmark, engine, list(range(1000, 1064)), alpha=0.0, candidate_top_k=branches)
