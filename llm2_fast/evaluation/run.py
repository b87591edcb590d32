"""`evaluate`: plain and steered decoding side by side on problems with known answers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llm2_fast.config import GenerationConfig
from llm2_fast.engine import Engine
from llm2_fast.errors import ArgumentError
from llm2_fast.evaluation.arms import STEERING, Arm, make_arms
from llm2_fast.evaluation.findings import find_failures
from llm2_fast.evaluation.grade import grade
from llm2_fast.evaluation.markdown import error_notes, to_markdown
from llm2_fast.evaluation.plain import read_plain
from llm2_fast.evaluation.prompts import FEW_SHOT_STOP, make_prompt
from llm2_fast.evaluation.record import Record, read_records, record_id
from llm2_fast.evaluation.report import EvaluationReport, summarize
from llm2_fast.evaluation.rerank import Reranker
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import tokenizer_hash
from llm2_fast.problems import Problem, ProblemSource, check_answers, load_problems, unique_problems
from llm2_fast.prompts import chat_template_hash, encode_prompt
from llm2_fast.results import Generation, Sample
from llm2_fast.store import ShardStore
from llm2_fast.supervision import Manifest
from llm2_fast.version import __version__

_LOGGER = logging.getLogger(__name__)
_BATCHES = 4  # decoded between two writes: more keep the places of a batch filled, fewer lose less in a crash


def evaluate(
    engine: Engine,
    problems: ProblemSource,
    output_dir: str | os.PathLike[str],
    config: GenerationConfig | None = None,
    *,
    examples: ProblemSource = (),
    sweep: Mapping[str, Iterable[Any]] | None = None,
    plain: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **overrides: Any,
) -> EvaluationReport:
    """Decode problems plainly and with System 2, and compare the answers.

    Greedy decoding is compared with plain decoding. Where tokens are sampled, each steered arm is compared with its own
    truncation, beta = 0, since truncation alone lifts sampled accuracy; with plain decoding; and, for n > 1, with the
    plain samples from which the verifier's summed scores choose one.

    What has been decoded is on disk soon, a line per problem and arm; a run that was interrupted is taken up by the
    same call again, and arms that a later call adds are decoded for the problems there. A problem's samples depend on
    the model, the options and the problem only, and have the same random numbers in every arm.

    Args:
        engine: With a verifier; without one plain decoding alone is measured. Plain decoding gets a second engine over
            the same model, `Engine.without_verifier`.
        problems: The path of a JSON-lines file, or mappings; see `load_problems`. Duplicates count once.
        output_dir: Gets a manifest, shards of records, `report.json` and `report.md`.
        config: Options; the defaults if None. With `n` samples per problem, pass@k and maj@k are measured; with
            `trace`, margins between the verifier's scores are recorded, which takes time in every step.
        examples: Worked examples in front of each problem, as `problems`. The prompt is then text instead of a chat and
            their answers end in "So the answer is x.".
        sweep: More steered arms: values by option, "alpha", "beta" or "candidate_top_k", in all combinations.
        plain: Directory of an earlier evaluation of the same problems, or more, with the same model, examples and
            options, but perhaps another verifier. Its plain decoding is taken over, times included, instead of being
            done again; plain samples are reranked anew. Other arms are never taken over: even with beta = 0 they
            depend on the verifier, on its vocabulary and on whether its scores are finite.
        progress: Show a progress bar.
        **overrides: Single options that replace those of `config`.

    Returns:
        `EvaluationReport`.

    Raises:
        ArgumentError: An argument is unusable, `output_dir` holds results of something else, or `plain` does not hold
            what would be decoded; nothing has been computed then.
        MissingDependencyError: Answers that are expressions need `math-verify`.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise ArgumentError("config", "a GenerationConfig or None", type(config).__name__)
    config = (config or GenerationConfig()).merge(**overrides)
    examples, chosen = load_problems(examples), unique_problems(problems)
    check_answers([*chosen, *examples])
    if known := {problem.question for problem in chosen} & {example.question for example in examples}:
        raise ArgumentError("examples", "none of the problems", repr(min(known)))
    if examples:
        config = config.merge(stop=tuple(dict.fromkeys([*config.stop, FEW_SHOT_STOP])))
    arms = make_arms(config, sweep or {}, verified=engine.verifier is not None)
    prompts = _encode(engine, chosen, examples, config)
    output_dir, manifest = Path(output_dir), _manifest(engine, config, examples)
    earlier = {} if plain is None else read_plain(plain, manifest, chosen)
    evaluator = _Evaluator(engine, arms, prompts, earlier)
    with ShardStore(output_dir, manifest, Record.from_json) as store:
        total = len(chosen) * len(arms)
        done = sum(record_id(problem.id, arm.key) in store.ids for problem in chosen for arm in arms)
        with tqdm(total=total, initial=done, desc="evaluate", unit="record", disable=not progress) as bar:
            for record in evaluator.run(chosen, store.ids):
                store.append(record)
                bar.update()
    report = summarize(arms, _read_records(output_dir, chosen, arms), config.seed)
    report = replace(report, failures=find_failures(report))
    (output_dir / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    (output_dir / "report.md").write_text(to_markdown(report), encoding="utf-8")
    for note in error_notes(report):
        _LOGGER.warning("%s", note)
    for failure in report.failures:
        if failure.kind == "harmful":
            _LOGGER.warning("the verifier is actively harmful: %s", failure.message)
    return report


class _Evaluator:
    """Decodes problems in every arm.

    Args:
        engine: Runs the steered arms.
        arms: Plain decoding among them.
        prompts: Token ids by problem id.
        earlier: Records of plain decoding by problem id; empty if it is to be done here.
    """

    def __init__(
        self, engine: Engine, arms: list[Arm], prompts: Mapping[str, list[int]], earlier: Mapping[str, Record]
    ) -> None:
        self._engine, self._arms, self._prompts, self._earlier = engine, arms, prompts, earlier

    @cached_property
    def _plain_engine(self) -> Engine:
        return self._engine.without_verifier()

    @cached_property
    def _reranker(self) -> Reranker:
        return Reranker(self._engine)

    def run(self, problems: list[Problem], done: set[str | None]) -> Iterator[Record]:
        """Decode what is not done, some problems in every arm, then the next: their times are those of one moment."""
        done = set(done)  # the store adds to its own while this runs
        size = math.ceil(_BATCHES * self._engine.max_batch_size / self._arms[0].config.n)
        for start in range(0, len(problems), size):
            for arm in self._arms:
                group = [p for p in problems[start : start + size] if record_id(p.id, arm.key) not in done]
                if group:
                    yield from self._decode(arm, group) if arm.steered else self._plain(arm, group)

    def _plain(self, arm: Arm, problems: list[Problem]) -> Iterator[Record]:
        records = [self._earlier[p.id] for p in problems] if self._earlier else self._decode(arm, problems)
        reranked = self._engine.verifier is not None and arm.config.n > 1
        yield from map(self._rerank, records) if reranked else records

    def _decode(self, arm: Arm, problems: list[Problem]) -> Iterator[Record]:
        engine = self._engine if arm.steered else self._plain_engine
        request_ids = [int(problem.id, 16) % 2**31 for problem in problems]
        start = time.perf_counter()
        generations = engine.generate([self._prompts[p.id] for p in problems], arm.config, request_ids=request_ids)
        seconds = (time.perf_counter() - start) / len(problems)
        for problem, generation in zip(problems, generations, strict=True):
            yield grade(problem, arm, generation, seconds)

    def _rerank(self, record: Record) -> Record:
        """The record of plain decoding with the verifier's scores."""
        samples = [Sample(s.token_ids, s.text, s.finish_reason, s.error) for s in record.samples]
        start = time.perf_counter()
        scores = self._reranker.scores(Generation(self._prompts[record.problem_id], samples))
        rerank_seconds = time.perf_counter() - start
        scored = [replace(sample, score=score) for sample, score in zip(record.samples, scores, strict=True)]
        return replace(record, samples=scored, rerank_seconds=rerank_seconds)


def _encode(
    engine: Engine, problems: list[Problem], examples: list[Problem], config: GenerationConfig
) -> dict[str, list[int]]:
    """Prompts by problem id. Raises `ArgumentError` for one that cannot be made or does not fit the context."""
    if engine.tokenizer is None:
        raise ArgumentError("engine", "one whose model has a tokenizer", "none")
    with engine.exclusive_backend() as backend:
        vocab_size = backend.vocab_size
    prompts = {}
    for index, problem in enumerate(problems):
        name = f"problems[{index}]"
        token_ids = encode_prompt(make_prompt(problem, examples), engine.tokenizer, vocab_size, name)
        if engine.max_length is not None and len(token_ids) + config.max_new_tokens > engine.max_length:
            expected = f"prompt and max_new_tokens within the context of {engine.max_length} tokens"
            raise ArgumentError(name, expected, f"{len(token_ids)} + {config.max_new_tokens}")
        prompts[problem.id] = token_ids
    return prompts


def _manifest(engine: Engine, config: GenerationConfig, examples: list[Problem]) -> Manifest:
    """What all records of an evaluation depend on; what only concerns an arm is in their ids."""
    model = engine.model.source
    with engine.exclusive_backend() as backend:
        quantization = backend.quantization
    options = {name: getattr(config, name) for name in config.option_names() if name not in STEERING}
    digest = hashlib.sha256("".join(example.id for example in examples).encode()).hexdigest()[:16]
    return Manifest(
        model=engine.model.name,
        model_fingerprint=fingerprint(model),
        tokenizer_hash=tokenizer_hash(engine.tokenizer),
        chat_template_hash=chat_template_hash(engine.tokenizer),
        options={
            **options,
            "stop": list(config.stop),
            "examples": digest if examples else None,
            "verifier": None if engine.verifier is None else f"{engine.verifier.kind} {engine.verifier.fingerprint}",
            "backend": engine.backend,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": None if quantization is None else quantization.name,
            "max_length": engine.max_length,
        },
        llm2_fast_version=__version__,
    )


def _read_records(output_dir: Path, problems: list[Problem], arms: list[Arm]) -> dict[str, list[Record]]:
    """By arm key, the records of the problems in their order."""
    found = read_records(output_dir)
    return {arm.key: [found[record_id(problem.id, arm.key)] for problem in problems] for arm in arms}
