"""Decoding in float32, prefill included, side by side: the backends of this package, transformers' `generate` (with a
verifier, through `VerifierLogitsProcessor`), and LLM2 on transformers as one would first write it.

The model is SmolLM2-135M-Instruct. The verifiers have random weights, made in memory: they cost what trained ones cost,
but choose other tokens, so the sizes of the plausible sets (`mean |C|`) are not those of trained ones. `full` has the
shape of the LLM. End-of-sequence tokens are ignored, so that everything generates the same number of tokens.

Environment:
    LLM2_FAST_BENCH_NEW_TOKENS: Tokens per prompt, 16 by default.
    LLM2_FAST_BENCH_PROMPTS: Prompts, 2 by default, at most 8. Decoded one after the other, and all together.
    LLM2_FAST_BENCH_ROUNDS: Rounds per benchmark, 1 by default; percentiles need more.
    OMP_WAIT_POLICY: On a machine with other work set it to "passive"; otherwise waiting threads spin, and decoding with
        torch takes many times as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import naive
import pytest
import torch
from random_models import random_full, random_head, random_lora

import llm2_fast
from llm2_fast.integrations.transformers import VerifierLogitsProcessor
from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.models.smollm2 import model_file
from llm2_fast.verifier import FullVerifier, HeadVerifier, LoraVerifier, Verifier

NEW_TOKENS = int(os.environ.get("LLM2_FAST_BENCH_NEW_TOKENS", 16))
NUM_PROMPTS = int(os.environ.get("LLM2_FAST_BENCH_PROMPTS", 2))
ROUNDS = int(os.environ.get("LLM2_FAST_BENCH_ROUNDS", 1))
WARMUP_TOKENS = 3
TEXTS = (
    "A baker makes 12 loaves and sells 7 of them. How many are left?",
    "The train leaves at nine and takes three hours, so it arrives at",
    "List three reasons why the sky looks blue during the day.",
    "If a shirt costs 15 dollars and a hat 8 dollars, together they cost",
    "Once upon a time there was a lighthouse keeper who",
    "The capital of France is Paris. The capital of Italy is",
    "Tom has 4 boxes with 6 pencils each. In total he has",
    "Write a short note that thanks a neighbour for her help.",
)


@dataclass(frozen=True)
class Outcome:
    """Generated tokens by prompt, and the number of candidates of every row's steps, empty without a verifier."""

    token_ids: list[list[int]]
    num_candidates: list[int]


Decode = Callable[[list[list[int]], int], Outcome]  # prompts decoded together, new tokens


@pytest.fixture(scope="module", autouse=True)
def closing_table(pytestconfig: pytest.Config) -> None:
    """Let the harness print its table after the run."""
    if not pytestconfig.pluginmanager.is_registered(harness):
        pytestconfig.pluginmanager.register(harness)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32."""
    try:
        loaded = load_model(model_file(), dtype="float32")
    except llm2_fast.MissingDependencyError as error:
        pytest.skip(str(error))
    # `generate` has no switch for this; its own way to suppress the token would change the logits.
    loaded.model.generation_config.eos_token_id = None
    loaded.model.generation_config.pad_token_id = loaded.tokenizer.eos_token_id
    return loaded


@pytest.fixture(scope="module")
def verifiers(model: LoadedModel) -> dict[str, Verifier | None]:
    """A random verifier of every kind."""
    torch.manual_seed(0)
    made = {
        "none": None,
        "head": random_head(model.model),
        "lora": random_lora(model.model),
        "full": random_full(model.model),
    }
    for kind in ("head", "lora"):
        made[kind].base = model  # shared: a processor's own copy would cost memory, not time
    return made


def verifier_bytes(verifier: Verifier | None) -> int:
    """Weights besides the LLM's."""
    if isinstance(verifier, LoraVerifier):
        return sum(tensor.numel() * tensor.element_size() for tensor in verifier._tensors.values())
    modules = {HeadVerifier: ("head",), FullVerifier: ("network", "head")}.get(type(verifier), ())
    return sum(harness.parameter_bytes(getattr(verifier, name)) for name in modules)


