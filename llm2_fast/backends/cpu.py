"""The cpu backend: compiled decoders of the Llama and Gemma-3 families in float32 or bfloat16."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

from llm2_fast import ops
from llm2_fast.backends.backend import Backend, check_fork
from llm2_fast.backends.cached_decoder import CachedDecoder
from llm2_fast.backends.cpu_plans import CpuPlan, JointCpuPlan, JointLoraCpuPlan, LazyCpuPlan, PlainCpuPlan
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import FINAL_LAYER
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.spec import DecoderSpec, text_decoder
from llm2_fast.models.weights import LoraUpdate, PackedWeights
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import FullVerifier, HeadVerifier, LoraVerifier, ScoreHead, Verifier
from llm2_fast.verifier.full import LabelHead
from llm2_fast.verifier.lora import LoraDecoder
from llm2_fast.verifier.scorer import Scorer


class CpuBackend(Backend):
    """Runs models of the Llama and Gemma-3 families with any verifier, a step per call of the C++ extension.

    A row's results are bitwise the same alone, in any batch, with any number of threads and after recomputation.
    Threads: `torch.get_num_threads()`.

    Args:
        model: The LLM. Its weights are packed; changes to the model afterwards have no effect.
        verifier: System 2, or None for plain decoding.
        quantization: Of the linear layers of the LLM and of a `full` verifier's network; None keeps their dtype.

    Raises:
        ArgumentError: The model or the verifier has a part that compiled decoders lack, or the extension is missing.
    """

    name = "cpu"

    def __init__(self, model: LoadedModel, verifier: Verifier | None, quantization: Quantization | None = None) -> None:
        if (reason := self.unsupported(model, verifier)) is not None:
            raise ArgumentError("backend", "a backend for this model and verifier", f"'cpu' ({reason})")
        extension = ops.cpu_extension()
        weights = PackedWeights(extension, model.model, quantization)
        scorer = None if verifier is None else verifier.scorer(model)
        updates = _lora_updates(scorer.decoder) if isinstance(verifier, LoraVerifier) else {}
        self._llm = CachedDecoder(extension, weights.decoder(updates), weights.spec)
        self._llm.check(model.model, quantization)
        self._plan = _make_plan(extension, self._llm, verifier, scorer, quantization)
        configs = [model.model.config.get_text_config()]
        if isinstance(verifier, FullVerifier):
            configs.append(verifier.network.config.get_text_config())
        self.vocab_size = min(config.vocab_size for config in configs)
        self.max_position_embeddings = min(config.max_position_embeddings for config in configs)

    @staticmethod
    def unsupported(model: LoadedModel, verifier: Verifier | None) -> str | None:
        """Why this backend cannot run the model and the verifier; None if it can."""
        if (problem := ops.cpu_extension_problem()) is not None:
            return problem
        try:
            DecoderSpec.from_model(model.model)
            if isinstance(verifier, FullVerifier):
                DecoderSpec.from_model(verifier.network)
        except ArgumentError as error:
            return str(error)
        return None

    def prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.slot = self._llm.allocate()
            self._plan.add(sequence)
        self._llm.extend([s.slot for s in sequences], [s.tokens_from(0) for s in sequences])

    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        check_fork(child, length, verified=not isinstance(self._plan, PlainCpuPlan))
        child.slot = self._llm.fork(parent.slot, length)
        self._plan.fork(parent.slot, child.slot)

    def free(self, sequence: Sequence) -> None:
        slot, sequence.slot = sequence.slot, None
        if slot is not None:
            self._plan.free(slot)
            self._llm.free(slot)

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        return self._plan.step(sequences)

    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        return self._plan.logits(sequences)

    def prefix(self, sequence: Sequence) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cached keys and values of the LLM per layer, each [num_kv_heads, cached_length, head_dim]."""
        return self._llm.prefix(sequence.slot)


def _make_plan(
    extension: ModuleType,
    llm: CachedDecoder,
    verifier: Verifier | None,
    scorer: Scorer | None,
    quantization: Quantization | None,
) -> CpuPlan:
    """The plan for a verifier's kind."""
    if verifier is None:
        return PlainCpuPlan(extension, llm)
    head = _pack_head(extension, scorer.head, scorer.decoder.model.config.get_text_config().hidden_size)
    if isinstance(verifier, HeadVerifier):
        return JointCpuPlan(extension, llm, head)
    if isinstance(verifier, LoraVerifier):
        adapted = CachedDecoder(extension, llm.decoder, llm.spec, adapted=True)
        return JointLoraCpuPlan(extension, llm, adapted, head)
    weights = PackedWeights(extension, verifier.network, quantization)
    network = CachedDecoder(extension, weights.decoder(), weights.spec)
    network.check(verifier.network, quantization)
    return LazyCpuPlan(extension, llm, network, head)


def _lora_updates(decoder: LoraDecoder) -> dict[str, LoraUpdate]:
    """By module path below the decoder. Modules elsewhere, those that see images, do not see text."""
    deltas = dict(decoder.adapted)
    modules = text_decoder(decoder.model).named_modules()
    return {
        path: (deltas[module].a, deltas[module].b * deltas[module].scaling)
        for path, module in modules
        if module in deltas
    }


def _pack_head(extension: ModuleType, head: ScoreHead | LabelHead, hidden_size: int) -> Any:
    """`llm2_fast_C.ScoreHead` of a head."""

    def vector(tensor: torch.Tensor) -> object:
        return to_dlpack(tensor.detach().float().contiguous().flatten())

    if isinstance(head, LabelHead):
        bias = 0.0 if head.bias is None else float(head.bias)
        return extension.ScoreHead([FINAL_LAYER], hidden_size, 0, None, None, vector(head.weight), bias)
    dense = None if head.dense is None else vector(head.dense.weight)
    dense_bias = None if head.dense is None else vector(head.dense.bias)
    weight = vector(head.score.weight)
    return extension.ScoreHead(list(head.layers), hidden_size, head.mlp_size, dense, dense_bias, weight, 0.0)
