"""`RayExplorer`: exploration spread over a Ray cluster."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2_fast.errors import ArgumentError, MissingDependencyError
from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.local import LocalExplorer
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.problems import Problem
from llm2_fast.supervision import Manifest, SupervisionExample

_MAX_CHUNK = 64  # problems handed to a worker at once
_CHUNKS_PER_WORKER = 4  # so that workers end at about the same time
_MAX_DEATHS = 3  # of workers in a row, none of which finished a problem


class _Worker(LocalExplorer):
    """A `LocalExplorer` in a process of its own, which sends what it counts along with each example."""

    def explore_chunk(self, problems: list[Problem]) -> Iterator[tuple[SupervisionExample, ExplorationReport]]:
        report = ExplorationReport()
        for example in self.explore(problems, report):
            yield example, report
            vars(report).update(vars(ExplorationReport()))


@dataclass(eq=False)
class _Chunk:
    """Problems that a worker has in hand, by id, and the stream of its results."""

    worker: Any
    problems: dict[str, Problem]
    results: Any


class RayExplorer:
    """Explores problems with a worker per GPU, or per group of cores where there is none.

    The cluster is the one that `RAY_ADDRESS` names or that runs on this machine; otherwise one is started, for as long
    as it is needed. Examples are those of `LocalExplorer`, whatever worker makes them. When a worker dies, its problems
    go to another.

    Args:
        model: A path or hub id that every machine of the cluster can load.
        load_options: Keywords of `llm2_fast.load`.
        config: Options.
        max_batch_size: Continuations decoded together, by each worker.
        num_workers: By default one per GPU or, without any, one per machine.

    Raises:
        ArgumentError: The model is no path.
        MissingDependencyError: Ray is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        load_options: Mapping[str, Any],
        config: ExplorationConfig,
        max_batch_size: int,
        num_workers: int | None,
    ) -> None:
        if not isinstance(model, (str, os.PathLike)):
            raise ArgumentError("model", "a path or hub id, which workers can load", type(model).__name__)
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("exploration on a cluster needs: pip install 'llm2-fast[ray]'") from error
        self._ray = ray
        self._own_cluster = not ray.is_initialized()
        if self._own_cluster:
            ray.init()
        name = str(Path(model).resolve()) if os.path.exists(model) else str(model)
        self._arguments = (name, dict(load_options), config, max_batch_size)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = _count(machines, "GPU")
        self._num_workers = num_workers or num_gpus or len(machines)
        self._resources = {"num_cpus": _cores_per_worker(machines, self._num_workers), "num_gpus": min(1, num_gpus)}
        self._idle = [self._start_worker() for _ in range(self._num_workers)]

    def manifest(self) -> Manifest:
        """What the results depend on."""
        return self._ray.get(self._idle[0].manifest.remote())

    def explore(self, problems: Iterable[Problem], report: ExplorationReport) -> Iterator[SupervisionExample]:
        """As `LocalExplorer.explore`.

        Raises:
            ray.exceptions.RayActorError: Workers die again and again.
        """
        waiting = deque(problems)
        chunks: dict[Any, _Chunk] = {}
        deaths = 0
        while waiting or chunks:
            while waiting and self._idle:
                chunk = self._hand_out(waiting)
                chunks[chunk.results] = chunk
            (results, *_), _ = self._ray.wait(list(chunks))
            chunk = chunks[results]
            try:
                example, counted = self._ray.get(next(results))
            except StopIteration:
                self._idle.append(chunks.pop(results).worker)
            except self._ray.exceptions.RayActorError:
                deaths += 1
                if deaths == _MAX_DEATHS:
                    raise
                waiting.extendleft(chunks.pop(results).problems.values())
                self._idle.append(self._start_worker())
            else:
                deaths = 0
                del chunk.problems[example.id]
                report.add(counted)
                yield example

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started for them."""
        if self._own_cluster:
            self._ray.shutdown()
        self._idle.clear()  # a worker ends when nothing refers to it

    def _start_worker(self) -> Any:
        return self._ray.remote(**self._resources)(_Worker).remote(*self._arguments)

    def _hand_out(self, waiting: deque[Problem]) -> _Chunk:
        share = -(-len(waiting) // (_CHUNKS_PER_WORKER * self._num_workers))
        problems = [waiting.popleft() for _ in range(min(share, _MAX_CHUNK))]
        worker = self._idle.pop()
        results = worker.explore_chunk.options(num_returns="streaming").remote(problems)
        return _Chunk(worker, {problem.id: problem for problem in problems}, results)


def _count(machines: Sequence[Mapping[str, float]], resource: str) -> int:
    return sum(int(machine.get(resource, 0)) for machine in machines)


def _cores_per_worker(machines: Sequence[Mapping[str, float]], num_workers: int) -> int:
    """As many as there can be for each worker; a worker is on one machine.

    Raises:
        ArgumentError: There are more workers than GPUs or cores. Those beyond would wait for ever.
    """
    num_gpus, cores = _count(machines, "GPU"), _count(machines, "CPU")
    if num_workers > (limit := min(num_gpus, cores) if num_gpus else cores):
        expected = f"at most {limit}, since the cluster has {num_gpus} GPUs and {cores} cores"
        raise ArgumentError("num_workers", expected, num_workers)
    size = cores // num_workers
    while sum(int(machine.get("CPU", 0)) // size for machine in machines) < num_workers:
        size -= 1
    return size
