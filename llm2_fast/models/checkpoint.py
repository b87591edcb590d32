"""Checkpoints of Hugging Face's layout: read whole by transformers, or tensor by tensor for compiled decoders."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from llm2_fast.errors import ArgumentError, CheckpointError
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.scratch import Scratch
from llm2_fast.models.source import MemorySource, ModelSource
from llm2_fast.models.spec import DecoderSpec

_LOGGER = logging.getLogger(__name__)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CPU = torch.device("cpu")
_CHUNK_BYTES = 1 << 19  # of a tensor that is read a few rows at a time


def open_checkpoint(
    auto_class: Any, source: str | Path, *, device: torch.device, dtype: torch.dtype | str, allow_pickle: bool
) -> ModelSource:
    """A model on disk or on the hub. Its weights stay there if a compiled decoder can read them one by one.

    Args:
        auto_class: `AutoModelForCausalLM`, or `AutoModel` for a decoder without its head.
        source: Directory or hub id.
        device: Where it will run; weights may stay in their files for the CPU and for CUDA.
        dtype: "auto" (the checkpoint's) or a floating-point torch dtype.
        allow_pickle: Also read pickled weights.

    Raises:
        CheckpointError: Weights are missing, damaged or pickled.
    """
    obstacle = None
    if device.type in ("cpu", "cuda"):
        try:
            return CheckpointSource(auto_class, source, dtype, device)
        except ArgumentError:
            pass  # compiled decoders lack a part of it, so whoever runs it needs the whole model
        except CheckpointError as error:
            obstacle = error
    try:
        model = read_checkpoint(auto_class, source, dtype=dtype, allow_pickle=allow_pickle).to(device).eval()
    except CheckpointError as error:
        if obstacle is None:
            raise
        raise CheckpointError(f"{error} ({obstacle})") from error
    if obstacle is not None:
        message = "model %r: read whole instead of tensor by tensor, so it stays in memory and is not cached: %s"
        _LOGGER.warning(message, str(source), obstacle)
    return MemorySource(model)


def read_checkpoint(
    auto_class: Any,
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    allow_pickle: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`auto_class.from_pretrained` with every failure turned into a `CheckpointError` that names the checkpoint."""
    try:
        model, info = auto_class.from_pretrained(
            source, dtype=dtype, use_safetensors=None if allow_pickle else True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, RuntimeError and more
        pickled = isinstance(source, Path) and any(source.glob("*.bin"))
        hint = " (pickled weights are read with allow_pickle=True only)" if pickled and not allow_pickle else ""
        raise CheckpointError(f"model {str(source)!r}: cannot be loaded{hint}: {error}") from error
    # transformers fills missing weights with random numbers and only logs it.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"model {str(source)!r}: expected weights {missing[0]} and {len(missing) - 1} more, missing"
        )
    return model


def weight_files(source: str | Path) -> list[Path]:
    """The safetensors files that transformers would read, downloaded if need be; others may lie beside them.

    Raises:
        OSError: The source is neither a directory nor a hub id that can be reached.
    """
    if (single := _find(source, SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    if (index := _find(source, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for name in names if (file := _find(source, name)) is not None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    dtype: torch.dtype | None  # None: not floating-point
    shape: tuple[int, ...]
    offset: int  # bytes, in the file

    @property
    def row_bytes(self) -> int:
        """Of one of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class CheckpointSource(ModelSource):
    """A checkpoint of a family that compiled decoders can run, whose weights are read when they are asked for.

    Not for several threads at once.

    Args:
        auto_class: As for `open_checkpoint`.
        source: As for `open_checkpoint`.
        dtype: As for `open_checkpoint`.
        device: Where it will run. What is read of it is on the CPU.

    Attributes:
        files: The safetensors files.

    Raises:
        ArgumentError: Compiled decoders lack a part of the model.
        CheckpointError: The weights cannot be read one by one; transformers may still be able to load them, or say
            better what is wrong.
    """

    def __init__(
        self, auto_class: Any, source: str | Path, dtype: torch.dtype | str, device: torch.device = _CPU
    ) -> None:
        self._auto_class, self._source, self.device = auto_class, source, device
        config = _read_config(source)
        self.files = _usable_files(source, config)
        stored = _list_tensors(self.files)
        if dtype == "auto":
            floating = (tensor.dtype for tensor in stored.values() if tensor.dtype is not None)
            dtype = config.dtype or next(floating, torch.float32)
        self.skeleton = _make_skeleton(auto_class, source, config, dtype)
        DecoderSpec.from_model(self.skeleton)
        self._stored = _match(self.skeleton, stored)
        self._scratch = Scratch()  # for rows in the dtype of their file

    def load(self) -> MemorySource:
        return MemorySource(read_checkpoint(self._auto_class, self._source, dtype=self.dtype).to(self.device))

    def tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        stored = self._stored[parameter]
        if stored.dtype == self.dtype and stored.shape[0] * stored.row_bytes > _CHUNK_BYTES:
            return _map(stored)
        values = torch.empty(stored.shape, dtype=self.dtype)
        self.read_rows(parameter, 0, values)
        return values

    def rows(self, parameter: nn.Parameter, indices: Sequence[int]) -> torch.Tensor:
        values = torch.empty(len(indices), *parameter.shape[1:], dtype=self.dtype)
        for index, row in zip(indices, values.split(1), strict=True):
            self.read_rows(parameter, index, row)
        return values

    def read_rows(self, parameter: nn.Parameter, first: int, out: torch.Tensor) -> None:
        stored = self._stored[parameter]
        if stored.dtype == out.dtype:
            _read_rows(stored, first, out)
            return
        for part in out.split(max(1, _CHUNK_BYTES // stored.row_bytes)):
            values = self._scratch.take(part.shape, stored.dtype)
            _read_rows(stored, first, values)
            part.copy_(values)
            first += len(part)

    @contextlib.contextmanager
    def running(self, quantization: Quantization | None = None) -> Iterator[PreTrainedModel]:
        """The skeleton with hooks that give a module its parameters while it runs, and no longer.

        Linear layers read theirs a few rows at a time instead, so that memory does not depend on their size.
        """
        modules = list(self.skeleton.modules())
        linears = [module for module in modules if type(module) is nn.Linear]
        others = [module for module in modules if module._parameters and type(module) is not nn.Linear]
        owners = {module: dict(module._parameters) for module in others}
        rounded = set() if quantization is None else {linear.weight for linear in linears}
        scratch = Scratch()

        def rounding(parameter: nn.Parameter) -> Quantization | None:
            return quantization if parameter in rounded else None

        def fill(module: nn.Module, args: tuple[Any, ...]) -> None:
            for name, parameter in owners[module].items():
                if parameter is None:
                    continue
                if isinstance(module, nn.Embedding):
                    values = self._used_rows(parameter, args[0], rounding(parameter))
                else:
                    values = self.tensor(parameter)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)

        def empty(module: nn.Module, *_: Any) -> None:
            module._parameters.update(owners[module])

        hooks = [module.register_forward_pre_hook(fill) for module in owners]
        hooks += [module.register_forward_hook(empty) for module in owners]
        for linear in linears:
            linear.forward = partial(self._multiply, linear, rounding(linear.weight), scratch)
        try:
            yield self.skeleton
        finally:
            for hook in hooks:
                hook.remove()
            for module in owners:
                empty(module)
            for linear in linears:
                del linear.forward

    def _multiply(
        self, linear: nn.Linear, quantization: Quantization | None, scratch: Scratch, inputs: torch.Tensor
    ) -> torch.Tensor:
        """The layer's forward pass."""
        bias = None if linear.bias is None else self.tensor(linear.bias)
        step = max(1, _CHUNK_BYTES // (linear.in_features * self.dtype.itemsize))
        outputs = []
        for first in range(0, linear.out_features, step):
            end = min(first + step, linear.out_features)
            weight = scratch.take((end - first, linear.in_features), self.dtype)
            self.read_rows(linear.weight, first, weight)
            if quantization is not None:
                quantization.round_trip_(weight)
            outputs.append(functional.linear(inputs, weight, None if bias is None else bias[first:end]))
        return torch.cat(outputs, dim=-1)

    def _used_rows(self, table: nn.Parameter, ids: torch.Tensor, quantization: Quantization | None) -> torch.Tensor:
        """The table with the rows `ids` only; memory that is not written to costs nothing."""
        values = torch.empty(table.shape, dtype=self.dtype)
        for index in ids.flatten().tolist():
            row = values[index : index + 1]
            self.read_rows(table, index, row)
            if quantization is not None:
                quantization.round_trip_(row)
        return values


def _find(source: str | Path, name: str) -> Path | None:
    """A file of a checkpoint; None if it has none, or if that cannot be found out without the hub."""
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, name, **lenient)
    return None if path is None else Path(path)


def _read_config(source: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # as for models, the errors have no common base
        raise CheckpointError("its configuration cannot be read") from error


def _usable_files(source: str | Path, config: PreTrainedConfig) -> list[Path]:
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError("its weights are quantized")
    if getattr(config, "transformers_weights", None) is not None:
        raise CheckpointError("its configuration names other weight files")
    try:
        if _find(source, ADAPTER_CONFIG_NAME) is not None:
            raise CheckpointError("an adapter lies beside its weights")
        files = weight_files(source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # the index may hold anything
        raise CheckpointError("its weight files cannot be listed") from error
    if not files:
        raise CheckpointError("its weights are no safetensors")
    return files


def _list_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """By name."""
    stored = {}
    for path in files:
        with _opened(path), path.open("rb") as file:  # the library has found the header to be valid
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = 8 + header_bytes + entry["data_offsets"][0]
            stored[name] = StoredTensor(path, name, _DTYPES.get(entry["dtype"]), tuple(entry["shape"]), offset)
    return stored


def _make_skeleton(
    auto_class: Any, source: str | Path, config: PreTrainedConfig, dtype: torch.dtype | str
) -> PreTrainedModel:
    """The model without its weights, but with the buffers and the generation options that it would be loaded with."""
    try:
        with torch.device("meta"):
            skeleton = auto_class.from_config(config, dtype=dtype)
        for module in skeleton.modules():
            if module._buffers:
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
                skeleton._init_weights(module)  # fills the buffers, as when transformers loads a checkpoint
        if skeleton.can_generate():
            with contextlib.suppress(OSError):  # none: then the skeleton's, made from the model's configuration
                skeleton.generation_config = GenerationConfig.from_pretrained(source)
    except Exception as error:
        raise CheckpointError("no model can be made of its configuration") from error
    return skeleton.eval()


def _match(skeleton: PreTrainedModel, stored: dict[str, StoredTensor]) -> dict[nn.Parameter, StoredTensor]:
    """What is stored for each parameter. Names may lack the prefix of the model's decoder, or have it in addition."""
    prefix = skeleton.base_model_prefix + "."
    matched: dict[nn.Parameter, StoredTensor] = {}
    used = set()
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names = (name, prefix + name, name.removeprefix(prefix))
        tensor = next((stored[candidate] for candidate in names if candidate in stored), None)
        if tensor is None and parameter in matched:
            continue  # tied to one that is there
        if tensor is None or tensor.dtype is None or tensor.shape != tuple(parameter.shape):
            actual = "none" if tensor is None else f"shape {tensor.shape}, {tensor.dtype or 'not floating-point'}"
            raise CheckpointError(f"{name}: expected shape {tuple(parameter.shape)}, got {actual}")
        if parameter in matched and not _same(tensor, matched[parameter]):
            raise CheckpointError(f"{name}: expected the values of {matched[parameter].name}, got others")
        matched.setdefault(parameter, tensor)
        used.add(tensor.name)
    ignored = [name for name in stored.keys() - used if ".layers." in "." + name and not name.endswith(".inv_freq")]
    if ignored:
        message = "%s and %d more tensors are ignored: the configuration has no place for them"
        _LOGGER.warning(message, min(ignored), len(ignored) - 1)
    return matched


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_map(a), _map(b))


def _map(stored: StoredTensor) -> torch.Tensor:
    """A tensor, mapped into memory. The file is opened each time, so its pages leave memory with the tensor."""
    with _opened(stored.path) as file:
        return file.get_tensor(stored.name)


def _read_rows(stored: StoredTensor, first: int, out: torch.Tensor) -> None:
    """Fill `out`, of the stored dtype, with rows from `first` on. Nothing is mapped, so no page of the file counts."""
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.offset + first * stored.row_bytes)
            num_bytes = file.readinto(out.view(torch.uint8).numpy())
    except OSError as error:
        raise CheckpointError(f"weights {str(stored.path)!r}: cannot be read: {error}") from error
    if num_bytes != out.nbytes:
        expected = f"{out.nbytes} bytes of {stored.name}"
        raise CheckpointError(f"weights {str(stored.path)!r}: expected {expected}, got {num_bytes}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {str(path)!r}: cannot be read: {error}") from error
