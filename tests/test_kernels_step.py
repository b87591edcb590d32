"""A joint step composed of the Triton kernels, as bench/gpu.py captures it, against the same step in the reference."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llm2_fast import reference
from triton_device import DEVICE

EPS = 1e-5


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "_DEVICE", DEVICE.type)
    return module


def test_joint_step(bench: ModuleType) -> None:
    """Two sequences of three branches over two layers, and the launches' own checks."""
    shape = bench.Shape(48, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=150)
    load = bench.Load(sequences=2, branches=3, prefix=70, max_candidates=8)
    step = bench.JointStep(shape, load, torch.float32)
    keys, values = step.key_cache.cpu().clone(), step.value_cache.cpu().clone()
    step.run()

    def cpu(x: torch.Tensor) -> torch.Tensor:
        return x.cpu()

    table, sequence, position = map(cpu, (step.block_table, step.row_sequence, step.row_position))
    stored, has_own = map(cpu, (step.row_stored, step.row_has_own))
    stream, own_keys, own_values = cpu(step.embedded), [], []
    for index, layer in enumerate(step.layers):
        qkv = reference.linear(reference.rms_norm(stream, cpu(layer["norms"][0]), EPS), cpu(layer["qkv"]))
        query, own_key, own_value = reference.rope_and_store(
            qkv, cpu(step.cosine), cpu(step.sine), None, None, EPS, shape.num_heads, keys[index], values[index],
            table, sequence, position, stored,
        )  # fmt: skip
        attended = reference.branch_attention(
            query, keys[index], values[index], table, sequence, position, has_own, own_key, own_value,
            shape.head_dim**-0.5, 0,
        )  # fmt: skip
        stream = reference.linear(attended.flatten(1), cpu(layer["o"]), residual=stream)
        normed = reference.rms_norm(stream, cpu(layer["norms"][1]), EPS)
        gated = reference.linear(normed, cpu(layer["gate_up"]), activation="silu_mul")
        stream = reference.linear(gated, cpu(layer["down"]), residual=stream)
        own_keys.append(own_key)
        own_values.append(own_value)
    hidden = reference.rms_norm(stream, cpu(step.layers[0]["norms"][0]), EPS)
    scores = reference.score_head(hidden, None, None, cpu(step.score_weight))
    torch.testing.assert_close(cpu(step.scores), scores, rtol=1e-4, atol=1e-4)

    ids, logits, _, _, *options = (x if x is None else cpu(x) for x in step.pick.arguments)
    padded = torch.zeros(2, 8)
    padded[:, :3] = scores.view(2, 3)
    picked = reference.adjust_and_pick(ids, logits, cpu(step.count), padded, *options)
    assert torch.equal(cpu(step.picked.index), picked.index)
    rows = picked.index + torch.tensor([0, 3])
    torch.testing.assert_close(cpu(step.hidden_states), hidden[rows], rtol=1e-4, atol=1e-4)
    assert step.lengths.tolist() == [71, 71]
    for cache, own in ((step.key_cache, own_keys), (step.value_cache, own_values)):
        block, inner = table[:, 70 // 16].long(), 70 % 16
        committed = cpu(cache)[:, block, :, inner]
        torch.testing.assert_close(committed, torch.stack(own)[:, rows], rtol=1e-4, atol=1e-4)
    candidates = reference.lm_head_select(hidden[rows], cpu(step.lm_head), *map(cpu, step.options[:2]), 8)
    assert torch.equal(cpu(step.candidates.ids), candidates.ids)


def test_launches_pass_their_checks(bench: ModuleType) -> None:
    """The script that will check the kernels on a GPU accepts those of small sequences, and notices a wrong result."""
    shape = bench.Shape(32, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=70)
    names = []
    for launch in bench.launches(DEVICE.type, torch.float32, shape, bench.Load(1, 2, 20, 4)):
        if "256" not in launch.name and "LoRA" not in launch.name:
            assert bench.check_launch(launch) <= bench.LARGEST_ERROR[torch.float32], launch.name
            names.append(launch.name)
    assert len(names) == 18
    assert bench.relative_error(torch.ones(3), torch.tensor([1.0, 1.0, 1.1])) > 0.01
    assert bench.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
