"""Exploration on a local Ray cluster: the records of a local run, also when a worker is killed."""

from __future__ import annotations

import os
import signal

import pytest

import arithmetic
import llm2_fast
from llm2_fast import ArgumentError, MissingDependencyError
from llm2_fast.exploration import cluster as explore_cluster
from llm2_fast.problems import load_problems
from llm2_fast.supervision import read_supervision

PROBLEMS = arithmetic.problems(6)
OPTIONS = {"n": 4, "max_new_tokens": 6, "threshold": 0.3, "max_positions": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    arithmetic.model().save_pretrained(path)
    arithmetic.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def by_id(path):
    examples = read_supervision(path).examples
    found = {example.id: example for example in examples}
    assert len(found) == len(examples)  # none twice
    return found


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_worker_changes_nothing(tmp_path, saved, cluster):
    marker, last = tmp_path / "killed", load_problems(PROBLEMS)[-1]

    def quality(problem, text):
        if problem == last and not marker.exists():  # the first process that comes here
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return float(problem.gold.is_right(text))

    ray_options = {"engine": "ray", "num_workers": 2, "load_options": {"backend": "cpu"}}
    report = llm2_fast.explore(saved, PROBLEMS, tmp_path / "ray", quality=quality, **ray_options, **OPTIONS)
    assert int(marker.read_text()) != os.getpid()
    assert report.problems == len(PROBLEMS)
    local = llm2_fast.explore(
        saved, PROBLEMS, tmp_path / "local", quality=quality, load_options={"backend": "cpu"}, **OPTIONS
    )
    assert by_id(tmp_path / "ray") == by_id(tmp_path / "local")
    assert (report.rollouts, report.pairs) == (local.rollouts, local.pairs)
    first, second = (read_supervision(tmp_path / name).manifest for name in ("ray", "local"))
    assert first.differences(second) == ""
    # The two go on from each other.
    more = llm2_fast.explore(saved, PROBLEMS, tmp_path / "local", quality=quality, **ray_options, **OPTIONS)
    assert (more.problems, more.resumed) == (0, len(PROBLEMS))


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_workers_that_die_again_and_again_are_given_up(tmp_path, saved, cluster, monkeypatch):
    monkeypatch.setattr("llm2_fast.exploration.cluster._MAX_DEATHS", 2)

    def die(problem, text):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(cluster.exceptions.RayActorError):
        llm2_fast.explore(saved, PROBLEMS[:1], tmp_path, quality=die, engine="ray", num_workers=1, **OPTIONS)


def test_bad_arguments_are_refused(tmp_path, saved):
    for options, message in [
        ({"engine": "spark"}, "engine: expected 'local' or 'ray'"),
        ({"engine": "ray", "num_workers": 0}, "num_workers: expected"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            llm2_fast.explore(saved, PROBLEMS, tmp_path / "out", **options)
    with pytest.raises(ArgumentError, match="model: expected a path or hub id"):
        llm2_fast.explore(arithmetic.model(), PROBLEMS, tmp_path / "out", engine="ray")


@pytest.mark.parametrize(
    ("machines", "num_workers", "cores"),
    [
        ([{"CPU": 16.0}], 3, 5),
        ([{"CPU": 16.0}, {"CPU": 2.0}], 2, 8),  # 9 each would fit the first machine once
        ([{"CPU": 16.0}, {"CPU": 2.0}, {}], 18, 1),
        ([{"CPU": 8.0, "GPU": 2.0}], 2, 4),
        ([{"CPU": 2.0}], 3, "at most 2, since the cluster has 0 GPUs and 2 cores"),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, "at most 2, since the cluster has 2 GPUs and 8 cores"),
    ],
)
def test_no_more_workers_than_can_be_placed(machines, num_workers, cores):
    if isinstance(cores, int):
        assert explore_cluster._cores_per_worker(machines, num_workers) == cores
    else:
        with pytest.raises(ArgumentError, match=f"num_workers: expected {cores}, got {num_workers}"):
            explore_cluster._cores_per_worker(machines, num_workers)


def test_without_ray_the_error_says_what_to_install(tmp_path, saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llm2-fast\[ray\]'"):
        llm2_fast.explore(saved, PROBLEMS, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()
