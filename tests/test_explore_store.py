"""What an exploration writes survives being killed at any time, and does not mix with anything else."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arithmetic
import llm2_fast
from llm2_fast import ArgumentError, explore, store
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.problems import load_problems
from llm2_fast.store import ShardStore
from llm2_fast.supervision import Manifest, SupervisionExample, TokenPair, TokenQuality, read_supervision

MANIFEST = Manifest("tiny", "f" * 32, "0" * 32, "1" * 32, {"alpha": 0.1, "thresholds": [0.5]}, "0.1.0")
MESSAGES = [{"role": "user", "content": "w5 \N{EN DASH} w6"}, {"role": "assistant", "content": "w7"}]
PROBLEMS = arithmetic.problems(12)
OPTIONS = {"n": 6, "max_new_tokens": 8, "threshold": 0.25, "max_positions": 4}


def example(number):
    quality = TokenQuality(0.25, 5, 20, 20, True, -1.5)
    return SupervisionExample(MESSAGES, [TokenPair(4, 7, 12)], [quality], id=f"{number:016x}")


def open_store(path, manifest):
    return ShardStore(path, manifest, SupervisionExample.from_json)


def names(path):
    return sorted(file.name for file in path.iterdir())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "_SHARD_SIZE", 3)


def test_shards_are_full_but_for_the_last(tmp_path):
    with open_store(tmp_path / "new" / "out", MANIFEST) as opened:
        for number in range(7):
            opened.append(example(number))
    path = tmp_path / "new" / "out"
    assert names(path) == [".lock", "manifest.json", *(f"shard-0000{i}.jsonl" for i in range(3))]
    assert [len(file.read_text().splitlines()) for file in sorted(path.glob("shard*"))] == [3, 3, 1]
    read = read_supervision(path)
    assert (read.examples, read.manifest) == ([example(number) for number in range(7)], MANIFEST)
    with open_store(path, MANIFEST) as opened:  # later ones go to a new shard
        assert opened.ids == {example(number).id for number in range(7)}
        opened.append(example(7))
    assert len(read_supervision(path).examples) == 8


@given(num_examples=st.integers(1, 5), data=st.data())
def test_a_crash_at_any_byte_loses_only_the_example_under_way(tmp_path_factory, num_examples, data):
    path = tmp_path_factory.mktemp("store")
    opened = open_store(path, MANIFEST)
    for number in range(num_examples):
        opened.append(example(number))
    opened._lock.close()  # the process has died
    part = opened._part_path
    length = part.stat().st_size
    line = len(example(0).to_json().encode()) + 1
    cut = data.draw(st.integers(0, length))
    os.truncate(part, cut)
    survivors = num_examples - (length // line) + cut // line
    with open_store(path, MANIFEST) as resumed:
        assert len(resumed.ids) == survivors
        for number in range(survivors, num_examples):
            resumed.append(example(number))
    assert read_supervision(path).examples == [example(number) for number in range(num_examples)]


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    with open_store(tmp_path, MANIFEST) as opened:
        opened.append(example(0))

        def full(_descriptor):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            opened.append(example(1))
        monkeypatch.undo()
        monkeypatch.setattr(store, "_SHARD_SIZE", 3)
        opened.append(example(2))
    assert read_supervision(tmp_path).examples == [example(0), example(2)]


def test_shards_are_not_overwritten_where_one_is_missing(tmp_path):
    with open_store(tmp_path, MANIFEST) as opened:
        for number in range(7):
            opened.append(example(number))
    (tmp_path / "shard-00000.jsonl").unlink()
    with open_store(tmp_path, MANIFEST) as opened:
        opened.append(example(0))
    assert [found.id for found in read_supervision(tmp_path).examples] == [example(i).id for i in (3, 4, 5, 6, 0)]


def test_a_shard_under_way_is_left_out_loudly(tmp_path):
    with open_store(tmp_path, MANIFEST) as opened:
        for number in range(4):
            opened.append(example(number))
        with pytest.warns(UserWarning, match=r"shard-00001.jsonl.part is left out"):
            assert len(read_supervision(tmp_path).examples) == 3
    assert len(read_supervision(tmp_path).examples) == 4


def test_progress_shows_the_time_left(tmp_path, engine, capsys):
    explore(engine, PROBLEMS[:2], tmp_path, progress=True, **OPTIONS)
    assert re.search(r"explore: 100%.*2/2 \[\d\d:\d\d<\d\d:\d\d, .*tokens/s", capsys.readouterr().err)


def test_an_example_is_written_once(tmp_path):
    with open_store(tmp_path, MANIFEST) as opened:
        opened.append(example(0))
        with pytest.raises(ArgumentError, match="record: expected an id that is not on disk yet"):
            opened.append(example(0))


def test_one_process_at_a_time(tmp_path):
    with (
        open_store(tmp_path, MANIFEST),
        pytest.raises(ArgumentError, match="output_dir: expected a directory that no other process writes"),
    ):
        open_store(tmp_path, MANIFEST)
    open_store(tmp_path, MANIFEST).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "a" * 32}, "model_fingerprint 'ffff"),
        ({"tokenizer_hash": "a" * 32}, "tokenizer_hash"),
        ({"chat_template_hash": "a" * 32}, "chat_template_hash"),
        ({"options": {"alpha": 0.2, "thresholds": [0.5]}}, "alpha 0.1 there, 0.2 here"),
        ({"options": {"alpha": 0.1, "thresholds": [0.5], "new": 1}}, "new None there, 1 here"),
    ],
)
def test_other_models_and_options_do_not_mix(tmp_path, change, message):
    open_store(tmp_path, MANIFEST).close()
    with pytest.raises(ArgumentError, match=message):
        open_store(tmp_path, dataclasses.replace(MANIFEST, **change))
    open_store(tmp_path, dataclasses.replace(MANIFEST, model="elsewhere", llm2_fast_version="9")).close()


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="output_dir: expected a directory"):
        open_store(tmp_path / "file", MANIFEST)
    (tmp_path / "shard-00000.jsonl").write_text(example(0).to_json())
    with pytest.raises(ArgumentError, match="expected an empty directory, or one with a manifest"):
        open_store(tmp_path, MANIFEST)


# --- Whole explorations ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return llm2_fast.load(arithmetic.model(), tokenizer=arithmetic.tokenizer(), backend="cpu")


def by_id(path):
    examples = read_supervision(path).examples
    found = {example.id: example for example in examples}
    assert len(found) == len(examples)  # none twice
    return found


def test_an_interrupted_exploration_is_resumed(tmp_path, engine):
    explore(engine, PROBLEMS, tmp_path / "whole", **OPTIONS)
    first = explore(engine, PROBLEMS[:5], tmp_path / "parts", **OPTIONS)
    second = explore(engine, PROBLEMS, tmp_path / "parts", **OPTIONS)
    third = explore(engine, PROBLEMS, tmp_path / "parts", **OPTIONS)
    assert (first.problems, second.problems, second.resumed) == (5, len(PROBLEMS) - 5, 5)
    assert (third.problems, third.resumed, third.rollouts) == (0, len(PROBLEMS), 0)
    assert by_id(tmp_path / "parts") == by_id(tmp_path / "whole")
    whole, parts = (ExplorationReport.read(tmp_path / name) for name in ("whole", "parts"))
    assert parts.seconds > second.seconds
    assert dataclasses.replace(parts, seconds=0) == dataclasses.replace(whole, seconds=0)
    with pytest.raises(ArgumentError, match="n 6 there, 7 here"):
        explore(engine, PROBLEMS, tmp_path / "parts", **{**OPTIONS, "n": 7})
    quantized = {"tokenizer": engine.tokenizer, "quantization": "int8-channel"}
    with pytest.raises(ArgumentError, match="quantization None there, 'int8-channel' here"):
        explore(arithmetic.model(), PROBLEMS, tmp_path / "parts", load_options=quantized, **OPTIONS)


def _explore_slowly(engine, path):
    torch.set_num_threads(1)  # threads do not survive a fork
    append = ShardStore.append

    def append_and_wait(self, example):
        append(self, example)
        time.sleep(0.1)

    ShardStore.append = append_and_wait
    explore(engine, PROBLEMS, path, max_batch_size=8, **OPTIONS)


def whole_lines(path):
    lines = [line for file in path.glob("shard-*") for line in file.read_bytes().split(b"\n")]
    return [line for line in lines if line.endswith(b"}")]


@pytest.mark.timeout(300)
def test_killed_at_random_it_loses_nothing_and_repeats_nothing(tmp_path, engine):
    explore(engine, PROBLEMS, tmp_path / "whole", **OPTIONS)
    draw, path, on_disk = random.Random(0), tmp_path / "killed", 0
    for new in (0, 1, 2, 1, 3):
        process = multiprocessing.get_context("fork").Process(target=_explore_slowly, args=(engine, path))
        process.start()
        while len(whole_lines(path)) < on_disk + new and process.is_alive():
            time.sleep(0.01)
        process.join(draw.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it had not finished
        lines = whole_lines(path)
        assert len(lines) >= on_disk + new  # what was on disk stays there
        assert {json.loads(line)["id"] for line in lines} <= {problem.id for problem in load_problems(PROBLEMS)}
        on_disk = len(lines)
    explore(engine, PROBLEMS, path, **OPTIONS)
    assert by_id(path) == by_id(tmp_path / "whole")
