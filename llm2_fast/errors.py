"""The exceptions this package raises. Each also derives from the built-in it refines."""

from __future__ import annotations

from typing import Any


class Llm2FastError(Exception):
    """Base of every exception raised on purpose by this package."""


class ArgumentError(Llm2FastError, ValueError):
    """An argument has a value the callee cannot work with."""

    def __init__(self, argument: str, expected: str, actual: Any) -> None:
        self.argument, self.expected, self.actual = argument, expected, actual
        super().__init__(f"{argument}: expected {expected}, got {actual if isinstance(actual, str) else repr(actual)}")


class CheckpointError(Llm2FastError, ValueError):
    """Weights or configuration files are missing, damaged, pickled or of an unknown layout."""


class IncompatibleVerifierError(Llm2FastError, ValueError):
    """A verifier that was not made for the model it is asked to steer."""


class CacheFullError(Llm2FastError, MemoryError):
    """A bounded cache has too few free blocks. The engine answers by letting sequences wait or preempting some."""


class MissingDependencyError(Llm2FastError, ImportError):
    """An optional package is needed; the message says which extra installs it."""
