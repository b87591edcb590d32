"""`Verifier`: what the three kinds have in common."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llm2_fast.errors import ArgumentError, CheckpointError, IncompatibleVerifierError
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.verifier.scorer import Head, Scorer
from llm2_fast.verifier.session import VerifierSession

_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


class Verifier(ABC):
    """Gives a candidate token one score, given the tokens before it (LLM2, section 2.2).

    Kinds: `head`, a scalar head on the frozen LLM; `lora`, a LoRA adapter on the LLM with a scalar head; `full`, a
    network of its own with a scalar head. Make one with `from_pretrained`.

    Attributes:
        kind: "head", "lora" or "full".
        base: The LLM that a `head` or `lora` verifier reads, when it was given or has been loaded.
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Verifier]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Verifier._kinds[cls.kind] = cls

    def __init__(self, *, base_name: str | None = None, base_fingerprint: str | None = None) -> None:
        self.base: LoadedModel | None = None
        self.base_name = base_name
        self.base_fingerprint = base_fingerprint

    @staticmethod
    def from_pretrained(
        path_or_id: str | os.PathLike[str],
        base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        allow_pickle: bool = False,
    ) -> Verifier:
        """Load a verifier; its kind is read from the files.

        Args:
            path_or_id: Directory or hub id with a `head` (`config.json` of this package), a `lora` (PEFT adapter) or
                a `full` checkpoint (sequence or token classifier with one label, or a causal LM with `score.weight`).
            base_model: The LLM under a `head` or `lora` verifier. Not needed to steer that LLM, only to score without
                it; then the recorded base is loaded if none is given.
            device, dtype, allow_pickle: As for `llm2_fast.load`; they apply to `base_model` and to `full` verifiers.

        Raises:
            CheckpointError: Files are missing, damaged, pickled or of an unknown layout.
            IncompatibleVerifierError: The verifier was made for another base model.
        """
        directory = _local_directory(path_or_id, allow_pickle)
        for kind in Verifier._kinds.values():
            if kind._recognises(directory):
                break
        else:
            files = "adapter_config.json or config.json with one of the layouts head, lora, full"
            raise CheckpointError(f"verifier {str(path_or_id)!r}: expected {files}, found {_listing(directory)}")
        verifier = kind._read(directory, device=device, dtype=dtype, allow_pickle=allow_pickle)
        if base_model is not None:
            verifier.bind(load_model(base_model, device=device, dtype=dtype, allow_pickle=allow_pickle))
        return verifier

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the verifier to a directory in the layout that `from_pretrained` reads back.

        Raises:
            ArgumentError: The directory holds a verifier of another kind, whose files would be taken for this one's.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        for kind in Verifier._kinds.values():
            if kind.kind != self.kind and kind._recognises(directory):
                raise ArgumentError("path", f"no {kind.kind} verifier in the directory of a {self.kind} one", str(path))
        self._write(directory)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of a sample of its own weights, rounded to bfloat16; 32 hexadecimal digits."""

    @abstractmethod
    def head_for(self, model: LoadedModel) -> Head:
        """The head that scores for `model`, after `check_compatible`. Loads no model."""

    @abstractmethod
    def scorer(self, model: LoadedModel) -> Scorer:
        """The decoder and head that score for `model`, after `check_compatible`. Loads the model that it runs."""

    def session(self) -> VerifierSession:
        """A session for scoring without an engine. `head` and `lora` run their base model for it.

        Raises:
            CheckpointError: No base model was given and the recorded one cannot be loaded.
        """
        if self.base is None:
            self.bind(self._load_base())
        scorer = self.scorer(self.base)
        scorer.decoder.check()
        return VerifierSession(scorer)

    def bind(self, base: LoadedModel) -> None:
        """Take `base` as the LLM under this verifier, after `check_compatible`."""
        self.check_compatible(base)
        self.base = base

    def check_compatible(self, model: LoadedModel) -> None:
        """Raise `IncompatibleVerifierError` unless this verifier can score tokens of `model`."""
        if self.base_fingerprint is not None and (actual := fingerprint(model.source)) != self.base_fingerprint:
            raise IncompatibleVerifierError(
                f"verifier: expected a model with fingerprint {self.base_fingerprint} ({self.base_name}), "
                f"for which this {self.kind} verifier was made, got {actual} ({model.name})"
            )

    def _load_base(self) -> LoadedModel:
        if self.base_name is None:
            raise CheckpointError(f"base_model: expected the LLM under this {self.kind} verifier, which names none")
        return load_model(self.base_name)

    @staticmethod
    @abstractmethod
    def _recognises(directory: Path) -> bool: ...

    @classmethod
    @abstractmethod
    def _read(cls, directory: Path, **options: Any) -> Verifier: ...

    @abstractmethod
    def _write(self, directory: Path) -> None: ...


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file on the CPU. Raises `CheckpointError` if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"verifier {str(path.parent)!r}: expected {path.name}, found {_listing(path.parent)}")
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError does not derive from a narrower public class
        raise CheckpointError(f"verifier weights {str(path)!r}: damaged or not safetensors: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` if it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"verifier config {str(path)!r}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"verifier config {str(path)!r}: expected a JSON object, got {type(content).__name__}")
    return content


def _local_directory(path_or_id: str | os.PathLike[str], allow_pickle: bool) -> Path:
    if os.path.isdir(path_or_id):
        return Path(path_or_id)
    try:
        return Path(
            snapshot_download(str(path_or_id), allow_patterns=[*_DOWNLOADED, *(["*.bin"] if allow_pickle else [])])
        )
    except Exception as error:  # bad ids, missing repositories and network failures have no common base
        raise CheckpointError(f"verifier {str(path_or_id)!r}: neither a directory nor a hub id: {error}") from error


def _listing(directory: Path) -> str:
    return ", ".join(sorted(entry.name for entry in directory.iterdir())) or "an empty directory"
