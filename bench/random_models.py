"""Random models and verifiers, made in memory: they cost what trained ones cost, but choose other tokens."""

from __future__ import annotations

import copy

import torch
from kernel_launches import Shape
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.verifier import FullVerifier, HeadVerifier, LoraVerifier, ScoreHead, Verifier

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_llama(
    shape: Shape, dtype: torch.dtype, device: str, *, max_positions: int, logit_std: float = 4.0
) -> PreTrainedModel:
    """A decoder of the Llama family whose logits have about the standard deviation `logit_std`.

    Embedding and `lm_head` are not tied, so that the latter can be scaled alone. A step reads the same bytes.
    """
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=logit_std * shape.hidden_size**-0.5)
    return model


def random_verifier(kind: str | None, model: PreTrainedModel, lora_rank: int = 16) -> Verifier | None:
    """Of one of the kinds "head", "lora" and "full", the last with the shape of the LLM; None for None."""
    makers = {"head": random_head, "lora": lambda of: random_lora(of, lora_rank), "full": random_full}
    return None if kind is None else makers[kind](model)


def random_head(model: PreTrainedModel) -> HeadVerifier:
    """A linear head on the final norm's output."""
    head = ScoreHead(model.config.hidden_size)
    return HeadVerifier(head, base_name="random", base_fingerprint=fingerprint(model))


def random_lora(model: PreTrainedModel, rank: int = 16) -> LoraVerifier:
    """An adapter on all linear layers, and a head."""
    tensors = {"base_model.model.score.weight": torch.randn(1, model.config.hidden_size) * 0.02}
    for name, module in model.named_modules():
        if name.endswith(LORA_TARGETS):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, module.in_features) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.01
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": rank, "lora_alpha": rank}
    return LoraVerifier(config, tensors, base_name="random", base_fingerprint=fingerprint(model))


def random_full(model: PreTrainedModel) -> FullVerifier:
    """A network of the LLM's shape, dtype and device, and a head."""
    with model.device:
        network = AutoModel.from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()
    return FullVerifier(network, torch.randn(1, model.config.hidden_size) * 0.02)
