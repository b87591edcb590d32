"""`Engine`: prompts in, generations out, over any backend. `load` makes one, `generate` does it all in one call."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2_fast.backends.backend import Backend
from llm2_fast.backends.cpu import CpuBackend
from llm2_fast.backends.reference import ReferenceBackend
from llm2_fast.config import GenerationConfig, check_number, check_option_names
from llm2_fast.detokenizer import Detokenizer
from llm2_fast.errors import ArgumentError
from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.models.quantization import Quantization
from llm2_fast.prompts import Prompt, as_prompt_list, encode_prompt
from llm2_fast.results import FinishReason, Generation, GenerationStats, Sample, StepOutput, StreamEvent
from llm2_fast.sequence import Sequence
from llm2_fast.verifier import Verifier

_LOGGER = logging.getLogger(__name__)
_BACKENDS = {backend.name: backend for backend in (CpuBackend, ReferenceBackend)}


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    verifier: str | os.PathLike[str] | Verifier | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    quantization: str | None = None,
    max_batch_size: int = 8,
    max_length: int | None = None,
    allow_pickle: bool = False,
) -> Engine:
    """Load an LLM, and a verifier to steer it, into an engine.

    Args:
        model: A Hugging Face directory or hub id, the path of a GGUF file (converted once and cached), or a loaded
            model, which is used as it is.
        verifier: Directory or hub id of a verifier, a loaded `Verifier`, or None for plain decoding.
        tokenizer: Instead of the one beside the weights. A model without one takes token ids only.
        device: "auto" or a torch device.
        dtype: "auto" (the checkpoint's; float32 for GGUF) or a floating-point torch dtype or its name.
        backend: "cpu", "reference", or "auto": "cpu" where it supports model and verifier, else "reference"; a log
            message then says why.
        quantization: Weights of the linear layers, of the LLM and of a `full` verifier, as int8: "int8" with a float32
            scale per output feature, or "int8-group32", "int8-group64", "int8-group128" with one per so many inputs.
            Only the cpu backend has it. None keeps the dtype.
        max_batch_size: Sequences decoded together; more wait their turn.
        max_length: Bound on prompt and new tokens together; by default, and at most, the models' context.
        allow_pickle: Also read pickled weights, which can run code while they load.

    Raises:
        ArgumentError: An option is unknown or out of range.
        CheckpointError: A checkpoint is missing, damaged or pickled.
        IncompatibleVerifierError: The verifier was made for another model or tokenizer.
    """
    if not isinstance(backend, str) or (backend != "auto" and backend not in _BACKENDS):
        raise ArgumentError("backend", f"'auto' or one of {', '.join(map(repr, _BACKENDS))}", repr(backend))
    int8 = None if quantization is None else Quantization.from_name(quantization)
    if int8 is not None and backend not in ("auto", CpuBackend.name):
        raise ArgumentError("quantization", f"None with backend {backend!r}, which has no int8 weights", quantization)
    check_number("max_batch_size", max_batch_size, integer=True, minimum=1)
    if max_length is not None:
        check_number("max_length", max_length, integer=True, minimum=2)
    if verifier is not None and not isinstance(verifier, (str, os.PathLike, Verifier)):
        raise ArgumentError("verifier", "a path, a hub id, a llm2_fast.Verifier or None", type(verifier).__name__)
    loaded = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype, allow_pickle=allow_pickle)
    if isinstance(verifier, (str, os.PathLike)):
        verifier = Verifier.from_pretrained(
            verifier, device=loaded.model.device, dtype=loaded.model.dtype, allow_pickle=allow_pickle
        )
    chosen = _choose_backend(loaded, verifier, quantization) if backend == "auto" else _BACKENDS[backend]
    decoding = chosen(loaded, verifier) if int8 is None else CpuBackend(loaded, verifier, int8)
    return Engine(decoding, loaded, verifier, max_batch_size=max_batch_size, max_length=max_length)


def generate(
    model: str | os.PathLike[str] | PreTrainedModel,
    verifier: str | os.PathLike[str] | Verifier | None,
    prompts: Prompt | Iterable[Prompt],
    **options: Any,
) -> list[Generation]:
    """Load `model` and `verifier` and continue `prompts`: `load` and `Engine.generate` in one call.

    Args:
        model, verifier: As for `load`.
        prompts: As for `Engine.generate`.
        **options: Keywords of `load`, of `Engine.generate` and of `GenerationConfig`.

    Returns:
        One `Generation` per prompt.

    Raises:
        ArgumentError: An option is unknown (checked before anything is loaded) or out of range.
    """
    of_load = {name for name, p in inspect.signature(load).parameters.items() if p.kind is p.KEYWORD_ONLY}
    check_option_names(options, of_load | {"config", "request_ids", *GenerationConfig.option_names()}, what="option")
    loading = {name: options.pop(name) for name in of_load & options.keys()}
    request_ids = options.pop("request_ids", None)
    config = _merge_config(options.pop("config", None), options)
    return load(model, verifier, **loading).generate(prompts, config, request_ids=request_ids)


class Engine:
    """Decodes prompts with one model and at most one verifier. Make one with `load`.

    Threads may share an engine. Engines that share a model, or a verifier, must not run at the same time.

    Attributes:
        model: The LLM and its tokenizer.
        verifier: System 2, or None.
        max_batch_size: Sequences decoded together.
        max_length: Bound on prompt and new tokens together; None if the model sets none.
    """

    def __init__(
        self,
        backend: Backend,
        model: LoadedModel,
        verifier: Verifier | None,
        *,
        max_batch_size: int,
        max_length: int | None,
    ) -> None:
        self.model, self.verifier, self.max_batch_size = model, verifier, max_batch_size
        self._backend = backend
        self._lock = threading.Lock()  # threads take turns, a step at a time
        limits = [limit for limit in (backend.max_position_embeddings, max_length) if limit is not None]
        self.max_length = min(limits, default=None)
        self._eos_token_ids = _eos_token_ids(model)

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sample."""
        return self._eos_token_ids

    @contextmanager
    def exclusive_backend(self) -> Iterator[Backend]:
        """The backend, for a decoding loop of one's own; other threads wait until it is given back."""
        with self._lock:
            yield self._backend

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer."""
        return self.model.tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        config: GenerationConfig | None = None,
        *,
        request_ids: Iterable[int] | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Continue every prompt.

        Args:
            prompts: A string, chat messages (through the model's chat template), token ids, or a list of any of these.
                They are decoded together, `max_batch_size` sequences at a time; the rest wait for a free place.
            config: Options; the defaults if None.
            request_ids: One per prompt, in [0, 2**31): part of the random numbers of sampling, so that a prompt can be
                replayed alone or elsewhere. By default the prompt's index.
            **overrides: Single options that replace those of `config`.

        Returns:
            One `Generation` per prompt, in order. Apart from its request id, a prompt's tokens depend on nothing else
            in the list.

        Raises:
            ArgumentError: A prompt or an option is unusable; nothing has been computed then.
        """
        requests = self._make_requests(prompts, _merge_config(config, overrides), request_ids)
        for _ in self._decode(requests):
            pass
        return [request.generation for request in requests]

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, request_id: int = 0, **overrides: Any
    ) -> Iterator[StreamEvent]:
        """Continue one prompt, token by token.

        Args:
            prompt: As for `generate`, but one.
            config, request_id, **overrides: As for `generate`. With n > 1 the samples' events are interleaved.

        Yields:
            A `StreamEvent` per token. Joined, a sample's texts are its `Sample.text`.

        Raises:
            ArgumentError: As for `generate`, at the call, not at the first event.
        """
        if (count := len(as_prompt_list(prompt))) != 1:
            raise ArgumentError("prompt", "one prompt", f"{count} prompts")
        return self._decode(self._make_requests(prompt, _merge_config(config, overrides), [request_id]))

    def _make_requests(
        self, prompts: Prompt | Iterable[Prompt], config: GenerationConfig, request_ids: Iterable[int] | None
    ) -> list[_Request]:
        prompts = as_prompt_list(prompts)
        if not isinstance(request_ids, (Iterable, type(None))):
            raise ArgumentError("request_ids", "integers, one per prompt", repr(request_ids))
        request_ids = list(range(len(prompts)) if request_ids is None else request_ids)
        if len(request_ids) != len(prompts):
            raise ArgumentError("request_ids", f"one per prompt, {len(prompts)}", f"{len(request_ids)}")
        for request_id in request_ids:
            check_number("request_ids", request_id, integer=True, minimum=0, maximum=2**31 - 1)
        if config.stop and self.tokenizer is None:
            raise ArgumentError("stop", "no stop strings, since the model came without a tokenizer", config.stop)
        requests = []
        for index, (request_id, prompt) in enumerate(zip(request_ids, prompts, strict=True)):
            name = f"prompts[{index}]"
            token_ids = encode_prompt(prompt, self.tokenizer, self._backend.vocab_size, name)
            if self.max_length is not None and len(token_ids) + config.max_new_tokens > self.max_length:
                expected = f"prompt and max_new_tokens within the context of {self.max_length} tokens"
                actual = f"{len(token_ids)} + {config.max_new_tokens} = {len(token_ids) + config.max_new_tokens}"
                raise ArgumentError(name, expected, actual)
            eos_token_ids = () if config.ignore_eos else self._eos_token_ids
            requests.append(_Request(request_id, token_ids, config, eos_token_ids, self.tokenizer))
        return requests

    def _decode(self, requests: list[_Request]) -> Iterator[StreamEvent]:
        """The loop: admit, step, record, free."""
        waiting = deque(sample for request in requests for sample in request.samples)
        live: list[_Sampling] = []
        try:
            while waiting or live:
                free = self.max_batch_size - len(live)
                live += self._admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
                with self._lock:
                    outputs = self._backend.step([sampling.sequence for sampling in live])
                for sampling, output in zip(live, outputs, strict=True):
                    yield sampling.record(output)
                    if sampling.finished:
                        self._free(sampling.sequence)
                live = [sampling for sampling in live if not sampling.finished]
        finally:
            # Also after Ctrl-C, an error, or a stream that is not read to its end.
            for request in requests:
                for sequence in (request.prefix, *(sampling.sequence for sampling in request.samples)):
                    self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        with self._lock:
            self._backend.free(sequence)

    def _admit(self, samplings: list[_Sampling]) -> list[_Sampling]:
        """Prefill each prompt once; its samples fork from the prefix, and the last one takes it over."""
        new = [sampling.request for sampling in samplings if sampling.sequence.sample_index == 0]
        if new:
            start = time.perf_counter()
            with self._lock:
                self._backend.prefill([request.prefix for request in new])
            for request in new:
                request.prefilled(time.perf_counter() - start)
        for sampling in samplings:
            prefix, sequence = sampling.request.prefix, sampling.sequence
            if sampling is sampling.request.samples[-1]:
                sequence.slot, prefix.slot = prefix.slot, None
            else:
                with self._lock:
                    self._backend.fork(prefix, sequence)
        return samplings


