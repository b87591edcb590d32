"""`explore`: supervision for a verifier from problems and a model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llm2_fast.answers import answers_equal
from llm2_fast.config import check_number
from llm2_fast.engine import Engine, load
from llm2_fast.errors import ArgumentError
from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.problem import ProblemExplorer
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.exploration.rollouts import RolloutPool
from llm2_fast.exploration.store import ShardStore
from llm2_fast.exploration.teacher import Teacher
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import tokenizer_hash
from llm2_fast.problems import Problem, load_problems
from llm2_fast.prompts import chat_template_hash
from llm2_fast.supervision import Manifest, SupervisionExample
from llm2_fast.version import __version__


def explore(
    model: Engine | str | os.PathLike[str] | PreTrainedModel,
    problems: str | os.PathLike[str] | Iterable[Problem | Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    config: ExplorationConfig | None = None,
    *,
    max_batch_size: int = 64,
    progress: bool = False,
    load_options: Mapping[str, Any] | None = None,
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
        progress: Show a progress bar.
        load_options: Keywords of `llm2_fast.load`, unless `model` is an engine.
        **overrides: Single options that replace those of `config`.

    Returns:
        `ExplorationReport`.

    Raises:
        ArgumentError: An argument is unusable, or `output_dir` holds supervision made otherwise; nothing has been
            computed then.
        MissingDependencyError: Answers that are expressions need `math-verify`.
    """
    config = merge_config(config, overrides)
    check_number("max_batch_size", max_batch_size, integer=True, minimum=1)
    chosen = check_problems(problems, config)
    engine = as_engine(model, load_options)
    report = ExplorationReport()
    start = time.perf_counter()
    with ShardStore(output_dir, manifest_of(engine, config)) as store:
        waiting = [problem for problem in chosen if problem.id not in store.ids]
        report.resumed = len(chosen) - len(waiting)
        with (
            tqdm(
                total=len(chosen), initial=report.resumed, desc="explore", unit="problem", disable=not progress
            ) as bar,
            # Closed at once if writing fails, so that the engine is usable again.
            closing(explore_problems(engine, waiting, config, max_batch_size, report)) as examples,
        ):
            for example in examples:
                store.append(example)
                report.seconds = time.perf_counter() - start
                bar.set_postfix_str(f"{report.tokens_per_second:.0f} tokens/s, {report.pairs} pairs", refresh=False)
                bar.update()
    report.seconds = time.perf_counter() - start
    return report


def explore_problems(
    engine: Engine,
    problems: Iterable[Problem],
    config: ExplorationConfig,
    max_batch_size: int,
    report: ExplorationReport,
) -> Iterator[SupervisionExample]:
    """Explore problems together.

    Yields:
        An example per problem, as they come.
    """
    with engine.exclusive_backend() as backend:
        teacher = Teacher(backend, max_batch_size, report)
        limits = (backend.vocab_size, engine.eos_token_ids, engine.max_length)
        explorer = ProblemExplorer(teacher, engine.tokenizer, *limits, config, report)
        pool = RolloutPool(backend, max_batch_size, *limits, report)
        yield from pool.run(explorer.explore(problem) for problem in problems)


def merge_config(config: ExplorationConfig | None, overrides: Mapping[str, Any]) -> ExplorationConfig:
    """`config` with single options replaced. Raises `ArgumentError` for an unknown one."""
    if config is not None and not isinstance(config, ExplorationConfig):
        raise ArgumentError("config", "an ExplorationConfig or None", type(config).__name__)
    return (config or ExplorationConfig()).merge(**overrides)


def check_problems(
    problems: str | os.PathLike[str] | Iterable[Problem | Mapping[str, Any]], config: ExplorationConfig
) -> list[Problem]:
    """The problems, each once.

    Raises:
        ArgumentError: There is none, or one without a gold answer.
        MissingDependencyError: `math-verify` is needed to compare answers.
    """
    unique = list({problem.id: problem for problem in load_problems(problems)}.values())
    if not unique:
        raise ArgumentError("problems", "at least one problem", "none")
    if config.needs_answers and any(gold.kind == "math" for gold in [problem.gold for problem in unique]):
        answers_equal("1", "1", "math")
    return unique


def as_engine(
    model: Engine | str | os.PathLike[str] | PreTrainedModel, load_options: Mapping[str, Any] | None
) -> Engine:
    """`model` as an engine that can explore.

    Raises:
        ArgumentError: It has a verifier, no tokenizer or no chat template.
    """
    if isinstance(model, Engine):
        if load_options:
            raise ArgumentError("load_options", "none, since the model is an engine", dict(load_options))
        engine = model
    else:
        engine = load(model, **(load_options or {}))
    if engine.verifier is not None:
        raise ArgumentError("model", "an engine without a verifier: System 1 is explored", engine.verifier.kind)
    if engine.tokenizer is None or not engine.tokenizer.chat_template:
        actual = "no tokenizer" if engine.tokenizer is None else "no chat template"
        raise ArgumentError("model", "one with a tokenizer that has a chat template", actual)
    return engine


def manifest_of(engine: Engine, config: ExplorationConfig) -> Manifest:
    """What the results of an exploration depend on."""
    model = engine.model.model
    return Manifest(
        model=engine.model.name,
        model_fingerprint=fingerprint(model),
        tokenizer_hash=tokenizer_hash(engine.tokenizer),
        chat_template_hash=chat_template_hash(engine.tokenizer),
        options={
            **config.to_json(),
            "backend": engine.backend,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": engine.max_length,
        },
        llm2_fast_version=__version__,
    )
