"""The engine's part of `bench/gpu.py`: its tokens against the reference backend's, then its times beside transformers'.

Models and verifiers are random, of the shape of Llama-3.2-1B. "8 branches" is alpha 0 with `candidate_top_k` 8. Where
the number of candidates matters, `lm_head` is scaled until what the engine itself counts is as wanted.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import naive
import torch
from kernel_launches import LLAMA_3_2_1B, Shape
from random_models import random_llama, random_verifier
from transformers import CompileConfig, PreTrainedModel

import llm2_fast
from llm2_fast import Engine, GenerationConfig
from llm2_fast.results import Generation
from llm2_fast.schedule import Schedule
from llm2_fast.verifier import FullVerifier, Verifier

BRANCHES = 8
_MEAN_CANDIDATES = 2.2  # of SmolLM2 on GSM8K at alpha 0.1
_AMBIGUOUS = 0.2
_SKIPPED_STEPS = 4  # of every run: the first ones begin with work of the prompt
_NEAR_TIE = 1e-4  # two orders of summation move a float32 logit by less


class Sizes(NamedTuple):
    """Of a run.

    Attributes:
        checked: Shape of the models whose tokens are checked.
        shape: Of the model that is timed, in `dtype`.
        prefixes: Lengths of prompts.
        new_tokens: Steps of a run.
        rounds: Runs, of which the median counts; each has a prompt of its own.
        batch: Sequences decoded together, at most.
        cache_bytes: For keys and values.
        compile_backend: Of torch.compile.
    """

    device: str
    checked: Shape
    checked_tokens: int
    shape: Shape
    dtype: torch.dtype
    prefixes: tuple[int, ...]
    new_tokens: int
    rounds: int
    batch: int
    cache_bytes: int
    compile_backend: str


FULL = Sizes(
    "cuda", Shape(512, 1024, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=32_000), 24,
    LLAMA_3_2_1B, torch.bfloat16, (512, 4096), 128, 5, 64, 16 << 30, "inductor",
)  # fmt: skip
# The same code in Triton's interpreter: nothing it prints means anything.
TINY = Sizes(
    "cpu", Shape(16, 16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=40), 2,
    Shape(16, 16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=40), torch.float32, (5,), 6, 1, 2,
    1 << 20, "eager",
)  # fmt: skip


# What is checked.


def check_engine(sizes: Sizes) -> bool:
    """Print a line per kind of verifier; whether all tokens are those of the reference on the CPU, in float32."""
    model = random_llama(sizes.checked, torch.float32, "cpu", max_positions=1024)
    on_device = copy.deepcopy(model).to(sizes.device)
    vocab_size, prompts = sizes.checked.vocab_size, [random_prompt(n, sizes.checked.vocab_size) for n in (9, 1)]
    agree = True
    for kind, always in ((None, False), ("head", False), ("lora", False), ("full", False), ("full", True)):
        name = f"{kind or 'plain'}{' always' * always}"
        try:
            verifier = random_verifier(kind, model)
            moved = verifier
            if kind == "full":
                moved = FullVerifier(copy.deepcopy(verifier.network).to(sizes.device), verifier.head.weight.data)
            engine = make_engine(sizes, on_device, moved, max_batch_size=4, always_verify=always)
            reference = llm2_fast.load(model, verifier, backend="reference", max_batch_size=4)
            for temperature in (0.0, 1.0):
                config = GenerationConfig(
                    max_new_tokens=sizes.checked_tokens, ignore_eos=True, trace=True, temperature=temperature,
                    max_candidates=min(32, vocab_size), n=1 if temperature == 0 else 2,
                )  # fmt: skip
                wrong = _differences(engine.generate(prompts, config), reference.generate(prompts, config))
                agree &= not wrong
                verdict, what = "WRONG" if wrong else "ok", "; ".join(wrong) or "tokens equal"
                print(f"{verdict:5} engine, {name}, temperature {temperature:g}: {what}", flush=True)
        except Exception:  # the other kinds may do better
            agree = False
            print(f"WRONG engine, {name}: {traceback.format_exc()}", flush=True)
        engine = reference = None
        _free()
    return agree


def _differences(results: list[Generation], expected: list[Generation]) -> list[str]:
    """Where samples differ, but for steps in which the reference itself was close to another choice."""
    wrong = []
    for prompt, (result, other) in enumerate(zip(results, expected, strict=True)):
        for sample, reference in zip(result.samples, other.samples, strict=True):
            steps = zip(sample.token_ids, reference.token_ids, reference.trace, strict=True)
            first = next((i for i, (token, wanted, _) in enumerate(steps) if token != wanted), None)
            if first is None:
                continue
            largest = sorted(reference.trace[first].adjusted_logits, reverse=True)[:2]
            if len(largest) == 2 and largest[0] - largest[1] < _NEAR_TIE:
                continue
            wrong.append(f"prompt {prompt}, step {first}: {sample.token_ids[first]} != {reference.token_ids[first]}")
    return wrong


# What is timed.


@dataclass(frozen=True)
class Timing:
    """Of several runs: median seconds per step, fastest and slowest; steps by their number of candidates."""

    seconds: float
    fastest: float
    slowest: float
    candidates: Counter[int]

    @property
    def mean_candidates(self) -> float:
        return sum(n * steps for n, steps in self.candidates.items()) / max(1, self.candidates.total())

    @property
    def ambiguous(self) -> float:
        return 1 - self.candidates[1] / max(1, self.candidates.total())


def time_engine(engine: Engine, batches: list[list[list[int]]], **options: Any) -> Timing:
    """Seconds per step of batches of prompts, each decoded together, from when tokens reach the caller."""
    config = GenerationConfig(ignore_eos=True, **options)
    run_engine(engine, batches[0], config.merge(max_new_tokens=_SKIPPED_STEPS))  # compiles and captures
    seconds, candidates = [], Counter()
    for prompts in batches:
        per_step, counted = run_engine(engine, prompts, config)
        seconds.append(per_step)
        candidates += counted
    return _timing(seconds, candidates)


def run_engine(engine: Engine, prompts: list[list[int]], config: GenerationConfig) -> tuple[float, Counter[int]]:
    """What `Engine.generate` does, with a clock between turns."""
    requests = engine._make_requests(prompts, config, None)
    schedule = Schedule(engine._backend, requests, engine.max_batch_size)
    arrivals: list[float] = []
    while not schedule.finished:
        events = schedule.take_turn()
        arrivals += [time.perf_counter()] * len(events)
    skipped = min(_SKIPPED_STEPS * len(prompts), len(arrivals) - 1)
    steps = (len(arrivals) - skipped) / len(prompts)
    counted = sum((request.stats.candidate_histogram for request in requests), Counter())
    return (arrivals[-1] - arrivals[skipped - 1]) / steps, counted


def _timing(seconds: list[float], candidates: Counter[int] | None = None) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), candidates or Counter())


def time_transformers(sizes: Sizes, model: PreTrainedModel, prefix: int, *, compiled: bool) -> Timing:
    """Seconds per token of `generate`: what more tokens take more, with the default cache or a compiled static one."""
    options: dict[str, Any] = {"do_sample": False, "use_cache": True}
    if compiled:
        compile_config = CompileConfig(backend=sizes.compile_backend)
        compile_config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    def generate(new_tokens: int) -> int:
        # The static cache has one size for all calls: a longer one would be compiled again.
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)
        return output.shape[1] - ids.shape[1]

    seconds = []
    for _ in range(1 + sizes.rounds):  # the first compiles
        ids = torch.tensor([random_prompt(prefix, sizes.shape.vocab_size)], device=sizes.device)
        seconds.append(_per_token(generate, sizes.new_tokens))
    return _timing(seconds[1:])


def time_naive(sizes: Sizes, model: PreTrainedModel, verifier: Verifier, prefix: int) -> Timing:
    """Seconds per token of LLM2 as one would first write it on transformers."""
    verifier.head.to(sizes.device)
    counts: Counter[int] = Counter()

    def generate(new_tokens: int) -> int:
        scorer = naive.NaiveVerifier.of(model, verifier)
        tokens, num_candidates = naive.generate(model, scorer, prompt, max_new_tokens=new_tokens)
        counts.update(num_candidates)
        return len(tokens)

    seconds = []
    for _ in range(1 + sizes.rounds):
        prompt = random_prompt(prefix, sizes.shape.vocab_size)
        seconds.append(_per_token(generate, sizes.new_tokens))
    return _timing(seconds[1:], counts)


def _per_token(generate: Callable[[int], int], new_tokens: int) -> float:
    """Seconds that the last tokens of a long run take; a short one takes what comes before."""
    few = max(1, new_tokens // 8)
    taken = []
    for tokens in (few, new_tokens):
        _wait()
        start = time.perf_counter()
        generated = generate(tokens)
        _wait()
        taken.append(time.perf_counter() - start)
        if generated != tokens:
            raise RuntimeError(f"expected {tokens} new tokens, got {generated}")
    return (taken[1] - taken[0]) / (new_tokens - few)


def scale_lm_head(sizes: Sizes, model: PreTrainedModel, statistic: Callable[[Timing], float], target: float) -> float:
    """Scale the LLM's `lm_head` until a statistic of what the engine counts is `target`; what it is then.

    Larger logits leave fewer candidates. The engine's copy is scaled run by run, the model's once.
    """
    engine = make_engine(sizes, model, random_verifier("head", model), max_batch_size=sizes.batch)
    weight = lm_head_of(engine)
    original, low, high = weight.clone(), -4.0, 4.0  # bounds of the scale's logarithm, base 2
    prompts = [random_prompt(16, sizes.shape.vocab_size) for _ in range(sizes.batch)]
    found = math.nan
    for _ in range(10 if sizes.rounds > 1 else 2):
        weight.copy_(original * 2 ** ((low + high) / 2))
        found = statistic(time_engine(engine, [prompts], max_new_tokens=min(32, sizes.new_tokens)))
        low, high = ((low + high) / 2, high) if found > target else (low, (low + high) / 2)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    return found


def lm_head_of(engine: Engine) -> torch.Tensor:
    """The weight that an engine of the cuda backend multiplies with; its graphs read what is written to it."""
    return engine._backend._llm.weights.lm_head


class EngineRows:
    """The rows of figures of the engine, one for every row of the table of targets.

    Args:
        sizes: Of the run.
        bandwidth: Of a copy, bytes per second.
    """

    def __init__(self, sizes: Sizes, bandwidth: float) -> None:
        self._sizes = sizes
        self._model = random_llama(sizes.shape, sizes.dtype, sizes.device, max_positions=max(sizes.prefixes) + 1024)
        # Read once per step: all but the embedding table, which has the size of `lm_head`.
        weight_bytes = sum(p.nbytes for p in self._model.parameters()) - self._model.lm_head.weight.nbytes
        self._floor = weight_bytes / bandwidth
        self._plain: dict[tuple[int, int], float] = {}
        self._own: dict[str, float] = {}

    def run(self, late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The rows; those that fail or come when it is `late` say so."""
        for name, measure in self._jobs():
            if late():
                yield {"row": name, "left out": "no time"}
                continue
            try:
                yield measure(name=name)
            except Exception as error:  # the other rows may do better
                traceback.print_exc()
                yield {"row": name, "left out": f"{type(error).__name__}: {error}"}
            _free()

    def _jobs(self) -> Iterator[tuple[str, Callable[..., dict[str, Any]]]]:
        branches = {"alpha": 0.0, "candidate_top_k": BRANCHES, "max_candidates": BRANCHES}
        first, batch = self._sizes.prefixes[0], self._sizes.batch
        for prefix in self._sizes.prefixes:
            target = "at least 78 % of copy, accepted from 65 %"
            yield "plain", partial(self._decode, None, prefix, target=target)
            for kind, factor in (("head", 1.08), ("lora", 1.15), ("full", 1.9)):
                target = f"at most {factor} x plain"
                yield (
                    f"{kind}, {BRANCHES} branches{', always' * (kind == 'full')}",
                    partial(self._decode, kind, prefix, target=target, always=kind == "full", options=branches),
                )
        yield "full, 20 % ambiguous", self._scale_to_ambiguous
        for prefix in self._sizes.prefixes:
            yield "full, lazy", partial(self._decode, "full", prefix, target="at most 1.3 x plain")
        yield "head, mean 2.2", self._scale_to_mean
        yield "plain", partial(self._decode, None, first, batch)
        target = "throughput at least 0.85 x plain"
        for width in (32, BRANCHES):
            options = {"max_candidates": min(width, self._sizes.shape.vocab_size)}
            yield f"head, at most {width}", partial(self._decode, "head", first, batch, target=target, options=options)
        yield "transformers, eager", partial(self._transformers, first, False, target="at least 10 x plain")
        yield "transformers, compiled", partial(self._transformers, first, True, target="at least 2 x plain")
        for kind in ("head", "full"):
            yield f"{kind}, alpha 0.1", partial(self._decode, kind, first)
            yield f"naive LLM2, {kind}", partial(self._naive, kind, first, target=f"at least 15 x {kind}")

    def _row(self, name: str, timing: Timing, prefix: int, batch: int = 1, target: str = "") -> dict[str, Any]:
        row = {"row": name, "prefix": prefix, "batch": batch, "ms per step": round(1e3 * timing.seconds, 4)}
        row |= {"fastest": round(1e3 * timing.fastest, 4), "slowest": round(1e3 * timing.slowest, 4)}
        if (plain := self._plain.get((prefix, batch))) is not None:
            row["x plain"] = round(timing.seconds / plain, 3)
        if timing.candidates:
            row["mean candidates"] = round(timing.mean_candidates, 2)
            row["ambiguous %"] = round(100 * timing.ambiguous, 1)
        return row | {"tokens per second": round(batch / timing.seconds, 1), "target": target}

    def _decode(
        self, kind: str | None, prefix: int, batch: int = 1, *, name: str, target: str = "", always: bool = False,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        sizes, verifier = self._sizes, random_verifier(kind, self._model)
        engine = make_engine(sizes, self._model, verifier, max_batch_size=batch, always_verify=always)
        prompts = [[random_prompt(prefix, sizes.shape.vocab_size) for _ in range(batch)] for _ in range(sizes.rounds)]
        timing = time_engine(engine, prompts, max_new_tokens=sizes.new_tokens, **options or {})
        if kind is None:
            self._plain[prefix, batch] = timing.seconds
        if batch == 1 and kind is not None:
            self._own[kind] = timing.seconds
        row = self._row(name, timing, prefix, batch, target)
        if kind is None and batch == 1:
            row["% of copy"] = round(100 * self._floor / timing.seconds, 1)  # of the time to read the weights
        return row

    def _transformers(self, prefix: int, compiled: bool, *, name: str, target: str = "") -> dict[str, Any]:
        timing = time_transformers(self._sizes, self._model, prefix, compiled=compiled)
        torch.compiler.reset()
        return self._row(name, timing, prefix, target=target)

    def _naive(self, kind: str, prefix: int, *, name: str, target: str = "") -> dict[str, Any]:
        timing = time_naive(self._sizes, self._model, random_verifier(kind, self._model), prefix)
        own = {"x own": round(timing.seconds / self._own[kind], 2)} if kind in self._own else {}
        return self._row(name, timing, prefix, target=target) | own

    def _scale_to_ambiguous(self, name: str) -> dict[str, Any]:
        share = scale_lm_head(self._sizes, self._model, lambda timing: timing.ambiguous, _AMBIGUOUS)
        return {"row": "lm_head scaled", "ambiguous %": round(100 * share, 1)}

    def _scale_to_mean(self, name: str) -> dict[str, Any]:
        mean = scale_lm_head(self._sizes, self._model, lambda timing: timing.mean_candidates, _MEAN_CANDIDATES)
        return {"row": "lm_head scaled", "mean candidates": round(mean, 2)}


def make_engine(sizes: Sizes, model: PreTrainedModel, verifier: Verifier | None, **options: Any) -> Engine:
    """Of the cuda backend, with a bounded cache."""
    return llm2_fast.load(model, verifier, backend="cuda", kv_cache_memory_bytes=sizes.cache_bytes, **options)


def random_prompt(length: int, vocab_size: int) -> list[int]:
    """Token ids."""
    return torch.randint(vocab_size, (length,)).tolist()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    """Give memory back that nothing refers to any more; engines hold cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
