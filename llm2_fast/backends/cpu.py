"""The cpu backend: compiled decoders of the Llama and Gemma-3 families in float32 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

from llm2_fast import ops
from llm2_fast.backends.cached_decoder import CachedDecoder
from llm2_fast.backends.compilation import compiled_sources, lora_updates
from llm2_fast.backends.compiled_backend import CompiledBackend
from llm2_fast.backends.cpu_plans import CpuPlan, JointCpuPlan, JointLoraCpuPlan, LazyCpuPlan, PlainCpuPlan
from llm2_fast.errors import ArgumentError
from llm2_fast.models.checkpoint import CheckpointSource
from llm2_fast.models.decoder import FINAL_LAYER
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.packed_file import PackedFile
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.source import ModelSource
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.models.weights import LoraUpdate, PackedWeights
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import FullVerifier, HeadVerifier, LoraVerifier, Verifier
from llm2_fast.verifier.full import LabelHead

_DTYPES = ("float32", "bfloat16")


class CpuBackend(CompiledBackend):
    """Runs models of the Llama and Gemma-3 families with any verifier, a step per call of the C++ extension.

    A row's results are bitwise the same alone, in any batch, with any number of threads and after recomputation.
    Threads: `torch.get_num_threads()`.

    Args:
        model: The LLM. Its weights are packed; changes to the model afterwards have no effect.
        verifier: System 2, or None for plain decoding.
        kv_cache_memory_bytes: Bound on keys and values, the verifier's included; half of the machine's memory if None.
        cache_packed: Keep the packed weights of checkpoints in files, see `PackedFile`.
        quantization: Of the linear layers of the LLM and of a `full` verifier's network; None keeps their dtype.

    Raises:
        ArgumentError: The model or the verifier has a part that compiled decoders lack, the extension is missing, or
            the bound is too small for any sequence or more than can be had.
    """

    name = "cpu"

    def __init__(
        self,
        model: LoadedModel,
        verifier: Verifier | None,
        kv_cache_memory_bytes: int | None = None,
        *,
        cache_packed: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        if (reason := self.unsupported(model, verifier)) is not None:
            raise ArgumentError("backend", "a backend for this model and verifier", f"'cpu' ({reason})")
        self.quantization = quantization
        extension = ops.cpu_extension()
        head = _pack_head(extension, model, verifier)  # first, since it may not fit the model
        updates = lora_updates(model, verifier) if isinstance(verifier, LoraVerifier) else {}
        super().__init__(model, verifier, kv_cache_memory_bytes)
        compiler = _Compiler(extension, self._budget.num_blocks, cache_packed, quantization)
        self._llm = compiler.compile(model.source, updates)
        self._plan = _make_plan(compiler, self._llm, head, verifier)

    @staticmethod
    def unsupported(model: LoadedModel, verifier: Verifier | None) -> str | None:
        """Why this backend cannot run the model and the verifier; None if it can."""
        if (problem := ops.cpu_extension_problem()) is not None:
            return problem
        try:
            for source in compiled_sources(model, verifier):
                spec = DecoderSpec.from_model(source.skeleton)
                if source.device.type != "cpu":
                    raise ArgumentError("model", "a model on the CPU", str(source.device))
                if spec.dtype not in _DTYPES:
                    raise ArgumentError("model", f"dtype {' or '.join(_DTYPES)} for the cpu backend", spec.dtype)
        except ArgumentError as error:
            return str(error)
        return None

    def prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.reserve(sequence)
        slots = [s.slot for s in sequences]
        self._llm.extend(slots, [s.tokens_from(self._llm.lengths[s.slot]) for s in sequences])
        self._plan.prefill(sequences)


def _make_plan(compiler: _Compiler, llm: CachedDecoder, head: Any, verifier: Verifier | None) -> CpuPlan:
    """The plan for a verifier's kind."""
    extension = compiler.extension
    if verifier is None:
        return PlainCpuPlan(extension, llm)
    if isinstance(verifier, HeadVerifier):
        return JointCpuPlan(extension, llm, head)
    if isinstance(verifier, LoraVerifier):
        adapted = CachedDecoder(extension, llm.decoder, llm.spec, compiler.num_blocks, adapted=True)
        return JointLoraCpuPlan(extension, llm, adapted, head)
    network = compiler.compile(verifier.source)
    return LazyCpuPlan(extension, llm, network, head)


@dataclass(frozen=True)
class _Compiler:
    """Makes compiled decoders.

    Attributes:
        extension: The module `llm2_fast_C`.
        num_blocks: Of each decoder's cache.
        cache_packed: Keep the packed weights of checkpoints in files.
        quantization: Of linear layers.
    """

    extension: ModuleType
    num_blocks: int
    cache_packed: bool
    quantization: Quantization | None

    def compile(self, source: ModelSource, updates: dict[str, LoraUpdate] | None = None) -> CachedDecoder:
        """A decoder that was found to compute what the model does.

        A packed file is written only after the check, and is read only by versions that would check the same.
        """
        kept = self.cache_packed and isinstance(source, CheckpointSource)
        file = PackedFile(self.extension, source, self.quantization) if kept else None
        if file is not None and (weights := file.read()) is not None:
            return self._decoder(weights, updates)
        weights = PackedWeights.pack(self.extension, source, self.quantization)
        decoder = self._decoder(weights, updates)
        with source.running(self.quantization) as model:
            decoder.check(model)
        if file is not None:
            file.write(weights)
        return decoder

    def _decoder(self, weights: PackedWeights, updates: dict[str, LoraUpdate] | None) -> CachedDecoder:
        return CachedDecoder(self.extension, weights.decoder(updates), weights.spec, self.num_blocks)


def _pack_head(extension: ModuleType, model: LoadedModel, verifier: Verifier | None) -> Any:
    """`llm2_fast_C.ScoreHead` of a verifier for `model`, None without one."""
    if verifier is None:
        return None
    head = verifier.head_for(model)
    config = verifier.source.config if isinstance(verifier, FullVerifier) else model.config
    hidden_size = config.get_text_config().hidden_size

    def vector(tensor: torch.Tensor) -> object:
        return to_dlpack(tensor.detach().float().contiguous().flatten())

    if isinstance(head, LabelHead):
        bias = 0.0 if head.bias is None else float(head.bias)
        return extension.ScoreHead([FINAL_LAYER], hidden_size, 0, None, None, vector(head.weight), bias)
    dense = None if head.dense is None else vector(head.dense.weight)
    dense_bias = None if head.dense is None else vector(head.dense.bias)
    weight = vector(head.score.weight)
    return extension.ScoreHead(list(head.layers), hidden_size, head.mlp_size, dense, dense_bias, weight, 0.0)
