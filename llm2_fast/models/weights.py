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
from llm2_fast.models.scratch import Scratch
from llm2_fast.models.source import ModelSource, as_source
from llm2_fast.models.spec import DecoderSpec, text_decoder

_PIECE_BYTES = 1 << 20  # of a layer that is packed row by row
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
        spec: The decoder's.
        linears: `llm2_fast_C.PackedLinear` by name: `layers.0.qkv`, also `o`, `gate_up` and `down`, and, unless the
            decoder comes without a head, `lm_head`.
        tensors: By name: `layers.0.input_norm` and the layer's other norms, as `DecoderLayer` calls them, those that it
            has, and `final_norm`, all float32; `embedding`, unless it is the weight of `lm_head`.
    """

    def __init__(
        self, extension: ModuleType, spec: DecoderSpec, linears: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.spec, self.linears, self.tensors = spec, linears, tensors
        self._extension = extension

    @classmethod
    def pack(
        cls, extension: ModuleType, model: PreTrainedModel | ModelSource, quantization: Quantization | None = None
    ) -> PackedWeights:
        """Pack a causal language model, or the decoder under one. Keeps nothing of it but an untied embedding table.

        Args:
            extension: The module `llm2_fast_C`.
            model: In memory, or in files.
            quantization: Of the linear layers and so of a tied embedding table; None keeps the model's dtype.

        Raises:
            ArgumentError: The model has a part that compiled decoders lack, or weights that cannot be quantized.
        """
        source = as_source(model)
        spec = DecoderSpec.from_model(source.skeleton)
        decoder, lm_head = text_decoder(source.skeleton), source.skeleton.get_output_embeddings()
        weights = cls(extension, spec, {}, {"final_norm": norm_weight(source, decoder.norm)})
        modules = {} if lm_head is None else {"lm_head": {"lm_head": lm_head}}
        for index, layer in enumerate(decoder.layers):
            for name, norm in norms_of(layer).items():
                weights.tensors[f"layers.{index}.{name}"] = norm_weight(source, norm)
            for name, paths in LINEAR_PATHS.items():
                linears = {f"layers.{index}.{path}": layer.get_submodule(path) for path in paths}
                modules[f"layers.{index}.{name}"] = linears
        if lm_head is None or not share_weight(lm_head, decoder.embed_tokens):
            weights.tensors["embedding"] = source.tensor(decoder.embed_tokens.weight).to(weights._dtype).contiguous()
        # The largest first: then what is packed already and what is being read are never much more than the whole.
        scratch = Scratch()
        for name in sorted(modules, key=lambda name: -sum(linear.weight.numel() for linear in modules[name].values())):
            weights.linears[name] = weights._pack(source, name, modules[name], quantization, scratch)
        return weights

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.dtype)

    def decoder(self, updates: dict[str, LoraUpdate] | None = None) -> Any:
        """A compiled decoder, `llm2_fast_C.Decoder`.

        Args:
            updates: LoRA updates by module path below the decoder, e.g. "layers.0.self_attn.q_proj".
        """
        layers = []
        for index in range(self.spec.num_layers):
            prefix = f"layers.{index}."
            linears = {
                name: self._adapt(self.linears[prefix + name], [prefix + path for path in paths], updates or {})
                for name, paths in LINEAR_PATHS.items()
            }
            norms = {name: self._capsule(prefix + name) for name in NORMS}
            window, table = self.spec.sliding_windows[index], self.spec.layer_rotary_tables[index]
            layers.append(DecoderLayer(**norms, **linears, sliding_window=window, rotary_table=table))
        embedding, lm_head = self._capsule("embedding"), self.linears.get("lm_head")
        return self._extension.Decoder(self.spec, layers, self._capsule("final_norm"), embedding, lm_head)

    def _capsule(self, name: str) -> object | None:
        return to_dlpack(self.tensors[name]) if name in self.tensors else None

    def _pack(
        self,
        source: ModelSource,
        name: str,
        linears: dict[str, nn.Linear],
        quantization: Quantization | None,
        scratch: Scratch,
    ) -> Any:
        group_size = 0
        if quantization is not None:
            group_size = quantization.group_size or next(iter(linears.values())).in_features
        interleaved = name.endswith("gate_up")
        if all(linear.bias is None for linear in linears.values()):
            return self._pack_in_pieces(source, linears, interleaved, group_size, scratch)
        weights = [source.tensor(linear.weight) for linear in linears.values()]
        biases = [None if linear.bias is None else source.tensor(linear.bias) for linear in linears.values()]
        if quantization is not None:
            for path, weight in zip(linears, weights, strict=True):
                _check_finite(path, weight)
        return self._pack_tensors(weights, biases, interleaved=interleaved, group_size=group_size)

    def _pack_in_pieces(
        self, source: ModelSource, linears: dict[str, nn.Linear], interleaved: bool, group_size: int, scratch: Scratch
    ) -> Any:
        """As many rows at a time as take little memory, however large the layer is."""
        stacks = [{path: linear} for path, linear in linears.items()] if interleaved else [linears]
        in_features = next(iter(linears.values())).in_features
        out_features = sum(linear.out_features for linear in stacks[0].values())
        packed = self._extension.PackedLinear.unpacked(
            self.spec.dtype, in_features, out_features * len(stacks), interleaved, group_size=group_size
        )
        row_bytes = in_features * self._dtype.itemsize * len(stacks)
        step = max(1, _PIECE_BYTES // (row_bytes * packed.piece_rows)) * packed.piece_rows
        for first in range(0, out_features, step):
            num_rows = min(step, out_features - first)
            pieces = scratch.take((len(stacks), num_rows, in_features), self._dtype).unbind()
            for stack, piece in zip(stacks, pieces, strict=True):
                _read_stack(source, stack, first, piece, must_be_finite=group_size > 0)
            packed.pack_rows(first, [to_dlpack(piece) for piece in pieces], torch.get_num_threads())
        return packed

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
        """A packed layer with the updates of all its modules as one, rounded to the dtype."""
        stacked = stack_updates(self.spec, paths, updates)
        if stacked is None:
            return AdaptedLinear(weight)
        a, columns = stacked
        lora_a = self._pack_tensors([a], [None])
        lora_b = self._pack_tensors(columns, [None] * len(columns), interleaved=len(paths) == 2)
        return AdaptedLinear(weight, lora_a, lora_b)


def _read_stack(
    source: ModelSource, linears: dict[str, nn.Linear], first: int, out: torch.Tensor, *, must_be_finite: bool
) -> None:
    """Fill `out` with rows from `first` on of the layers' weights, one below the other."""
    for path, linear in linears.items():
        rows = out[: max(0, linear.out_features - first)]
        if len(rows) > 0:
            source.read_rows(linear.weight, first, rows)
            if must_be_finite:
                _check_finite(path, rows)
        out, first = out[len(rows) :], max(0, first - linear.out_features)


