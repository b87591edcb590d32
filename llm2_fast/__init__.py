"""LLM2 decoding: a token-level verifier (System 2) steers an LLM (System 1) at nearly the speed of plain decoding.

The method is that of "LLM2: Let Large Language Models Harness System 2 Reasoning", arXiv 2412.20372.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm2_fast.version import __version__

_PUBLIC = {
    "ArgumentError": "errors",
    "CheckpointError": "errors",
    "Engine": "engine",
    "EvaluationReport": "evaluation.report",
    "ExplorationConfig": "exploration.config",
    "ExplorationReport": "exploration.report",
    "Generation": "results",
    "GenerationConfig": "config",
    "GenerationStats": "results",
    "IncompatibleVerifierError": "errors",
    "Llm2FastError": "errors",
    "MissingDependencyError": "errors",
    "Sample": "results",
    "StreamEvent": "results",
    "TraceStep": "results",
    "Verifier": "verifier",
    "evaluate": "evaluation.run",
    "explore": "exploration.run",
    "generate": "engine",
    "load": "engine",
    "train_verifier": "train.trainer",
}

if TYPE_CHECKING:
    from llm2_fast.config import GenerationConfig
    from llm2_fast.engine import Engine, generate, load
    from llm2_fast.errors import (
        ArgumentError,
        CheckpointError,
        IncompatibleVerifierError,
        Llm2FastError,
        MissingDependencyError,
    )
    from llm2_fast.evaluation.report import EvaluationReport
    from llm2_fast.evaluation.run import evaluate
    from llm2_fast.exploration.config import ExplorationConfig
    from llm2_fast.exploration.report import ExplorationReport
    from llm2_fast.exploration.run import explore
    from llm2_fast.results import Generation, GenerationStats, Sample, StreamEvent, TraceStep
    from llm2_fast.train.trainer import train_verifier
    from llm2_fast.verifier import Verifier

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import llm2_fast` and the command line start without torch and transformers.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
