"""Runs of `lora` and `full` verifiers: interrupted and resumed, in parts, and in several processes."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from transformers import Trainer

import llm2_fast
import tiny
from llm2_fast import ArgumentError
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.network import training_arguments
from successors import TOKENIZER, supervision

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


def train(kind, directory, *, examples=12, **options):
    """Three steps per epoch; plain gradient descent, so that weights differ as little as gradients do."""
    # One example has two pairs, the next three: a mean of their means is not the mean.
    data = [replace(entry, samples=entry.samples[: i + 2]) for i, entry in enumerate(supervision(examples, seed=0))]
    defaults = {"epochs": 2, "batch_size": 4, "per_device_batch_size": 2, "learning_rate": 0.1}
    return llm2_fast.train_verifier(
        tiny.causal_lm("llama"),
        data,
        kind,
        heldout=supervision(5, seed=1),
        tokenizer=TOKENIZER,
        output_dir=directory,
        **{**defaults, "trainer_options": {"optim": "sgd", "logging_steps": 1}, **options},
    )


def train_both(directory, **options):
    """What `test_two_processes_equal_one` runs, once by itself and once in two processes."""
    return {kind: train(kind, Path(directory) / kind, **options) for kind in WEIGHTS}


def weights(kind, directory):
    return load_file(directory / WEIGHTS[kind])


def assert_same_weights(kind, actual, expected):
    expected = weights(kind, expected)
    for name, tensor in weights(kind, actual).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def losses(directory):
    """By step."""
    record = json.loads((directory / "training.json").read_text())
    return {entry["step"]: entry["loss"] for entry in record["results"]["log"] if "loss" in entry}


class Killed(Exception):
    """As if the process had ended."""


def kill_after(steps, monkeypatch):
    training_step, count = Trainer.training_step, iter(range(1000))

    def step(*args, **kwargs):
        if next(count) == steps:
            raise Killed
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)


def test_defaults_are_those_of_the_paper(tmp_path):
    config = TrainingConfig.for_kind("full")
    assert (config.learning_rate, config.epochs, config.batch_size) == (2e-5, 2, 128)
    arguments = training_arguments(config, tmp_path, torch.device("cpu"), False, None)
    assert arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size == 128
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(1000) == 100


def test_the_learning_rate_rises_then_falls(tmp_path):
    """Ten steps: the first is warm-up, from zero; then half a cosine."""
    train("full", tmp_path / "run", examples=20, learning_rate=0.5)
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    rates = [entry["learning_rate"] for entry in record["results"]["log"] if "learning_rate" in entry]
    expected = [0.0, *(0.25 * (1 + math.cos(math.pi * step / 9)) for step in range(9))]
    assert rates == pytest.approx(expected)


def test_a_run_that_ended_before_its_first_step_can_be_resumed(tmp_path, monkeypatch):
    """Trainer makes the directory of checkpoints when it is made."""
    with monkeypatch.context() as patch:

        def stop(*_args, **_options):
            raise KeyboardInterrupt

        patch.setattr(Trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            train("full", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()
    train("full", tmp_path / "run", resume=True)
    train("full", tmp_path / "whole")
    assert_same_weights("full", tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_is_the_unbroken_one(kind, tmp_path, monkeypatch):
    options = {"trainer_options": {"logging_steps": 1}, "learning_rate": 3e-3, "save_steps": 2}  # AdamW has a state
    expected = train(kind, tmp_path / "unbroken", **options)
    with monkeypatch.context() as patch:
        kill_after(9, patch)  # in the fifth of six steps; the fourth left a checkpoint amid an epoch
        with pytest.raises(Killed):
            train(kind, tmp_path / "broken", **options)
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    (checkpoints / "checkpoint-5").mkdir()  # what a process leaves that dies while it writes
    actual = train(kind, tmp_path / "broken", resume=True, **options)
    assert actual.heldout == expected.heldout
    first, second = (weights(kind, tmp_path / name) for name in ("unbroken", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert len(losses(tmp_path / "broken")) == 6
    # Once more: nothing is left to do, and the result is the same.
    assert train(kind, tmp_path / "broken", resume=True, **options).heldout == expected.heldout


def test_resuming_takes_the_same_run(tmp_path):
    first = train("full", tmp_path / "run", resume=True, epochs=1)  # nothing to resume: a new run
    with pytest.raises(ArgumentError, match="output_dir: expected an empty directory, or one with a run and resume=T"):
        train("full", tmp_path / "run", epochs=1)
    for options, message in [
        ({"epochs": 2}, "config: expected .*'epochs': 1.*, as when the run in .* began, got .*'epochs': 2"),
        ({"examples": 11}, "train_hash: expected"),
        ({"kind": "lora"}, "kind: expected 'full', as when"),
        ({"trainer_options": {"optim": "adamw_torch"}}, "trainer_options: expected"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            train(**{"kind": "full", "directory": tmp_path / "run", "resume": True, "epochs": 1, **options})
    assert train("full", tmp_path / "run", resume=True, epochs=1).heldout == first.heldout
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    for resume in (False, True):
        with pytest.raises(ArgumentError, match="output_dir: expected an empty directory"):
            train("full", tmp_path / "other", resume=resume)


def test_a_step_does_not_depend_on_how_it_is_computed(tmp_path):
    """In passes of several sizes, the last one short, and with activations recomputed."""
    expected = train("full", tmp_path / "whole", examples=10, batch_size=12, per_device_batch_size=12)
    for size, options in ((4, {}), (3, {}), (1, {"gradient_checkpointing": True})):
        directory = tmp_path / str(size)
        actual = train("full", directory, examples=10, batch_size=12, per_device_batch_size=size, **options)
        assert actual.num_pairs == expected.num_pairs
        assert_same_weights("full", directory, tmp_path / "whole")
        assert losses(directory) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_bfloat16(tmp_path):
    expected = train("full", tmp_path / "float32", epochs=1)
    actual = train("full", tmp_path / "bfloat16", epochs=1, bf16=True)
    assert actual.verifier.network.dtype == torch.float32
    first, second = (losses(tmp_path / name) for name in ("float32", "bfloat16"))
    assert first != second
    assert first == pytest.approx(second, rel=0.02)
    assert actual.heldout.num_pairs == expected.heldout.num_pairs


def start_two_processes(call):
    """Two processes of one group, each of which imports this module as `t` and evaluates `call`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = {**os.environ, **address, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"import test_train_runs as t; t.{call}"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def join(processes):
    for process in processes:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output


def test_two_processes_equal_one(tmp_path):
    options = {"examples": 10, "batch_size": 12, "epochs": 3}  # ten examples fill no whole number of passes
    processes = start_two_processes(f"train_both({str(tmp_path / 'two')!r}, **{options!r})")
    results = train_both(tmp_path / "one", **options)
    join(processes)
    for kind, expected in results.items():
        one, two = tmp_path / "one" / kind, tmp_path / "two" / kind
        assert_same_weights(kind, two, one)
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        record = json.loads((two / "training.json").read_text())
        assert record["run"]["num_processes"] == 2
        assert record["results"]["num_pairs"] == expected.num_pairs
        assert record["results"]["heldout"]["num_pairs"] == expected.heldout.num_pairs
        assert record["results"]["heldout"]["verifier"] == pytest.approx(expected.heldout.verifier, abs=0.02)


# AdamW, whose state resuming has to restore, with steps that differ as little as gradients do.
SHARDED = {"adam_epsilon": 1e-2, "logging_steps": 1}
SHARDED_RUNS = {"full": ("full", {}), "lora": ("lora", {}), "bfloat16": ("full", {"bf16": True})}


def train_sharded(directory, **options):
    """What `test_fsdp_equals_other_runs` does in two processes.

    First a run without FSDP, then runs with it that are killed in their last pass and resumed.
    """
    directory = Path(directory)
    train("full", directory / "replicated", bf16=True, **options, trainer_options=SHARDED)
    initialize, training_step = PartialState.__init__, Trainer.training_step

    def initialize_for_fsdp(self, *args, **kwargs):  # accelerate asks for GPUs; FSDP itself does not
        initialize(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def sharded_step(self, model, *args, **kwargs):
        assert isinstance(model, FSDPModule)
        assert all(parameter.placements == (Shard(0),) for parameter in model.parameters())
        return training_step(self, model, *args, **kwargs)

    PartialState.__init__, Trainer.training_step = initialize_for_fsdp, sharded_step
    for name, (kind, more) in SHARDED_RUNS.items():
        run = {**options, **more, "trainer_options": {**SHARDED, "fsdp": True}}
        with pytest.MonkeyPatch.context() as patch:
            kill_after(8, patch)  # in the last pass of a step: accelerate would go on accumulating in this process
            with pytest.raises(Killed):
                train(kind, directory / name, **run)
        torch.distributed.barrier()  # both have failed before either begins again
        train(kind, directory / name, resume=True, **run)


@pytest.mark.slow
def test_fsdp_equals_other_runs(tmp_path):
    """A single process, and for bfloat16, which rounds by the shapes of a pass, two that share nothing."""
    options = {"examples": 10, "batch_size": 12, "epochs": 3, "learning_rate": 0.02}  # steps of three passes
    processes = start_two_processes(f"train_sharded({str(tmp_path)!r}, **{options!r})")
    for kind in WEIGHTS:
        train(kind, tmp_path / "one" / kind, **options, trainer_options=SHARDED)
    join(processes)
    decoding = {"beta": 5.0, "max_new_tokens": 12, "ignore_eos": True}
    for name, expected in {"full": "one/full", "lora": "one/lora", "bfloat16": "replicated"}.items():
        directories = actual, expected = tmp_path / name, tmp_path / expected
        assert_same_weights(SHARDED_RUNS[name][0], actual, expected)
        assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)
        assert sorted(path.name for path in (actual / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
        engines = [llm2_fast.load(tiny.causal_lm("llama"), path, backend="reference") for path in directories]
        first, second = (engine.generate([[5, 6]], **decoding)[0].samples[0] for engine in engines)
        assert first.token_ids == second.token_ids


def test_fsdp_is_for_gpus(tmp_path):
    """accelerate would train without it and not say so."""
    message = "trainer_options: expected fsdp only in processes .* on GPUs, got fsdp"
    with pytest.raises(ArgumentError, match=message):
        train("full", tmp_path / "run", trainer_options={"fsdp": True})
    assert not (tmp_path / "run").exists()


def test_a_head_is_trained_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="kind: expected 'lora' or 'full' in several processes, got 'head'"):
        llm2_fast.train_verifier(tiny.causal_lm("llama"), supervision(4, seed=0), "head", tokenizer=TOKENIZER)
