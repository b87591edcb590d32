"""What compiled backends read off a model and its verifier, and how they find out that they compute the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import agree, evaluating
from llm2_fast.models.loading import LoadedModel
from llm2_fast.models.source import ModelSource
from llm2_fast.models.spec import DecoderSpec, text_decoder
from llm2_fast.models.weights import LoraUpdate
from llm2_fast.verifier import FullVerifier, HeadVerifier, LoraVerifier, Verifier

_PROBE_LENGTH = 9
# Models in 16 bits round after every op, compiled ones seldom.
_PROBE_TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


def compiled_sources(model: LoadedModel, verifier: Verifier | None) -> list[ModelSource]:
    """Of the decoders to compile: the LLM, and the network of a `full` verifier."""
    return [model.source, *([verifier.source] if isinstance(verifier, FullVerifier) else [])]


def cached_specs(model: LoadedModel, verifier: Verifier | None) -> list[DecoderSpec]:
    """Of the decoders that cache: the LLM, and a verifier other than a head on it."""
    llm = DecoderSpec.from_model(model.source.skeleton)
    if verifier is None or isinstance(verifier, HeadVerifier):
        return [llm]
    return [llm, DecoderSpec.from_model(verifier.source.skeleton) if isinstance(verifier, FullVerifier) else llm]


def lora_updates(model: LoadedModel, verifier: LoraVerifier) -> dict[str, LoraUpdate]:
    """By module path below the text decoder. Modules elsewhere, those that see images, do not see text."""
    base = model.source.skeleton.base_model
    deltas = {base.get_submodule(path): delta for path, delta in verifier.deltas_for(model).items()}
    modules = text_decoder(base).named_modules()
    return {
        path: (deltas[module].a, deltas[module].b * deltas[module].scaling)
        for path, module in modules
        if module in deltas
    }


def check_same(
    compute: Callable[[list[int]], torch.Tensor],
    model: PreTrainedModel,
    spec: DecoderSpec,
) -> None:
    """Compare a few tokens with `model`, whose weights a compiled decoder has.

    A model whose layers were replaced or patched may compute something else than its type says, so it is refused.

    Args:
        compute: The decoder's final hidden state [hidden_size] of the last of some tokens.
        model: The model, able to run, with weights rounded as the decoder's.
        spec: Of both.

    Raises:
        ArgumentError: The hidden states differ.
    """
    token_ids = [(7 * i + 1) % spec.vocab_size for i in range(_PROBE_LENGTH)]
    device = "cpu" if model.device.type == "meta" else model.device  # "meta": its weights come from files as it runs
    with evaluating(model), torch.no_grad():
        ids = torch.tensor([token_ids], device=device)
        expected = model.base_model(ids, use_cache=False).last_hidden_state[0, -1].float().cpu()
    if not agree(compute(token_ids).float().cpu(), expected, _PROBE_TOLERANCE[spec.dtype]):
        raise ArgumentError("model", "layers that compute what their type says", f"{type(model).__name__} differs")
