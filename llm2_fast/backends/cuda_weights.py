"""`CudaWeights`: the weights of a decoder on a GPU, copied there tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llm2_fast.backends.shard import Shard
from llm2_fast.models.source import ModelSource
from llm2_fast.models.spec import DecoderSpec, text_decoder
from llm2_fast.models.weights import LINEAR_PATHS, LoraUpdate, norm_weight, norms_of, share_weight, stack_updates


@dataclass(frozen=True)
class CudaLinear:
    """Linear layers with the same input as one.

    Attributes:
        weight: [N, in_features].
        bias: float32 [N], or None.
        lora_a, lora_b: [rank, in_features] and [N, rank] of the low-rank update, scaling included, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None


@dataclass(frozen=True)
class CudaLayer:
    """A layer; `norms` by their names in `DecoderLayer`, those that it has, float32."""

    norms: dict[str, torch.Tensor]
    linears: dict[str, CudaLinear]
    sliding_window: int
    rotary_table: int


class CudaWeights:
    """All weights of a causal language model, or of the decoder under one. Changes to the model have no effect.

    Args:
        source: The model.
        device: Where the weights go.
        updates: LoRA updates by module path below the decoder.
        shard: Which part of the linear layers to copy.

    Attributes:
        spec: The decoder's, as far as it is here.
        layers: Its layers.
        embedding: [vocab_size, hidden_size].
        final_norm: float32 [hidden_size].
        lm_head: [vocab_size, hidden_size]; the embedding itself if they are tied, None without one.
        inv_freq: float32 [T, head_dim / 2], of the rotary tables.
        rotary_scale: float32 [T].

    Raises:
        ArgumentError: The model has a part that compiled decoders lack.
    """

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        updates: dict[str, LoraUpdate] | None = None,
        shard: Shard | None = None,
    ) -> None:
        self._whole, self.shard = DecoderSpec.from_model(source.skeleton), shard or Shard()
        self.spec = self.shard.spec(self._whole)
        self.device, self.dtype = device, getattr(torch, self.spec.dtype)
        decoder, lm_head = text_decoder(source.skeleton), source.skeleton.get_output_embeddings()
        self.embedding = self._copy(source, decoder.embed_tokens.weight)
        self.lm_head = None
        if lm_head is not None:
            tied = share_weight(lm_head, decoder.embed_tokens)
            self.lm_head = self.embedding if tied else self._copy(source, lm_head.weight)
        self.final_norm = norm_weight(source, decoder.norm).to(device)
        self.layers = [self._layer(source, index, layer, updates or {}) for index, layer in enumerate(decoder.layers)]
        tables = self.spec.rotary_tables
        self.inv_freq = torch.tensor([table.inv_freq for table in tables], dtype=torch.float32, device=device)
        self.rotary_scale = torch.tensor([table.scale for table in tables], dtype=torch.float32, device=device)

    def _copy(self, source: ModelSource, parameter: nn.Parameter) -> torch.Tensor:
        return torch.empty(parameter.shape, dtype=self.dtype, device=self.device).copy_(source.tensor(parameter))

    def _layer(self, source: ModelSource, index: int, layer: nn.Module, updates: dict[str, LoraUpdate]) -> CudaLayer:
        norms = {name: norm_weight(source, norm).to(self.device) for name, norm in norms_of(layer).items()}
        linears = {
            name: self._linear(source, layer, f"layers.{index}.", paths, updates)
            for name, paths in LINEAR_PATHS.items()
        }
        return CudaLayer(norms, linears, self.spec.sliding_windows[index], self.spec.layer_rotary_tables[index])

    def _linear(
        self,
        source: ModelSource,
        layer: nn.Module,
        prefix: str,
        paths: tuple[str, ...],
        updates: dict[str, LoraUpdate],
    ) -> CudaLinear:
        modules = [layer.get_submodule(path) for path in paths]
        rows = [self.shard.rows(self._whole, path) for path in paths]
        columns = self.shard.columns(self._whole, paths[0])  # modules with the same input have the same
        parts = [module.weight[cut, columns] for module, cut in zip(modules, rows, strict=True)]
        sizes = [len(part) for part in parts]
        weight = torch.empty(sum(sizes), parts[0].shape[1], dtype=self.dtype, device=self.device)
        for part, module, cut in zip(weight.split(sizes), modules, rows, strict=True):
            part.copy_(source.tensor(module.weight)[cut, columns])
        bias = None
        if any(module.bias is not None for module in modules):
            bias = torch.zeros(sum(sizes), device=self.device)
            for part, module, cut in zip(bias.split(sizes), modules, rows, strict=True):
                # Of columns each process has a part of the sum, to which the bias is added once.
                if module.bias is not None and (columns == slice(None) or self.shard.rank == 0):
                    part.copy_(source.tensor(module.bias)[cut])
        stacked = stack_updates(self._whole, [prefix + path for path in paths], updates)
        if stacked is None:
            return CudaLinear(weight, bias, None, None)
        a, of_rows = stacked
        lora_b = torch.cat([b[cut] for b, cut in zip(of_rows, rows, strict=True)])
        return CudaLinear(weight, bias, a[:, columns].to(weight).contiguous(), lora_b.to(weight))
