"""`LocalExplorer`: exploration in this process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from llm2_fast.engine import Engine, load
from llm2_fast.errors import ArgumentError
from llm2_fast.exploration.config import ExplorationConfig
from llm2_fast.exploration.problem import ProblemExplorer
from llm2_fast.exploration.report import ExplorationReport
from llm2_fast.exploration.rollouts import RolloutPool
from llm2_fast.exploration.teacher import Teacher
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import tokenizer_hash
from llm2_fast.problems import Problem
from llm2_fast.prompts import chat_template_hash
from llm2_fast.supervision import Manifest, SupervisionExample
from llm2_fast.version import __version__


class LocalExplorer:
    """Explores problems with one engine.

    Args:
        model: An engine without a verifier, or what `llm2_fast.load` takes.
        load_options: Keywords of `llm2_fast.load`, unless `model` is an engine.
        config: Options.
        max_batch_size: Continuations decoded together.

    Raises:
        ArgumentError: The model has a verifier, no tokenizer or no chat template.
    """

    def __init__(
        self,
        model: Engine | str | os.PathLike[str] | PreTrainedModel,
        load_options: Mapping[str, Any],
        config: ExplorationConfig,
        max_batch_size: int,
    ) -> None:
        if isinstance(model, Engine) and load_options:
            raise ArgumentError("load_options", "none, since the model is an engine", dict(load_options))
        self._engine = model if isinstance(model, Engine) else load(model, **load_options)
        self._config, self._max_batch_size = config, max_batch_size
        verifier, tokenizer = self._engine.verifier, self._engine.tokenizer
        if verifier is not None:
            raise ArgumentError("model", "an engine without a verifier: System 1 is explored", verifier.kind)
        if tokenizer is None or not tokenizer.chat_template:
            actual = "no tokenizer" if tokenizer is None else "no chat template"
            raise ArgumentError("model", "one with a tokenizer that has a chat template", actual)

    def manifest(self) -> Manifest:
        """What the results depend on."""
        engine, model = self._engine, self._engine.model.source
        with engine.exclusive_backend() as backend:
            quantization = backend.quantization
        return Manifest(
            model=engine.model.name,
            model_fingerprint=fingerprint(model),
            tokenizer_hash=tokenizer_hash(engine.tokenizer),
            chat_template_hash=chat_template_hash(engine.tokenizer),
            options={
                **self._config.to_json(),
                "backend": engine.backend,
                "dtype": str(model.dtype).removeprefix("torch."),
                "quantization": None if quantization is None else quantization.name,
                "max_length": engine.max_length,
            },
            llm2_fast_version=__version__,
        )

    def explore(self, problems: Iterable[Problem], report: ExplorationReport) -> Iterator[SupervisionExample]:
        """Explore problems together.

        Args:
            problems: Distinct.
            report: Counts what is done.

        Yields:
            An example per problem, as they come.
        """
        engine, config = self._engine, self._config
        with engine.exclusive_backend() as backend:
            teacher = Teacher(backend, self._max_batch_size, report)
            limits = (backend.vocab_size, engine.eos_token_ids, engine.max_length)
            explorer = ProblemExplorer(teacher, engine.tokenizer, *limits, config, report)
            pool = RolloutPool(backend, self._max_batch_size, *limits, report)
            yield from pool.run(partial(explorer.explore, problem) for problem in problems)

    def close(self) -> None:
        """Nothing is left to do."""
