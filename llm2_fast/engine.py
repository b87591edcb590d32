"""`Engine`: prompts in, generations out, over any backend. `load` makes one, `generate` does it all in one call."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2_fast.backends.backend import Backend
from llm2_fast.backends.cpu import CpuBackend
from llm2_fast.backends.cuda import CudaBackend
from llm2_fast.backends.reference import ReferenceBackend
from llm2_fast.config import GenerationConfig, check_number, check_option_names
from llm2_fast.errors import ArgumentError, CacheFullError
from llm2_fast.models.loading import LoadedModel, load_model
from llm2_fast.models.quantization import Quantization
from llm2_fast.prompts import Prompt, as_prompt_list, encode_prompt
from llm2_fast.request import Request
from llm2_fast.results import Generation, StreamEvent
from llm2_fast.schedule import Schedule
from llm2_fast.verifier import FullVerifier, Verifier

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LOGGER = logging.getLogger(__name__)
_BACKENDS = {backend.name: backend for backend in (CpuBackend, CudaBackend, ReferenceBackend)}


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
    kv_cache_memory_bytes: int | None = None,
    cache_packed: bool = False,
    always_verify: bool = False,
    process_group: ProcessGroup | None = None,
    allow_pickle: bool = False,
) -> Engine:
    """Load an LLM, and a verifier to steer it, into an engine.

    Args:
        model: A Hugging Face directory or hub id, the path of a GGUF file (converted once and cached), or a loaded
            model, which is used as it is.
        verifier: Directory or hub id of a verifier, a loaded `Verifier`, or None for plain decoding.
        tokenizer: Instead of the one beside the weights. A directory without one, or a model in memory, takes token ids
            only.
        device: "auto" or a torch device.
        dtype: "auto" (the checkpoint's; float32 for GGUF) or a floating-point torch dtype or its name.
        backend: "cpu", "cuda", "reference", or "auto": that of the model's device, "cpu" or "cuda", where it supports
            model and verifier, else "reference"; a log message then says why.
        quantization: Weights of the linear layers, of the LLM and of a `full` verifier, as int8: "int8" with a float32
            scale per 32 inputs of an output feature, "int8-group64" and "int8-group128" per 64 and 128 of them,
            "int8-channel" per output feature. Only the cpu backend has it. None keeps the dtype.
        max_batch_size: Sequences decoded together; more wait their turn.
        max_length: Bound on prompt and new tokens together; by default, and at most, the models' context.
        kv_cache_memory_bytes: Bound on the keys and values of all sequences, a verifier's included; half of the memory
            of the machine (or container) if None. Sequences without room wait, or are preempted and computed again,
            which changes none of their tokens. On a GPU half of its free memory if None. The reference's caches grow as
            needed.
        cache_packed: Keep the weights, as the cpu backend packs them, in files of the cache directory, and map those
            into memory from the next load on. Saves the packing and memory that processes can share; costs as much
            disk space as the weights. For models and `full` verifiers that are read from files.
        always_verify: A `full` verifier scores the candidates of every step, not of ambiguous ones only. No token
            changes; a step costs more, but never waits to know whether it is ambiguous. For the cuda backend.
        process_group: Of `torch.distributed`: its processes, a GPU each, share the work and the caches of the LLM and
            of a `full` verifier (tensor parallelism). All of them make the same calls in the same order and get the
            same results. The bound on caches is per process. For the cuda backend.
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
    if kv_cache_memory_bytes is not None:
        check_number("kv_cache_memory_bytes", kv_cache_memory_bytes, integer=True, minimum=1)
    if not isinstance(cache_packed, bool):
        raise ArgumentError("cache_packed", "True or False", repr(cache_packed))
    runs_elsewhere = backend not in ("auto", CpuBackend.name)
    if cache_packed and (runs_elsewhere or isinstance(model, PreTrainedModel)):
        actual = f"the {backend} backend" if runs_elsewhere else "a model in memory"
        raise ArgumentError("cache_packed", "False, or the cpu backend and a model that is read from files", actual)
    if not isinstance(always_verify, bool):
        raise ArgumentError("always_verify", "True or False", repr(always_verify))
    if always_verify and backend not in ("auto", CudaBackend.name):
        raise ArgumentError("always_verify", f"False with backend {backend!r}", always_verify)
    if process_group is not None and backend not in ("auto", CudaBackend.name):
        raise ArgumentError("process_group", f"None with backend {backend!r}", type(process_group).__name__)
    if verifier is not None and not isinstance(verifier, (str, os.PathLike, Verifier)):
        raise ArgumentError("verifier", "a path, a hub id, a llm2_fast.Verifier or None", type(verifier).__name__)
    loaded = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype, allow_pickle=allow_pickle)
    if isinstance(verifier, (str, os.PathLike)):
        verifier = Verifier.from_pretrained(
            verifier, device=loaded.device, dtype=loaded.dtype, allow_pickle=allow_pickle
        )
    chosen = _choose_backend(loaded, verifier, quantization) if backend == "auto" else _BACKENDS[backend]
    if always_verify and not (chosen is CudaBackend and isinstance(verifier, FullVerifier)):
        actual = f"the {chosen.name} backend and {'no verifier' if verifier is None else verifier.kind}"
        raise ArgumentError("always_verify", "False, or the cuda backend and a full verifier", actual)
    if cache_packed and chosen is not CpuBackend:
        raise ArgumentError("cache_packed", "False, or the cpu backend", f"the {chosen.name} backend")
    if process_group is not None and chosen is not CudaBackend:
        raise ArgumentError("process_group", "None, or the cuda backend", f"the {chosen.name} backend")
    options: dict[str, Any] = {"kv_cache_memory_bytes": kv_cache_memory_bytes}
    if chosen is CpuBackend:
        options |= {"cache_packed": cache_packed, "quantization": int8}
    if chosen is CudaBackend:
        options |= {"always_verify": always_verify, "process_group": process_group}
    running = chosen(loaded, verifier, **options)
    limits = {"max_batch_size": max_batch_size, "max_length": max_length}
    return Engine(running, loaded, verifier, **limits, backend_options=options)


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

    Threads may share an engine. Where its caches cannot hold all their sequences, calls of `generate` go before calls
    of `stream`, and earlier ones before later ones. Engines that share a model, or a verifier, must not run at the same
    time.

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
        backend_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.verifier, self.max_batch_size = model, verifier, max_batch_size
        self._backend, self._backend_options = backend, backend_options or {}
        self._turns = threading.Condition()  # threads take turns, a step at a time
        self._schedules: list[Schedule] = []  # of the calls under way, the first to begin first
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

    def without_verifier(self) -> Engine:
        """An engine over the same model, loaded with the same options, that decodes plainly.

        Itself if it has no verifier. Otherwise weights are packed for it once more, and the bound on caches holds for
        each of the two. They must not run at the same time.
        """
        if self.verifier is None:
            return self
        backend = type(self._backend)(self.model, None, **self._backend_options)
        limits = {"max_batch_size": self.max_batch_size, "max_length": self.max_length}
        return Engine(backend, self.model, None, **limits, backend_options=self._backend_options)

    @contextmanager
    def exclusive_backend(self) -> Iterator[Backend]:
        """The backend with an empty cache, for a decoding loop of one's own.

        Other threads wait until it is given back. What calls under way had cached is computed again then.
        """
        with self._turns:
            for schedule in self._schedules:
                schedule.release()
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
        for _ in self._decode(self._schedule(requests)):
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
        requests = self._make_requests(prompt, _merge_config(config, overrides), [request_id], streamed=True)
        return self._decode(self._schedule(requests, may_pause=True))

    def _make_requests(
        self,
        prompts: Prompt | Iterable[Prompt],
        config: GenerationConfig,
        request_ids: Iterable[int] | None,
        *,
        streamed: bool = False,
    ) -> list[Request]:
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
            self._backend.check_fits(len(token_ids) + config.max_new_tokens, f"{name} with max_new_tokens")
            eos_token_ids = () if config.ignore_eos else self._eos_token_ids
            requests.append(Request(request_id, token_ids, config, eos_token_ids, self.tokenizer, streamed))
        return requests

    def _schedule(self, requests: list[Request], *, may_pause: bool = False) -> Schedule:
        return Schedule(self._backend, requests, self.max_batch_size, others=self._schedules, may_pause=may_pause)

    def _decode(self, schedule: Schedule) -> Iterator[StreamEvent]:
        """The loop of a call: take a turn, hand out its events."""
        with self._turns:
            self._schedules.append(schedule)
        try:
            while True:
                with self._turns:
                    if schedule.finished:
                        return
                    events = self._take_turn(schedule)
                yield from events
        finally:
            # Also after Ctrl-C, an error, or a stream that is not read to its end.
            with self._turns:
                self._schedules.remove(schedule)
                schedule.release()
                self._turns.notify_all()

    def _take_turn(self, schedule: Schedule) -> list[StreamEvent]:
        while True:
            try:
                events = schedule.take_turn()
            except CacheFullError:
                others = [other for other in self._schedules if other is not schedule and other.holds_slots]
                if not others:
                    raise
                self._make_room(schedule, others)
                continue
            if any(event.finish_reason for event in events):
                self._turns.notify_all()
            return events

    def _make_room(self, schedule: Schedule, others: list[Schedule]) -> None:
        """Preempt a sample of a call that goes after `schedule`, or let those that go before it take their turns.

        A call that may pause may do so for ever, so nobody waits for it. The earliest of the others waits for nobody.
        """
        place = self._schedules.index(schedule)
        for other in reversed(others):
            later = self._schedules.index(other) > place
            if other.may_pause or (later and not schedule.may_pause):
                other.make_room(keep=0)
                return
        self._turns.wait()


