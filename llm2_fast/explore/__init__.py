"""Token quality exploration: which tokens of a model lead its solutions astray (LLM2, section 2.3)."""

from llm2_fast.explore.config import ExplorationConfig
from llm2_fast.explore.report import ExplorationReport
from llm2_fast.explore.run import explore

__all__ = ["ExplorationConfig", "ExplorationReport", "explore"]
