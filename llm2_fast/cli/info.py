"""`llm2-fast info`: what is installed, what can run, and what a model or verifier on disk is."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2_fast.cli.json_lines import print_json
from llm2_fast.errors import ArgumentError, CheckpointError, Llm2FastError
from llm2_fast.models import smollm2
from llm2_fast.version import __version__

if TYPE_CHECKING:
    from llm2_fast.models.source import ModelSource

SUMMARY = "show versions, devices and backends, or what a model or verifier on disk is"
_LIBRARIES = ("torch", "transformers", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    parser.add_argument("path", metavar="PATH", nargs="?", help="directory of a model or verifier, or a GGUF file")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the facts, each as soon as it is known; those that need torch come last."""
    facts = describe_installation() if options.path is None else describe_checkpoint(Path(options.path))
    if options.json:
        print_json(dict(facts))
        return 0
    for name, value in facts:
        text = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else value
        print(f"{name.replace('_', ' '):<23} {text}", flush=True)
    return 0


def describe_installation() -> Iterator[tuple[str, Any]]:
    """Names and values of what is installed and what can run here."""
    yield "llm2_fast", __version__
    yield "python", platform.python_version()
    for library in _LIBRARIES:
        yield library, _version(library)
    yield from _path_or_problem("demo_model", smollm2.model_file)
    yield from _path_or_problem("demo_verifier", smollm2.default_verifier)

    import torch

    yield "devices", ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
    yield "cpu_threads", torch.get_num_threads()
    yield from _describe_cpu_extension()

    from llm2_fast.engine import _BACKENDS
    from llm2_fast.models.loading import cache_directory

    yield "backends", list(_BACKENDS)
    yield "cache_directory", str(cache_directory())


def describe_checkpoint(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and values of a model or verifier.

    Raises:
        ArgumentError: There is no such file or directory.
        CheckpointError: It is neither a model nor a verifier that can be read.
    """
    if not path.exists():
        raise ArgumentError("path", "a directory or a GGUF file", str(path))
    from llm2_fast.models.loading import load_model
    from llm2_fast.verifier import FullVerifier, Verifier

    verifier_problem = None
    if path.is_dir():
        try:
            verifier = Verifier.from_pretrained(path, device="cpu")
        except CheckpointError as error:
            verifier_problem = error
        else:
            yield "kind", f"verifier, {verifier.kind}"
            yield "base_model", verifier.base_name
            yield "base_fingerprint", verifier.base_fingerprint
            if isinstance(verifier, FullVerifier):
                yield from _describe_network(verifier.source)
            yield from _describe_files(path)
            return
    try:
        model = load_model(path, device="cpu")
    except CheckpointError as error:
        if verifier_problem is None:
            raise
        raise CheckpointError(f"neither a verifier ({verifier_problem}) nor a model ({error})") from error
    yield "kind", "model"
    yield from _describe_network(model.source)
    yield from _describe_files(path)


def _describe_network(source: ModelSource) -> Iterator[tuple[str, Any]]:
    from llm2_fast.models.fingerprint import fingerprint

    config = source.config.get_text_config()
    yield "architecture", type(source.skeleton).__name__
    yield "fingerprint", fingerprint(source)
    yield "dtype", str(source.dtype).removeprefix("torch.")
    for field in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        yield field, getattr(config, field, None)
    yield "parameters", source.skeleton.num_parameters()


def _describe_files(path: Path) -> Iterator[tuple[str, Any]]:
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    yield "weight_files", [file.name for file in files]
    yield "weight_bytes", sum(file.stat().st_size for file in files)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _path_or_problem(name: str, locate: Callable[[], Path]) -> Iterator[tuple[str, str | None]]:
    try:
        yield name, str(locate())
    except Llm2FastError as error:
        yield name, None
        yield f"{name}_problem", str(error)


def _describe_cpu_extension() -> Iterator[tuple[str, str | None]]:
    """The instruction-set tier of the C++ extension, or why it cannot be used."""
    from llm2_fast.ops import cpu_extension, cpu_extension_problem

    extension, tier, problem = cpu_extension(), None, cpu_extension_problem()
    if extension is not None:
        try:
            tier = extension.cpu_isa()
        except ValueError as error:  # LLM2_FAST_CPU_ISA names a tier that cannot run here
            problem = str(error)
    yield "cpu_extension", tier
    if problem is not None:
        yield "cpu_extension_problem", problem
