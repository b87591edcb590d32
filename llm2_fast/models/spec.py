"""`DecoderSpec`: the shape of a decoder of the Llama family, read from a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model

from llm2_fast.errors import ArgumentError

_FAMILIES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Scalings whose frequencies do not change with the length of the sequence.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LOGIT_TRANSFORMS = ("logit_scale", "logits_scaling", "final_logit_softcapping")


@dataclass(frozen=True)
class DecoderSpec:
    """What a compiled decoder must know besides the weights.

    Attributes:
        dtype: "float32" or "bfloat16", of weights and cache.
        hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size: Sizes.
        rms_norm_eps: Added to the mean square in every norm.
        attention_scale: Factor on the dot products of queries and keys.
        inv_freq: Rotary frequencies, radians per position, [head_dim / 2].
        rope_scale: Factor on the rotary cosines and sines.
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
    inv_freq: tuple[float, ...]
    rope_scale: float
    sliding_windows: tuple[int, ...]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> DecoderSpec:
        """The spec of `model`, a causal language model or the decoder under one.

        Raises:
            ArgumentError: The model has a part that compiled decoders lack; the message names it.
        """
        decoder = model.base_model
        config = decoder.config
        _check(model)
        attention = decoder.layers[0].self_attn
        # A rotary module of our own: the model's may have been rounded to bfloat16 together with its weights.
        rotary = type(decoder.rotary_emb)(config)
        inv_freq = tuple(rotary.inv_freq.float().tolist())
        _require(2 * len(inv_freq) == attention.head_dim, "rotary positions over the whole head", "over part of it")
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
            inv_freq=inv_freq,
            rope_scale=float(rotary.attention_scaling),
            sliding_windows=_sliding_windows(config),
        )


def _check(model: PreTrainedModel) -> None:
    decoder = model.base_model
    families = ", ".join(family.__name__ for family in _FAMILIES)
    _require(type(decoder) in _FAMILIES, f"one of {families}", type(decoder).__name__)
    config = decoder.config
    _require(model.dtype in _DTYPES, "dtype float32 or bfloat16", str(model.dtype))
    _require(model.device.type == "cpu", "a model on the CPU", str(model.device))
    _require(config.hidden_act == "silu", "hidden_act 'silu'", repr(config.hidden_act))
    _require(config.hidden_size % 2 == 0, "an even hidden_size", str(config.hidden_size))
    rope_type = decoder.rotary_emb.rope_type
    _require(rope_type in _ROPE_TYPES, f"rope_type {' or '.join(map(repr, _ROPE_TYPES))}", repr(rope_type))
    for name in _LOGIT_TRANSFORMS:
        value = getattr(config, name, None)
        _require(value is None, f"no {name}", str(value))
    for name, module in model.named_modules():
        # Quantized and adapted layers compute something else with what they call their weight.
        if name.endswith("_proj") or name == "lm_head":
            _require(type(module) is nn.Linear, f"plain linear layers, {name} too", type(module).__name__)


def _require(condition: bool, expected: str, actual: str) -> None:
    if not condition:
        raise ArgumentError("model", f"{expected} for the cpu backend", actual)


def _sliding_windows(config: Any) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        sliding = getattr(config, "use_sliding_window", True)
        return (window if sliding else 0,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
