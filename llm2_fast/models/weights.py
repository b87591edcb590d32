"""Packs the weights of a Hugging Face decoder for the compiled one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import to_dlpack
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from llm2_fast.errors import ArgumentError
from llm2_fast.models.quantization import Quantization
from llm2_fast.models.spec import DecoderSpec, text_decoder

LoraUpdate = tuple[torch.Tensor, torch.Tensor]  # A [r, in_features] and B [out_features, r] with the scaling in it


@dataclass(frozen=True)
class AdaptedLinear:
    """Linear layers with the same input as one, and their low-rank update if there is one."""

    weight: Any
    lora_a: Any = None
    lora_b: Any = None


@dataclass(frozen=True)
class DecoderLayer:
    """A layer as the extension reads it. Norms are DLPack capsules of float32 tensors."""

    input_norm: object
    attention_output_norm: object | None
    mlp_input_norm: object
    mlp_output_norm: object | None
    q_norm: object | None
    k_norm: object | None
    qkv: AdaptedLinear
    o: AdaptedLinear
    gate_up: AdaptedLinear
    down: AdaptedLinear
    sliding_window: int
    rotary_table: int


class PackedWeights:
    """The weights of a decoder, packed. Several compiled decoders can share them, each with an adapter of its own.

    Args:
        extension: The module `llm2_fast_C`.
        model: A causal language model, or the decoder under one. Nothing of it is kept but an untied embedding table.
        quantization: Of the linear layers and so of a tied embedding table; None keeps the model's dtype.

    Raises:
        ArgumentError: The model has a part that compiled decoders lack, or weights that cannot be quantized.
    """

    def __init__(self, extension: ModuleType, model: PreTrainedModel, quantization: Quantization | None = None) -> None:
        self.spec = DecoderSpec.from_model(model)
        if quantization is not None:
            _check_finite(model)
        self._extension, self._quantization = extension, quantization
        self._dtype = getattr(torch, self.spec.dtype)
        decoder = text_decoder(model)
        self._layers = [self._pack_layer(layer) for layer in decoder.layers]
        self._norms = [_norms(layer) for layer in decoder.layers]
        self._final_norm = _norm_weight(decoder.norm)
        lm_head = model.get_output_embeddings()
        self._lm_head = None if lm_head is None else self._pack([lm_head])
        embedding = decoder.embed_tokens.weight.detach()
        tied = lm_head is not None and lm_head.weight.data_ptr() == embedding.data_ptr()
        self._embedding = None if tied else embedding.to(self._dtype).contiguous()

    def decoder(self, updates: dict[str, LoraUpdate] | None = None) -> Any:
        """A compiled decoder, `llm2_fast_C.Decoder`.

        Args:
            updates: LoRA updates by module path below the decoder, e.g. "layers.0.self_attn.q_proj".
        """
        layers = []
        for index, (packed, norms) in enumerate(zip(self._layers, self._norms, strict=True)):
            linears = {
                name: self._adapt(weight, [f"layers.{index}.{path}" for path in _PATHS[name]], updates or {})
                for name, weight in packed.items()
            }
            capsules = {name: None if norm is None else to_dlpack(norm) for name, norm in norms.items()}
            window, table = self.spec.sliding_windows[index], self.spec.layer_rotary_tables[index]
            layers.append(DecoderLayer(**capsules, **linears, sliding_window=window, rotary_table=table))
        embedding = None if self._embedding is None else to_dlpack(self._embedding)
        return self._extension.Decoder(self.spec, layers, to_dlpack(self._final_norm), embedding, self._lm_head)

    def _pack_layer(self, layer: nn.Module) -> dict[str, Any]:
        return {
            name: self._pack([layer.get_submodule(path) for path in paths], interleaved=name == "gate_up")
            for name, paths in _PATHS.items()
        }

    def _pack(self, linears: list[nn.Linear], *, interleaved: bool = False) -> Any:
        weights = [linear.weight.detach() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        group_size = 0 if self._quantization is None else self._quantization.group_size or weights[0].shape[1]
        return self._pack_tensors(weights, biases, interleaved=interleaved, group_size=group_size)

    def _pack_tensors(
        self,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor | None],
        *,
        interleaved: bool = False,
        group_size: int = 0,
    ) -> Any:
        return self._extension.PackedLinear(
            [to_dlpack(weight.to(self._dtype).contiguous()) for weight in weights],
            [None if bias is None else to_dlpack(bias.float().contiguous()) for bias in biases],
            interleaved,
            torch.get_num_threads(),
            group_size=group_size,
        )

    def _adapt(self, weight: Any, paths: list[str], updates: dict[str, LoraUpdate]) -> AdaptedLinear:
        """The updates of all modules of a packed layer as one: A stacked, B block-diagonal, rounded to the dtype."""
        present = [updates[path] for path in paths if path in updates]
        if not present:
            return AdaptedLinear(weight)
        rank = sum(a.shape[0] for a, _ in present)
        columns, first = [], 0
        for path, size in zip(paths, self._out_features(paths), strict=True):
            column = torch.zeros(size, rank)
            if path in updates:
                b = updates[path][1]
                column[:, first : first + b.shape[1]] = b
                first += b.shape[1]
            columns.append(column)
        lora_a = self._pack_tensors([torch.cat([a for a, _ in present])], [None])
        lora_b = self._pack_tensors(columns, [None] * len(columns), interleaved=len(paths) == 2)
        return AdaptedLinear(weight, lora_a, lora_b)

    def _out_features(self, paths: list[str]) -> list[int]:
        spec = self.spec
        sizes = {
            "q_proj": spec.num_heads * spec.head_dim,
            "k_proj": spec.num_kv_heads * spec.head_dim,
            "v_proj": spec.num_kv_heads * spec.head_dim,
            "o_proj": spec.hidden_size,
            "gate_proj": spec.intermediate_size,
            "up_proj": spec.intermediate_size,
            "down_proj": spec.hidden_size,
        }
        return [sizes[path.split(".")[-1]] for path in paths]


_PATHS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def _norms(layer: nn.Module) -> dict[str, torch.Tensor | None]:
    sandwich = hasattr(layer, "pre_feedforward_layernorm")  # norms before and after attention and MLP
    modules = {
        "input_norm": layer.input_layernorm,
        "attention_output_norm": layer.post_attention_layernorm if sandwich else None,
        "mlp_input_norm": layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm,
        "mlp_output_norm": layer.post_feedforward_layernorm if sandwich else None,
        "q_norm": getattr(layer.self_attn, "q_norm", None),
        "k_norm": getattr(layer.self_attn, "k_norm", None),
    }
    return {name: None if module is None else _norm_weight(module) for name, module in modules.items()}


def _norm_weight(norm: nn.Module) -> torch.Tensor:
    """What a norm multiplies by, float32."""
    weight = norm.weight.detach().float()
    return 1.0 + weight if isinstance(norm, Gemma3RMSNorm) else weight


def _check_finite(model: PreTrainedModel) -> None:
    modules = {**dict(text_decoder(model).named_modules()), "lm_head": model.get_output_embeddings()}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and not all(bound.isfinite() for bound in module.weight.detach().aminmax()):
            raise ArgumentError("model", f"finite weights to quantize, {name}.weight too", "NaN or infinity")
