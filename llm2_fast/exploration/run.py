"""`explore`: supervision for a verifier from problems and a model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llm2_fast.config import check_number
from llm2_fast.engine import Engine
from llm2_fast.errors import ArgumentError
from llm2_fast.exploration.cluster import RayExplorer
from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.local import LocalExplorer
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.problems import ProblemSource, check_answers, unique_problems
from llm2_fast.store import ShardStore
from llm2_fast.supervision import SupervisionExample


def explore(
    model: Engine | str | os.PathLike[str] | PreTrainedModel,
    problems: ProblemSource,
    output_dir: str | os.PathLike[str],
    config: ExplorationConfig | None = None,
    *,
    max_batch_size: int = 64,
    engine: Literal["local", "ray"] = "local",
    num_workers: int | None = None,
    load_options: Mapping[str, Any] | None = None,
    progress: bool = False,
    **overrides: Any,
) -> ExplorationReport:
    """Find out which tokens lead astray: token quality exploration (LLM2, section 2.3).

    At each position of a solution, `n` continuations are sampled from every plausible token that is not the solution's
    own. A token after which fewer than the `threshold` share of them end in the right answer is a negative.

    What has been found is on disk at once, a line per problem. A run that was interrupted, however hard, is taken up
    by the same call again; only the problems under way are lost. What is found for a problem depends on the model, the
    options and the problem only.

    Args:
        model: An engine without a verifier, or what `llm2_fast.load` takes.
        problems: The path of a JSON-lines file with `question` and `answer`, or mappings. Duplicates are explored once.
        output_dir: Gets a manifest and shards, which `llm2_fast.supervision.read_supervision` reads.
        config: Options; the defaults if None.
        max_batch_size: Continuations decoded together.
        engine: "local" explores in this process; "ray" on a Ray cluster, where `model` must be a path or hub id.
        num_workers: On a cluster; by default one per GPU or, without any, one per machine.
        load_options: Keywords of `llm2_fast.load`, unless `model` is an engine.
        progress: Show a progress bar.
        **overrides: Single options that replace those of `config`.

    Returns:
        `ExplorationReport` of this call; `ExplorationReport.read(output_dir)` is the sum with earlier ones.

    Raises:
        ArgumentError: An argument is unusable, or `output_dir` holds supervision made otherwise; nothing has been
            computed then.
        MissingDependencyError: Answers that are expressions need `math-verify`.
    """
    config = _merge_config(config, overrides)
    check_number("max_batch_size", max_batch_size, integer=True, minimum=1)
    if engine not in ("local", "ray"):
        raise ArgumentError("engine", "'local' or 'ray'", repr(engine))
    if num_workers is not None:
        check_number("num_workers", num_workers, integer=True, minimum=1)
    chosen = unique_problems(problems)
    if config.needs_answers:
        check_answers(chosen)
    options = (model, load_options or {}, config, max_batch_size)
    report = ExplorationReport()
    start = time.perf_counter()
    with (
        closing(LocalExplorer(*options) if engine == "local" else RayExplorer(*options, num_workers)) as explorer,
        ShardStore(output_dir, explorer.manifest(), SupervisionExample.from_json) as store,
    ):
        earlier = ExplorationReport.read(output_dir)
        waiting = [problem for problem in chosen if problem.id not in store.ids]
        report.resumed = len(chosen) - len(waiting)
        with (
            tqdm(
                total=len(chosen), initial=report.resumed, desc="explore", unit="problem", disable=not progress
            ) as bar,
            # Closed at once if writing fails, so that the engine is usable again.
            closing(explorer.explore(waiting, report)) as examples,
        ):
            for example in examples:
                store.append(example)
                report.seconds = time.perf_counter() - start
                report.write(output_dir, earlier)
                bar.set_postfix_str(f"{report.tokens_per_second:.0f} tokens/s, {report.pairs} pairs", refresh=False)
                bar.update()
    report.seconds = time.perf_counter() - start
    return report


def _merge_config(config: ExplorationConfig | None, overrides: Mapping[str, Any]) -> ExplorationConfig:
    if config is not None and not isinstance(config, ExplorationConfig):
        raise ArgumentError("config", "an ExplorationConfig or None", type(config).__name__)
    return (config or ExplorationConfig()).merge(**overrides)
