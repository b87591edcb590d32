"""A verifier of each kind for a tiny model, with the oracle's way to the same scores."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import lru_cache

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import oracle
import tiny
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.verifier import FullVerifier, HeadVerifier, ScoreHead, Verifier

KINDS = ("head", "lora", "full")
_LORA_TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
_SCORE_SCALE = 6.0  # large enough that beta times a score changes choices


@dataclass(frozen=True)
class Case:
    """A model, a verifier for it (None for plain decoding) and the same score computed by brute force."""

    model: PreTrainedModel
    verifier: Verifier | None
    score: oracle.Score | None


@lru_cache
def case(family: str, kind: str | None) -> Case:
    """Model and verifier are shared between tests, which must not change them."""
    model = tiny.causal_lm(family)
    if kind is None:
        return Case(model, None, None)
    return {"head": _head_case, "lora": _lora_case, "full": _full_case}[kind](family, model)


def head_verifier(model: PreTrainedModel, seed: int = 5) -> HeadVerifier:
    """A random linear head for `model`."""
    head = ScoreHead(model.config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(seed)
    head.score.weight.data = torch.randn(head.score.weight.shape, generator=generator)
    return HeadVerifier(head, base_name="tiny", base_fingerprint=fingerprint(model))


def peft_classifier(model: PreTrainedModel):
    """A random LoRA sequence classifier on `model`'s weights, as PEFT builds it."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, None
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = _LORA_TARGETS.get(model.config.model_type, linear)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=targets, modules_to_save=["score"])
    adapted = get_peft_model(classifier, config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "score.modules_to_save" in name:
            scale = _SCORE_SCALE if "score" in name else 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return adapted.eval()


def lora_case(model: PreTrainedModel) -> Case:
    """`model` with a random LoRA verifier that went through PEFT's checkpoint."""
    adapted = peft_classifier(model)
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        verifier = Verifier.from_pretrained(directory, base_model=model)
    return Case(model, verifier, oracle.classifier_score(adapted))


def full_case(model: PreTrainedModel, classifier: PreTrainedModel) -> Case:
    """`model` with a verifier made of a random `classifier`."""
    classifier.score.weight.data *= _SCORE_SCALE
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    return Case(model, verifier, oracle.classifier_score(classifier))


def _head_case(family: str, model: PreTrainedModel) -> Case:
    verifier = head_verifier(model)
    return Case(model, verifier, oracle.head_score(model, verifier.head.state_dict()))


def _lora_case(family: str, model: PreTrainedModel) -> Case:
    return lora_case(model)


def _full_case(family: str, model: PreTrainedModel) -> Case:
    return full_case(model, tiny.classifier(family, num_hidden_layers=2))
