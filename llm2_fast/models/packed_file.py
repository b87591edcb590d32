"""`PackedFile`: the packed weights of a checkpoint in the cache directory, mapped into memory by later loads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch.utils.dlpack import from_dlpack, to_dlpack

from llm2_fast.models.checkpoint import CheckpointSource
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import cache_directory
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.models.weights import PackedWeights
from llm2_fast.version import __version__

_LOGGER = logging.getLogger(__name__)
_FORMAT_VERSION = 2  # of these files, and of how the extension arranges weights within a panel
_ALIGNMENT = 64  # bytes, of every tensor in the file
_PADDING = "padding."  # prefix of tensors that only fill gaps
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}


class PackedFile:
    """Packed weights of a checkpoint, for one tier of kernels: a safetensors file with aligned tensors.

    Its metadata has the layouts of the packed layers, a CRC-32 of every tensor, and a key: the versions of format,
    package and transformers, the build of the extension, the tier, the decoder's spec, and names, sizes, modification
    times and a fingerprint of the weights it was made of. A file with another key is replaced; so is, with a warning,
    one that is damaged. Files appear whole under their name, so that processes may read and write at once. One that
    cannot be written is reported in the log and done without.

    Args:
        extension: The module `llm2_fast_C`.
        source: The checkpoint.
        quantization: Of its linear layers.

    Attributes:
        path: Of the file, in `packed` below the cache directory. It depends on the checkpoint's place, its dtype,
            quantization and the tier, so a directory whose checkpoint changes does not leave files behind; every
            revision of a hub id has a place of its own.
    """

    def __init__(
        self, extension: ModuleType, source: CheckpointSource, quantization: Quantization | None = None
    ) -> None:
        self._extension = extension
        self._spec = DecoderSpec.from_model(source.skeleton)
        architecture, isa = type(source.skeleton).__name__, extension.cpu_isa()
        key = {
            "format_version": _FORMAT_VERSION,
            "llm2_fast": __version__,
            "transformers": transformers.__version__,
            "extension": _identity(Path(extension.__file__)),
            "isa": isa,
            "architecture": architecture,
            "spec": asdict(self._spec),
            "quantization": None if quantization is None else asdict(quantization),
            "files": [_identity(path) for path in source.files],
            "fingerprint": fingerprint(source),
        }
        self._key = json.dumps(key, sort_keys=True)
        place = source.files[0].parent.resolve()
        name = hashlib.sha256(
            "\n".join([str(place), architecture, self._spec.dtype, isa, str(quantization)]).encode()
        ).hexdigest()[:16]
        self.path = cache_directory() / "packed" / f"{place.name}-{name}.safetensors"

    def read(self) -> PackedWeights | None:
        """The weights, mapped; None if there is no file, or one that does not fit or is damaged."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata["key"] != self._key:
                    _LOGGER.info("packed weights %s: of another checkpoint or version, packed again", self.path)
                    return None
                names = [name for name in file.keys() if not name.startswith(_PADDING)]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
            _require_checksums(tensors, json.loads(metadata["checksums"]))
            return self._weights(tensors, json.loads(metadata["layouts"]))
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            _LOGGER.warning("packed weights %s: damaged, packed again: %s", self.path, error)
            return None

    def write(self, weights: PackedWeights) -> None:
        """Put `weights` in the file's place."""
        tensors = dict(weights.tensors)
        for name, linear in weights.linears.items():
            tensors |= {f"{name}.{part}": from_dlpack(capsule) for part, capsule in linear.buffers().items()}
        metadata = {
            "key": self._key,
            "layouts": json.dumps({name: linear.layout for name, linear in weights.linears.items()}),
            "checksums": json.dumps(_checksums(tensors)),
        }
        staging = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, staging = tempfile.mkstemp(prefix=".", suffix=".partial", dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                _write_safetensors(file, tensors, metadata)
            os.chmod(staging, 0o644)  # mkstemp's files are private, a cache may be shared
            os.replace(staging, self.path)
        except BaseException as error:  # Ctrl-C, too, must not leave a partial file behind
            if staging is not None:
                Path(staging).unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            _LOGGER.warning("packed weights %s: cannot be written: %s", self.path, error)

    def _weights(self, tensors: dict[str, torch.Tensor], layouts: dict[str, dict]) -> PackedWeights:
        parts: dict[str, dict[str, object]] = {name: {} for name in layouts}
        for name in list(tensors):
            linear, _, part = name.rpartition(".")
            if linear in layouts:
                parts[linear][part] = to_dlpack(tensors.pop(name))
        from_buffers = self._extension.PackedLinear.from_buffers
        linears = {name: from_buffers(parts[name], **layout) for name, layout in layouts.items()}
        return PackedWeights(self._extension, self._spec, linears, tensors)


def _identity(path: Path) -> tuple[str, int, int]:
    """Name, size and modification time of a file."""
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib lets go of the interpreter
        return dict(zip(tensors, pool.map(lambda tensor: zlib.crc32(_bytes(tensor)), tensors.values()), strict=True))


def _require_checksums(tensors: dict[str, torch.Tensor], expected: dict[str, int]) -> None:
    actual = _checksums(tensors)
    if wrong := sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)):
        raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more tensors have other checksums")


def _write_safetensors(file: BinaryIO, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """As `safetensors.torch.save_file`, but with every tensor aligned, and without a copy of them all."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0

    def add(name: str, dtype: str, shape: Iterable[int], size: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size

    for name, tensor in tensors.items():
        add(name, _DTYPES[tensor.dtype], tensor.shape, tensor.nbytes)
        if gap := -end % _ALIGNMENT:  # the format has no holes
            add(f"{_PADDING}{name}", "U8", [gap], gap)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))
        file.write(bytes(-tensor.nbytes % _ALIGNMENT))
