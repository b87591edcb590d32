"""`bench/gpu.py` before there is a GPU: its figures and its report, over an engine that is quick on a CPU."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llm2_fast
from triton_device import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="bench/gpu.py itself runs on a GPU")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    torch.manual_seed(0)
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("gpu", "gpu_engine", "gpu_report")})


@pytest.fixture
def quick_engine(bench, monkeypatch):
    """The reference backend in place of the cuda backend, which the interpreter takes a second per step for."""

    def make_engine(sizes, model, verifier, *, always_verify=False, **options):
        engine = llm2_fast.load(model, verifier, backend="reference", **options)
        engine.lm_head = model.lm_head.weight.data
        return engine

    monkeypatch.setattr(bench.gpu_engine, "make_engine", make_engine)
    monkeypatch.setattr(bench.gpu_engine, "lm_head_of", lambda engine: engine.lm_head)
    # A row may be the difference of two times, of which what others take on the machine would change the sign.
    monkeypatch.setattr(bench.gpu_engine, "time", SimpleNamespace(perf_counter=time.process_time))


def test_every_row_of_the_engine(bench, quick_engine):
    sizes = bench.gpu_engine.TINY._replace(new_tokens=9)
    rows = list(bench.gpu_engine.EngineRows(sizes, 1e9).run(lambda: False))
    names = [
        ("plain", 1), ("head, 8 branches", 1), ("lora, 8 branches", 1), ("full, 8 branches, always", 1),
        ("lm_head scaled", None), ("full, lazy", 1), ("lm_head scaled", None), ("plain", 2), ("head, at most 32", 2),
        ("head, at most 8", 2), ("transformers, eager", 1), ("transformers, compiled", 1), ("head, alpha 0.1", 1),
        ("naive LLM2, head", 1), ("full, alpha 0.1", 1), ("naive LLM2, full", 1),
    ]  # fmt: skip
    assert [(row["row"], row.get("batch")) for row in rows] == names
    assert not any("left out" in row for row in rows)
    assert not [row for row in rows if row.get("ms per step", 1) <= 0]
    assert all(row["x plain"] == 1.0 for row in rows if row["row"] == "plain")
    assert rows[0]["% of copy"] > 0
    assert all(row["mean candidates"] == 8 for row in rows if "8 branches" in row["row"])
    assert all("x own" in row for row in rows if row["row"].startswith("naive"))


def test_rows_that_fail_or_come_late_say_so(bench, monkeypatch):
    def make_engine(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bench.gpu_engine, "make_engine", make_engine)
    rows = bench.gpu_engine.EngineRows(bench.gpu_engine.TINY, 1e9)
    assert next(rows.run(lambda: False)) == {"row": "plain", "left out": "RuntimeError: no kernel"}
    assert all(row["left out"] == "no time" for row in rows.run(lambda: True))
    assert not bench.gpu_engine.check_engine(bench.gpu_engine.TINY)


def test_scaling_finds_the_number_of_candidates(bench, quick_engine):
    sizes = bench.gpu_engine.TINY._replace(new_tokens=12, rounds=2, batch=8)
    model = bench.gpu_engine.random_llama(sizes.shape, sizes.dtype, sizes.device, max_positions=64)
    mean = bench.gpu_engine.scale_lm_head(sizes, model, lambda timing: timing.mean_candidates, 2.2)
    assert 1.8 < mean < 2.6


def test_a_wrong_token_is_found_unless_the_reference_was_close(bench):
    def result(tokens, gap=1.0):
        step = SimpleNamespace(adjusted_logits=(3.0, 3.0 - gap))
        samples = [SimpleNamespace(token_ids=tokens, trace=[step] * len(tokens))]
        return [SimpleNamespace(samples=samples)]

    differences = bench.gpu_engine._differences
    assert differences(result([1, 2]), result([1, 2])) == []
    assert differences(result([1, 2]), result([1, 3])) == ["prompt 0, step 1: 2 != 3"]
    assert differences(result([1, 2]), result([1, 3], gap=1e-5)) == []


def test_report(bench):
    rows = [{"row": "plain", "ms per step": 1.5}, {"row": "head", "x plain": 1.05}]
    results = {"machine": {"gpu": "none"}, "checks": {"engine": "ok"}, "engine": rows, "kernels": []}
    assert bench.gpu_report.markdown(results) == (
        "gpu none. Checks: engine ok.\n\n## Engine\n\n"
        "| row | ms per step | x plain |\n| --- | --- | --- |\n| plain | 1.5 |  |\n| head |  | 1.05 |\n"
    )
