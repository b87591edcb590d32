"""The cuda backend's steps and the kernels with targets, on a GPU. `bench/gpu.py` has more, and checks first.

The model is random, of the shape of Llama-3.2-1B in bfloat16; "8 branches" is alpha 0 with `candidate_top_k` 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from gpu import past_the_cache
from gpu_engine import BRANCHES, FULL, make_engine, random_prompt, run_engine
from kernel_launches import Launch, Load, Maker, attention_launch, selection_launch
from random_models import random_llama, random_verifier
from transformers import PreTrainedModel

from llm2_fast import GenerationConfig

_CALLS = 20  # captured together, as one takes microseconds


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_llama(FULL.shape, FULL.dtype, FULL.device, max_positions=max(FULL.prefixes) + 1024)


@pytest.mark.parametrize("prefix", FULL.prefixes)
@pytest.mark.parametrize("kind", [None, "head", "lora", "full"])
def test_decode(benchmark: Any, model: PreTrainedModel, kind: str | None, prefix: int) -> None:
    engine = make_engine(FULL, model, random_verifier(kind, model), max_batch_size=1, always_verify=kind == "full")
    config = GenerationConfig(
        max_new_tokens=FULL.new_tokens, ignore_eos=True, alpha=0.0, candidate_top_k=BRANCHES, max_candidates=BRANCHES
    )
    prompts = [random_prompt(prefix, FULL.shape.vocab_size)]
    run_engine(engine, prompts, config)  # compiles and captures
    steps: list[float] = []
    benchmark.group = f"decode behind {prefix} tokens, prefill included"
    benchmark.pedantic(lambda: steps.append(run_engine(engine, prompts, config)[0]), rounds=FULL.rounds)
    benchmark.extra_info |= {"ms per step": 1e3 * min(steps), "weights": "random"}


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_select_candidates(benchmark: Any, batch: int) -> None:
    load = Load(sequences=batch, branches=1)
    _time_launch(benchmark, selection_launch(Maker(FULL.device), FULL.dtype, FULL.shape, load))


@pytest.mark.parametrize("branches", [1, BRANCHES])
def test_branch_attention(benchmark: Any, branches: int) -> None:
    load = Load(branches=branches, prefix=32_768)
    _time_launch(benchmark, attention_launch(Maker(FULL.device), FULL.dtype, FULL.shape, load))


def _time_launch(benchmark: Any, launch: Launch) -> None:
    sets = past_the_cache(launch)
    calls = [functools.partial(launch.op, *sets[i % len(sets)]) for i in range(_CALLS)]
    calls[0]()  # compiles
    replay = _captured(calls)
    benchmark.pedantic(replay, rounds=50, warmup_rounds=3)
    seconds = benchmark.stats.stats.median / _CALLS
    benchmark.extra_info |= {"us": 1e6 * seconds, "GB/s": launch.bytes / seconds / 1e9}


def _captured(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """Replays the calls and waits for them."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