def _check_finite(path: str, weight: torch.Tensor) -> None:
    if not all(bound.isfinite() for bound in weight.aminmax()):
        raise ArgumentError("model", f"finite weights to quantize, {path}.weight too", "NaN or infinity")


def stack_updates(
    spec: DecoderSpec, paths: list[str], updates: dict[str, LoraUpdate]
) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
    """The updates of modules with the same input as one; None if none of them has any.

    Args:
        spec: The decoder's.
        paths: Of the modules, below the decoder.
        updates: By path.

    Returns:
        A stacked, [rank, in_features], and of a block-diagonal B the rows of each module, [out_features, rank].
    """
    present = [updates[path] for path in paths if path in updates]
    if not present:
        return None
    rank = sum(a.shape[0] for a, _ in present)
    columns, first = [], 0
    for path in paths:
        column = torch.zeros(_out_features(spec, path), rank)
        if path in updates:
            b = updates[path][1]
            column[:, first : first + b.shape[1]] = b
            first += b.shape[1]
        columns.append(column)
    return torch.cat([a for a, _ in present]), columns


def _out_features(spec: DecoderSpec, path: str) -> int:
    sizes = {
        "q_proj": spec.num_heads * spec.head_dim,
        "k_proj": spec.num_kv_heads * spec.head_dim,
        "v_proj": spec.num_kv_heads * spec.head_dim,
        "o_proj": spec.hidden_size,
        "gate_proj": spec.intermediate_size,
        "up_proj": spec.intermediate_size,
        "down_proj": spec.hidden_size,
    }
    return sizes[path.split(".")[-1]]


LINEAR_PATHS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


NORMS = ("input_norm", "attention_output_norm", "mlp_input_norm", "mlp_output_norm", "q_norm", "k_norm")


def norms_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The norms that the layer has."""
    sandwich = hasattr(layer, "pre_feedforward_layernorm")  # norms before and after attention and MLP
    modules = {
        "input_norm": layer.input_layernorm,
        "attention_output_norm": layer.post_attention_layernorm if sandwich else None,
        "mlp_input_norm": layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm,
        "mlp_output_norm": layer.post_feedforward_layernorm if sandwich else None,
        "q_norm": getattr(layer.self_attn, "q_norm", None),
        "k_norm": getattr(layer.self_attn, "k_norm", None),
    }
    return {name: module for name, module in modules.items() if module is not None}


def norm_weight(source: ModelSource, norm: nn.Module) -> torch.Tensor:
    """What a norm multiplies by, float32."""
    weight = source.tensor(norm.weight).float()
    return 1.0 + weight if isinstance(norm, Gemma3RMSNorm) else weight


def share_weight(lm_head: nn.Linear, table: nn.Embedding) -> bool:
    """Whether the embeddings are tied. Weights on the meta device have no address."""
    if lm_head.weight.is_meta:
        return lm_head.weight is table.weight
    return lm_head.weight.data_ptr() == table.weight.data_ptr()