def engine(model: LoadedModel, verifier: Verifier | None, batch: int, *, backend: str) -> Decode:
    """This package's engine."""
    loaded = llm2_fast.load(model.model, verifier, backend=backend, max_batch_size=batch)

    def decode(prompts: list[list[int]], new_tokens: int) -> Outcome:
        results = loaded.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        counts = [n for r in results for n, steps in r.stats.candidate_histogram.items() for _ in range(steps)]
        return Outcome([result.samples[0].token_ids for result in results], counts)

    return decode


def transformers_generate(model: LoadedModel, verifier: Verifier | None, batch: int) -> Decode:
    """transformers' own loop, with the verifier as a logits processor."""
    pad = model.model.generation_config.pad_token_id
    processor = None
    if verifier is not None:
        processor = VerifierLogitsProcessor(
            verifier, prompt_lengths=[1], generation_config=model.model.generation_config
        )

    def decode(prompts: list[list[int]], new_tokens: int) -> Outcome:
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        counts: list[int] = []

        def count(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            counts.extend(scores.isfinite().sum(dim=1).tolist())
            return scores

        processors = []
        if processor is not None:
            processor.reset(attention_mask=mask)
            processors = [processor, count]
        output = model.model.generate(
            ids, attention_mask=mask, logits_processor=processors, do_sample=False, max_new_tokens=new_tokens
        )
        return Outcome(output[:, width:].tolist(), counts)

    return decode


def naive_generate(model: LoadedModel, verifier: Verifier, batch: int) -> Decode:
    """LLM2 on transformers as one would first write it; one sequence at a time."""

    def decode(prompts: list[list[int]], new_tokens: int) -> Outcome:
        (prompt,) = prompts
        token_ids, counts = naive.generate(
            model.model, naive.NaiveVerifier.of(model.model, verifier), prompt, max_new_tokens=new_tokens
        )
        return Outcome([token_ids], counts)

    return decode


DECODERS = {
    "cpu": partial(engine, backend="cpu"),
    "reference": partial(engine, backend="reference"),
    "transformers": transformers_generate,
    "naive": naive_generate,
}
CASES = [
    (decoder, verifier, batch)
    for batch in sorted({1, NUM_PROMPTS})
    for verifier in ("none", "head", "lora", "full")
    for decoder in DECODERS
    if decoder != "naive" or (verifier in ("head", "full") and batch == 1)
]


@pytest.mark.parametrize(("decoder", "verifier", "batch"), CASES)
def test_decode(
    benchmark: Any,
    model: LoadedModel,
    verifiers: dict[str, Verifier | None],
    decoder: str,
    verifier: str,
    batch: int,
) -> None:
    prompts = [model.tokenizer(text)["input_ids"] for text in TEXTS[:NUM_PROMPTS]]
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    decode = DECODERS[decoder](model, verifiers[verifier], batch)
    decode(batches[0], WARMUP_TOKENS)

    benchmark.group = f"decode, {batch} at a time"
    outcomes = benchmark.pedantic(lambda: [decode(together, NEW_TOKENS) for together in batches], rounds=ROUNDS)
    generated = [token_ids for outcome in outcomes for token_ids in outcome.token_ids]
    assert [len(token_ids) for token_ids in generated] == [NEW_TOKENS] * NUM_PROMPTS
    counts = [n for outcome in outcomes for n in outcome.num_candidates]
    workload = harness.Workload(
        steps=NEW_TOKENS * len(batches),
        tokens=NEW_TOKENS * NUM_PROMPTS,
        prompt_tokens=sum(map(len, prompts)),
        weight_bytes=harness.parameter_bytes(model.model),
        verifier_bytes=verifier_bytes(verifiers[verifier]),
    )
    facts = {"mean |C|": round(sum(counts) / len(counts), 2), "weights": "random"} if counts else {}
    harness.record(benchmark, workload, decoder=decoder, verifier=verifier, batch=batch, **facts)