@dataclass
class _Request:
    """One prompt and its samples under way."""

    request_id: int
    prompt_token_ids: list[int]
    config: GenerationConfig
    eos_token_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None
    stats: GenerationStats = field(default_factory=GenerationStats)
    decode_start: float = 0.0

    def __post_init__(self) -> None:
        self.prefix = self._sequence(-1)
        self.samples = [_Sampling(self, self._sequence(index)) for index in range(self.config.n)]

    def _sequence(self, sample_index: int) -> Sequence:
        return Sequence(self.request_id, sample_index, self.config, self.prompt_token_ids, self.eos_token_ids)

    def prefilled(self, seconds: float) -> None:
        """The prompt's keys and values are there."""
        self.stats.prefill_seconds, self.decode_start = seconds, time.perf_counter()

    @property
    def generation(self) -> Generation:
        """The result, once all samples have finished."""
        return Generation(self.prompt_token_ids, [sampling.sample for sampling in self.samples], self.stats)


class _Sampling:
    """One sample under way: its sequence, its text so far and its result."""

    def __init__(self, request: _Request, sequence: Sequence) -> None:
        self.request, self.sequence = request, sequence
        self.sample = Sample(token_ids=sequence.token_ids, trace=[] if request.config.trace else None)
        self._detokenizer = Detokenizer(request.tokenizer, request.config.stop) if request.tokenizer else None

    @property
    def finished(self) -> bool:
        """The sample has its last token."""
        return self.sample.finish_reason is not None

    def record(self, output: StepOutput) -> StreamEvent:
        """Take one step's outcome into the sequence, the sample and the statistics."""
        sample = self.sample
        self.request.stats.count(output)
        text = None if self._detokenizer is None else ""
        if output.token_id is not None:
            self.sequence.token_ids.append(output.token_id)
            sample.logprobs.append(output.logprob)
            if output.trace is not None:
                sample.trace.append(output.trace)
            if self._detokenizer is not None:
                text = self._detokenizer.push(output.token_id)
        sample.finish_reason, sample.error = self._finish_reason(output), output.error
        if self.finished:
            if self._detokenizer is not None:
                text += self._detokenizer.finish()
                sample.text = self._detokenizer.text
                if self._detokenizer.stopped and sample.finish_reason == "length":
                    sample.finish_reason = "stop"  # the last characters were held back until now
            self.request.stats.decode_seconds = time.perf_counter() - self.request.decode_start
        return StreamEvent(
            self.sequence.sample_index,
            output.token_id,
            text,
            output.logprob,
            output.trace,
            sample.finish_reason,
            sample.error,
        )

    def _finish_reason(self, output: StepOutput) -> FinishReason | None:
        if output.error is not None:
            return "error"
        if output.token_id in self.sequence.eos_token_ids:
            return "eos"
        if self._detokenizer is not None and self._detokenizer.stopped:
            return "stop"
        if len(self.sequence.token_ids) >= self.request.config.max_new_tokens:
            return "length"
        return None


def _choose_backend(model: LoadedModel, verifier: Verifier | None, quantization: str | None) -> type[Backend]:
    if (reason := CpuBackend.unsupported(model, verifier)) is None:
        return CpuBackend
    if quantization is not None:
        raise ArgumentError("quantization", f"None, since the cpu backend cannot run this ({reason})", quantization)
    _log_reference(reason)
    return ReferenceBackend


@functools.cache
def _log_reference(reason: str) -> None:
    """Once per reason."""
    _LOGGER.warning("backend: 'reference', which is slow, because the cpu backend cannot run this: %s", reason)


def _merge_config(config: GenerationConfig | None, overrides: dict[str, Any]) -> GenerationConfig:
    if config is not None and not isinstance(config, GenerationConfig):
        raise ArgumentError("config", "a GenerationConfig or None", type(config).__name__)
    return (config or GenerationConfig()).merge(**overrides)


def _eos_token_ids(model: LoadedModel) -> tuple[int, ...]:
    """End-of-sequence tokens: the generation config's, else the model config's, else the tokenizer's."""
    sources = (getattr(model.model, "generation_config", None), model.model.config.get_text_config(), model.tokenizer)
    for source in sources:
        if (eos := getattr(source, "eos_token_id", None)) is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return ()