def _choose_backend(model: LoadedModel, verifier: Verifier | None, quantization: str | None) -> type[Backend]:
    backend = CudaBackend if model.device.type == "cuda" and quantization is None else CpuBackend
    if (reason := backend.unsupported(model, verifier)) is None:
        return backend
    if quantization is not None:
        raise ArgumentError("quantization", f"None, since the cpu backend cannot run this ({reason})", quantization)
    _log_reference(backend.name, reason)
    return ReferenceBackend


@functools.cache
def _log_reference(backend: str, reason: str) -> None:
    """Once per reason."""
    message = "backend: 'reference', which is slow, because the %s backend cannot run this: %s"
    _LOGGER.warning(message, backend, reason)


def _merge_config(config: GenerationConfig | None, overrides: dict[str, Any]) -> GenerationConfig:
    if config is not None and not isinstance(config, GenerationConfig):
        raise ArgumentError("config", "a GenerationConfig or None", type(config).__name__)
    return (config or GenerationConfig()).merge(**overrides)


def _eos_token_ids(model: LoadedModel) -> tuple[int, ...]:
    """End-of-sequence tokens: the generation config's, else the model config's, else the tokenizer's."""
    sources = (
        getattr(model.source.skeleton, "generation_config", None),
        model.config.get_text_config(),
        model.tokenizer,
    )
    for source in sources:
        if (eos := getattr(source, "eos_token_id", None)) is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return ()
