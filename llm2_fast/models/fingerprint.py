"""What tells one set of weights from another, however they were loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from llm2_fast.models.source import ModelSource, as_source

_SHAPE_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
    "rms_norm_eps", "rope_parameters", "sliding_window", "layer_types",
)  # fmt: skip
_SAMPLE = 64


def fingerprint(model: PreTrainedModel | ModelSource) -> str:
    """Hash of a decoder's shape and of a sample of every parameter, rounded to bfloat16.

    The rounding makes it the same for float32, bfloat16 and dequantized copies of one checkpoint. The head of the model
    is left out, so a base model and a causal language model over it agree.

    Args:
        model: Any decoder-only model. Of one whose weights are in files only the samples are read.

    Returns:
        32 hexadecimal digits.
    """
    source = as_source(model)
    base = source.skeleton.base_model
    config = base.config.get_text_config()
    digest = hashlib.sha256()
    for field in _SHAPE_FIELDS:
        digest.update(f"{field}={_canonical(getattr(config, field, None))};".encode())
    for name, parameter in sorted(base.named_parameters()):
        sample = source.rows(parameter, _sampled_rows(parameter)) if parameter.dim() > 1 else source.tensor(parameter)
        digest.update(_encode(name, sample))
    return digest.hexdigest()[:32]


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of a sample of every tensor, rounded to bfloat16 as by `fingerprint`.

    Args:
        tensors: By name.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(_encode(name, tensor.detach()[_sampled_rows(tensor)] if tensor.dim() > 1 else tensor.detach()))
    return digest.hexdigest()[:32]


def _sampled_rows(tensor: torch.Tensor) -> list[int]:
    return [0, len(tensor) // 2, len(tensor) - 1]


def _encode(name: str, sample: torch.Tensor) -> bytes:
    """A name and the sampled rows, [rows, ...], or values of a tensor."""
    sample = sample.flatten(1)[:, :_SAMPLE] if sample.dim() > 1 else sample
    sample = sample.to(device="cpu", dtype=torch.bfloat16).contiguous()
    return name.encode() + sample.view(torch.int16).numpy().tobytes()


def _canonical(value: object) -> str:
    """Text that does not depend on the order of fields or on how precisely a format stores a float."""
    if isinstance(value, dict):
        return ",".join(f"{key}:{_canonical(entry)}" for key, entry in sorted(value.items()))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
