"""Small random models of every family, and verifiers for them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from llm2_fast import ops
from llm2_fast.models.quantization import Quantization

VOCAB = 61
# No pad token: sequence classifiers would read the score before a candidate that happens to be it.
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    **_SPECIAL,
}
_LOGIT_STD = 4.0
_WINDOW = 5  # shorter than the prompts of the tests

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [20, 21, 22, 4]]  # ragged; the first is longer than the sliding windows
# Every processor at once, a seed beyond 63 bits, and steps cut by the bound on candidates.
PROCESSORS = {
    "temperature": 0.8,
    "top_k": 6,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "seed": 2**64 - 5,
    "max_candidates": 3,
}

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2")
_MIXED = ("sliding_attention", "full_attention", "sliding_attention")


def config(family: str, **overrides: object) -> PreTrainedConfig:
    """The configuration of a tiny model of `family`."""
    shape = {**_SHAPE, **overrides}
    if family == "gpt2":
        renamed = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        sizes = {ours: shape[theirs] for ours, theirs in renamed.items()}
        sizes |= {"vocab_size": shape["vocab_size"], "n_positions": shape["max_position_embeddings"]}
        return GPT2Config(**sizes, **_SPECIAL, num_labels=shape.get("num_labels", 2), tie_word_embeddings=False)
    layer_types = list(_MIXED[: shape["num_hidden_layers"]])
    classes = {
        "llama": (LlamaConfig, {}),
        "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
        "qwen3": (Qwen3Config, {}),
        "mistral": (MistralConfig, {"sliding_window": _WINDOW}),
        "gemma3": (
            Gemma3TextConfig,
            {"sliding_window": _WINDOW, "layer_types": layer_types, "query_pre_attn_scalar": 8},
        ),
    }
    config_class, extra = classes[family]
    return config_class(**{**extra, **shape})


def image_text_config(**overrides: object) -> PreTrainedConfig:
    """The configuration of a tiny Gemma-3 that can also see images."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"mm_tokens_per_image": 1, "boi_token_index": 58, "eoi_token_index": 59, "image_token_index": 60}
    options = {"tie_word_embeddings": False, **tokens, **overrides}
    return Gemma3Config(text_config=config("gemma3"), vision_config=vision, **options)


def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights, large enough that positions and context matter to the logits; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        keep = parameter.data if parameter.dim() == 1 and "norm" in name else 0
        parameter.data = keep + noise
    return model.eval()


def causal_lm(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random causal language model."""
    return plausible(randomize(AutoModelForCausalLM.from_config(config(family, **overrides)), seed))


def plausible(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with a few plausible tokens at most steps: neither one nor half the vocabulary."""
    with torch.no_grad():
        model.lm_head.weight *= _LOGIT_STD / model(torch.arange(3, 35)[None]).logits.std()
    return model


def rounded(model: PreTrainedModel, quantization: Quantization) -> PreTrainedModel:
    """A copy with what int8 keeps of its linear layers, and so of an embedding table tied to one."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(quantization.round_trip(module.weight.data))
    return model


def classifier(family: str, seed: int = 1, **overrides: object) -> PreTrainedModel:
    """A random sequence classifier with one label, smaller than `causal_lm`."""
    shape = config(family, **{"num_labels": 1, **overrides})
    return randomize(AutoModelForSequenceClassification.from_config(shape), seed)


def extension_of(isa):
    """The CPU extension as on a machine whose best tier is `isa`."""
    extension = ops.cpu_extension()

    class PackedLinear(extension.PackedLinear):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, isa, **options)

        @staticmethod
        def unpacked(*arguments, **options):
            return extension.PackedLinear.unpacked(*arguments, isa=isa, **options)

    return SimpleNamespace(**{**vars(extension), "cpu_isa": lambda: isa, "PackedLinear": PackedLinear})
