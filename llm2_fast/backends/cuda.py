"""The cuda backend: Triton kernels for decoders of the Llama and Gemma-3 families."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from llm2_fast.backends.compilation import cached_specs, check_same, compiled_sources, lora_updates
from llm2_fast.backends.compiled_backend import CompiledBackend
from llm2_fast.backends.shard import Shard
from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import FINAL_LAYER
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.source import ModelSource
from llm2_fast.models.spec import DecoderSpec
from llm2_fast.ops import triton_needed
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import FullVerifier, LoraVerifier, Verifier
from llm2_fast.verifier.full import LabelHead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from llm2_fast.backends.cuda_plans import CudaPlan
    from llm2_fast.backends.cuda_verified_steps import CudaHead
    from llm2_fast.backends.cuda_weights import CudaWeights

_Result = TypeVar("_Result")
_SHARE = 2  # of the free memory, once the weights are there, one part in so many is for caches unless told otherwise


def _on_device(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Run a method with the model's GPU as the current one, where kernels start.

    Memory that runs out there is a `MemoryError`, as it is elsewhere.
    """

    @functools.wraps(method)
    def call(self: CudaBackend, *args: Any, **kwargs: Any) -> _Result:
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            try:
                return method(self, *args, **kwargs)
            except torch.cuda.OutOfMemoryError as error:
                raise MemoryError(str(error)) from error

    return call


class CudaBackend(CompiledBackend):
    """Runs models of the Llama and Gemma-3 families with any verifier, in float32, float16 or bfloat16.

    Without a GPU it runs models on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`), for tests. A row's results
    depend neither on its batch nor on recomputation. See `llm2_fast.backends.cuda_step` for what a step launches.

    Args:
        model: The LLM. Its weights are copied; changes to the model afterwards have no effect.
        verifier: System 2, or None for plain decoding.
        kv_cache_memory_bytes: Bound on keys and values, the verifier's included; half of what is free if None.
        always_verify: A `full` verifier scores every step, not only ambiguous ones, so no step waits for the host.
        process_group: Processes that share the decoders' work, see `Shard`; all of them make the same calls.

    Raises:
        ArgumentError: The model or the verifier has a part that compiled decoders lack, the group cannot share the
            decoders evenly, there is no GPU, or the bound is too small for any sequence.
        MissingDependencyError: Triton is missing.
    """

    name = "cuda"

    def __init__(
        self,
        model: LoadedModel,
        verifier: Verifier | None,
        kv_cache_memory_bytes: int | None = None,
        *,
        always_verify: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._device = model.device
        if model.device.type == "cuda" and model.device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._make(model, verifier, kv_cache_memory_bytes, always_verify, Shard(process_group))

    @_on_device
    def _make(
        self,
        model: LoadedModel,
        verifier: Verifier | None,
        kv_cache_memory_bytes: int | None,
        always_verify: bool,
        shard: Shard,
    ) -> None:
        if (reason := self.unsupported(model, verifier)) is not None:
            raise ArgumentError("backend", "a backend for this model and verifier", f"'cuda' ({reason})")
        with triton_needed():
            from llm2_fast.backends import cuda_decoder, cuda_plans, cuda_weights
        layers = (FINAL_LAYER,) if verifier is None else tuple(verifier.head_for(model).layers)
        head = None if verifier is None else _head_on_device(model, verifier, self._device)
        updates = lora_updates(model, verifier) if isinstance(verifier, LoraVerifier) else {}
        specs = cached_specs(model, verifier)
        for spec in specs:
            shard.check(spec)
        weights = [cuda_weights.CudaWeights(model.source, self._device, updates, shard)]
        if isinstance(verifier, FullVerifier):
            weights.append(cuda_weights.CudaWeights(verifier.source, self._device, shard=shard))
        if kv_cache_memory_bytes is None and self._device.type == "cuda":
            kv_cache_memory_bytes = shard.least(torch.cuda.mem_get_info()[0] // _SHARE, self._device)
        super().__init__(model, verifier, kv_cache_memory_bytes, [shard.spec(spec) for spec in specs])

        def decoder(of: CudaWeights, source: ModelSource, caches: int, read: tuple[int, ...]):
            made = cuda_decoder.CudaDecoder(of, caches * self._budget.num_blocks, self.max_position_embeddings, read)
            with source.running() as module:
                check_same(made.last_hidden_state, module, of.spec)
            return made

        caches = 2 if isinstance(verifier, LoraVerifier) else 1  # the adapter's is part of the LLM's
        own_layers = (FINAL_LAYER,) if isinstance(verifier, FullVerifier) else layers
        self._llm = decoder(weights[0], model.source, caches, own_layers)
        self._plan: CudaPlan
        if verifier is None:
            self._plan = cuda_plans.PlainCudaPlan(self._llm)
        elif isinstance(verifier, FullVerifier):
            plan = cuda_plans.AlwaysCudaPlan if always_verify else cuda_plans.LazyCudaPlan
            self._plan = plan(self._llm, head, decoder(weights[1], verifier.source, 1, layers))
        elif isinstance(verifier, LoraVerifier):
            self._plan = cuda_plans.JointLoraCudaPlan(self._llm, head)
        else:
            self._plan = cuda_plans.JointCudaPlan(self._llm, head)

    @staticmethod
    def unsupported(model: LoadedModel, verifier: Verifier | None) -> str | None:
        """Why this backend cannot run the model and the verifier; None if it can."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        import triton

        device = "cpu" if triton.knobs.runtime.interpret else "cuda"
        try:
            for source in compiled_sources(model, verifier):
                DecoderSpec.from_model(source.skeleton)
                if source.device.type != device:
                    raise ArgumentError("model", f"a model on {device}", str(source.device))
        except ArgumentError as error:
            return str(error)
        return None

    @_on_device
    def reserve(self, sequence: Sequence) -> None:
        self._plan.check(sequence)
        self._plan.settle()
        super().reserve(sequence)

    @_on_device
    def prefill(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.reserve(sequence)
        self._plan.release()
        self._plan.extend(sequences)

    @_on_device
    def fork(self, parent: Sequence, child: Sequence, length: int | None = None) -> None:
        self._plan.settle()
        super().fork(parent, child, length)

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        return self._plan.continues(sequences)

    @_on_device
    def begin_step(self, sequences: list[Sequence]) -> Callable[[], list[StepOutput]]:
        if not self._plan.continues(sequences):
            self._plan.settle()
        for sequence in sequences:
            self._make_room(sequence)
        return self._plan.begin(sequences)

    def step(self, sequences: list[Sequence]) -> list[StepOutput]:
        return self.begin_step(sequences)()

    @_on_device
    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        return super().logits(sequences)

    @_on_device
    def free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._plan.release()
        super().free(sequence)

    def _length(self, sequence: Sequence) -> int:
        return max(len(sequence), self._llm.lengths[sequence.slot]) + self._plan.num_unknown


def _head_on_device(model: LoadedModel, verifier: Verifier, device: torch.device) -> CudaHead:
    from llm2_fast.backends.cuda_verified_steps import CudaHead

    def vector(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float().to(device).contiguous()

    head = verifier.head_for(model)
    if isinstance(head, LabelHead):
        return CudaHead(None, None, vector(head.weight).flatten(), 0.0 if head.bias is None else float(head.bias))
    score = vector(head.score.weight).flatten()
    if head.dense is None:
        return CudaHead(None, None, score, 0.0)
    return CudaHead(vector(head.dense.weight), vector(head.dense.bias), score, 0.0)
