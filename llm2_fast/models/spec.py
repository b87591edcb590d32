"""`DecoderSpec`: the shape of a decoder of the Llama or Gemma-3 family, read from a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3Model,
    Gemma3TextModel,
    LlamaModel,
    MistralModel,
    PreTrainedModel,
    Qwen2Model,
    Qwen3Model,
)

from llm2_fast.errors import ArgumentError

_FAMILIES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model, Gemma3TextModel)
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Scalings whose frequencies do not change with the length of the sequence.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LOGIT_TRANSFORMS = ("logit_scale", "logits_scaling", "final_logit_softcapping", "attn_logit_softcapping")


@dataclass(frozen=True)
class RotaryTable:
    """Rotary positions of some of the layers.

    Attributes:
        inv_freq: Frequencies, radians per position, [head_dim / 2].
        scale: Factor on the cosines and sines.
    """

    inv_freq: tuple[float, ...]
    scale: float


@dataclass(frozen=True)
class DecoderSpec:
    """What a compiled decoder must know besides the weights.

    Attributes:
        dtype: "float32", "float16" or "bfloat16", of weights and cache.
        hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size: Sizes.
        rms_norm_eps: Added to the mean square in every norm.
        attention_scale: Factor on the dot products of queries and keys.
        embedding_scale: Factor on the embeddings, which are then rounded to `dtype`.
        activation: "silu" or "gelu_tanh", of the gate.
        rotary_tables: All that occur.
        layer_rotary_tables: Per layer, an index into `rotary_tables`.
        sliding_windows: Per layer, 0 for none.
    """

    dtype: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    attention_scale: float
    embedding_scale: float
    activation: str
    rotary_tables: tuple[RotaryTable, ...]
    layer_rotary_tables: tuple[int, ...]
    sliding_windows: tuple[int, ...]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> DecoderSpec:
        """The spec of `model`, a causal language model or the decoder under one.

        Raises:
            ArgumentError: The model has a part that compiled decoders lack; the message names it.
        """
        decoder = text_decoder(model)
        config = decoder.config
        _check(model)
        attention = decoder.layers[0].self_attn
        rotary_tables, layer_rotary_tables = _rotary(decoder, attention.head_dim)
        return cls(
            dtype=_DTYPES[model.dtype],
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=len(decoder.layers),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            attention_scale=attention.scaling,
            embedding_scale=_embedding_scale(decoder.embed_tokens),
            activation=_ACTIVATIONS[_activation(config)],
            rotary_tables=rotary_tables,
            layer_rotary_tables=layer_rotary_tables,
            sliding_windows=_sliding_windows(config),
        )


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder under `model`; under one that can also see images, the part that sees text."""
    base = model.base_model
    return base.language_model if type(base) is Gemma3Model else base


def _check(model: PreTrainedModel) -> None:
    decoder = text_decoder(model)
    families = ", ".join(family.__name__ for family in _FAMILIES)
    _require(type(decoder) in _FAMILIES, f"one of {families}", type(decoder).__name__)
    config = decoder.config
    _require(model.dtype in _DTYPES, f"dtype {' or '.join(_DTYPES.values())}", str(model.dtype))
    activation = _activation(config)
    _require(activation in _ACTIVATIONS, f"activation {' or '.join(map(repr, _ACTIVATIONS))}", repr(activation))
    _require(config.hidden_size % 2 == 0, "an even hidden_size", str(config.hidden_size))
    rope_type = decoder.rotary_emb.rope_type
    for each in rope_type.values() if isinstance(rope_type, dict) else (rope_type,):
        _require(each in _ROPE_TYPES, f"rope_type {' or '.join(map(repr, _ROPE_TYPES))}", repr(each))
    _require(not getattr(config, "use_bidirectional_attention", False), "causal attention", "bidirectional attention")
    for name in _LOGIT_TRANSFORMS:
        value = getattr(config, name, None)
        _require(value is None, f"no {name}", str(value))
    linears = {path: module for path, module in decoder.named_modules() if path.endswith("_proj")}
    if (lm_head := model.get_output_embeddings()) is not None:
        linears["lm_head"] = lm_head
    for path, module in linears.items():
        # Quantized and adapted layers compute something else with what they call their weight.
        _require(type(module) is nn.Linear, f"plain linear layers, {path} too", type(module).__name__)


def _require(condition: bool, expected: str, actual: str) -> None:
    if not condition:
        raise ArgumentError("model", f"{expected} for compiled decoders", actual)


def _activation(config: Any) -> str:
    return config.hidden_activation if hasattr(config, "hidden_activation") else config.hidden_act


def _embedding_scale(embed_tokens: nn.Embedding) -> float:
    scale = getattr(embed_tokens, "embed_scale", None)  # of Gemma's
    return 1.0 if scale is None else float(scale.to(embed_tokens.weight.dtype))


def _rotary(decoder: PreTrainedModel, head_dim: int) -> tuple[tuple[RotaryTable, ...], tuple[int, ...]]:
    """Rotary tables, and the index of each layer's."""
    config = decoder.config
    # A rotary module of our own: the model's may have been rounded to bfloat16 together with its weights.
    rotary = type(decoder.rotary_emb)(config)
    # Gemma's has one table for each type of layer, the others have one.
    per_type = isinstance(rotary.rope_type, dict)
    layer_types = config.layer_types if per_type else [""] * config.num_hidden_layers
    kinds = list(dict.fromkeys(layer_types))
    tables = []
    for prefix in (f"{kind}_" if per_type else "" for kind in kinds):
        inv_freq = tuple(getattr(rotary, f"{prefix}inv_freq").float().tolist())
        _require(2 * len(inv_freq) == head_dim, "rotary positions over the whole head", "over part of it")
        tables.append(RotaryTable(inv_freq, float(getattr(rotary, f"{prefix}attention_scaling"))))
    return tuple(tables), tuple(kinds.index(kind) for kind in layer_types)


def _sliding_windows(config: Any) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        sliding = getattr(config, "use_sliding_window", True)
        return (window if sliding else 0,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
