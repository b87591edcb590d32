"""Models and tokenizers from Hugging Face directories, hub ids, GGUF files or memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm2_fast.errors import ArgumentError, CheckpointError, MissingDependencyError
from llm2_fast.models.checkpoint import open_checkpoint, read_checkpoint
from llm2_fast.models.source import ModelSource, as_source

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LoadedModel:
    """A causal language model, its tokenizer (None if there is none) and where it came from.

    Args:
        model: The model, or where its weights are.
        tokenizer: The tokenizer.
        name: Path, hub id, or another name.

    Attributes:
        source: The model's configuration and modules, and its weights, which may still be in files. Once `model` has
            been asked for, it is that model, since whoever has it may change it.
    """

    def __init__(
        self, model: PreTrainedModel | ModelSource, tokenizer: PreTrainedTokenizerBase | None, name: str
    ) -> None:
        self.source, self.tokenizer, self.name = as_source(model), tokenizer, name

    @property
    def model(self) -> PreTrainedModel:
        """The whole model. Loaded on first use: compiled decoders do not need it."""
        self.source = self.source.load()
        return self.source.skeleton

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.source.config

    @property
    def device(self) -> torch.device:
        """Where the model is, or will be."""
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.source.dtype


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """A torch dtype, or "auto" as it is. Raises `ArgumentError` for anything else."""
    if dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ArgumentError("dtype", f"'auto', {', '.join(map(repr, _DTYPES))} or a torch dtype of these", repr(dtype))


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device; "auto" is CUDA where there is one, else the CPU. Raises `ArgumentError` for anything else."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)  # the type may be known and the device not there
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ArgumentError("device", "'auto' or a torch device of this machine", repr(device)) from error
    if resolved.type == "meta":
        raise ArgumentError("device", "a device that computes", "'meta'")
    return resolved


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)


def load_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    The weights of models that the cpu backend supports stay in their files, which must stay in place, until they are
    asked for.

    Args:
        model: A Hugging Face directory or hub id, the path of a GGUF file, or a loaded model, which is used as it is.
        tokenizer: Instead of the one beside the weights.
        device: "auto" or a torch device.
        dtype: "auto" (the checkpoint's; float32 for GGUF), or a floating-point torch dtype or its name.
        allow_pickle: Also read pickled weights, which can run code while they load.

    Returns:
        `LoadedModel`.

    Raises:
        ArgumentError: `device` or `dtype` is unknown, or differs from those of a model that is loaded already.
        CheckpointError: Weights are missing, damaged or pickled.
        MissingDependencyError: A GGUF file needs the `demo` extra.
    """
    dtype = resolve_dtype(dtype)
    resolved_device = resolve_device(device)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ArgumentError("tokenizer", "a transformers tokenizer or None", repr(tokenizer))
    if isinstance(model, PreTrainedModel):
        if device != "auto" and not _same_device(resolved_device, model.device):
            raise ArgumentError("device", f"'auto' or {model.device}, where the loaded model is", repr(device))
        if dtype != "auto" and dtype != model.dtype:
            raise ArgumentError("dtype", f"'auto' or {model.dtype}, the loaded model's", dtype)
        return LoadedModel(model, tokenizer, model.config.name_or_path or type(model).__name__)
    if not isinstance(model, (str, os.PathLike)):
        raise ArgumentError("model", "a path, a hub id or a transformers.PreTrainedModel", type(model).__name__)

    source: str | Path = Path(model) if os.path.exists(model) else str(model)
    if str(source).endswith(".gguf"):
        source = _convert_gguf(Path(source))
    opened = open_checkpoint(
        AutoModelForCausalLM, source, device=resolved_device, dtype=dtype, allow_pickle=allow_pickle
    )
    if tokenizer is None:
        tokenizer = load_tokenizer(source)
    return LoadedModel(opened, tokenizer, str(model))


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, None if the directory holds none."""
    if isinstance(source, Path) and not (source / "tokenizer_config.json").exists():
        return None
    return _read_tokenizer(source)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token-to-id mapping, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


def _read_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # as for models, the errors have no common base
        where = Path(source, options.get("gguf_file", ""))
        raise CheckpointError(f"tokenizer of {str(where)!r}: cannot be loaded: {error}") from error


def cache_directory() -> Path:
    """Where converted models are kept: `LLM2_FAST_CACHE`, else `llm2_fast` in the user's cache directory."""
    root = os.environ.get("LLM2_FAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "llm2_fast")
    return Path(root).expanduser()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _convert_gguf(path: Path) -> Path:
    """Directory with the dequantized weights of a GGUF file as float32 safetensors, converted on first use."""
    if not path.is_file():
        raise CheckpointError(f"model {str(path)!r}: no such file")
    target = cache_directory() / "gguf" / f"{path.stem}-{_file_hash(path)}"
    if target.exists():
        return target
    try:
        import accelerate  # noqa: F401  both are needed by transformers' GGUF reader
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("reading GGUF files needs: pip install 'llm2-fast[demo]'") from error
    options = {"gguf_file": path.name}
    tokenizer = _read_tokenizer(path.parent, **options)
    quantized = read_checkpoint(AutoModelForCausalLM, path.parent, dtype=torch.float32, **options)
    # transformers refuses to save a model that it read from GGUF, so the weights move into a plain one.
    config = AutoConfig.from_pretrained(path.parent, **options)
    config.dtype = torch.float32
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)  # mkdtemp's directories are private, a cache may be shared
        os.replace(staging, target)
    except BaseException as error:  # Ctrl-C, too, must not leave half a gigabyte behind
        shutil.rmtree(staging, ignore_errors=True)
        if not (isinstance(error, OSError) and target.exists()):  # another process may have finished first
            raise
    return target
