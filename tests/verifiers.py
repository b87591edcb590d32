"""A verifier of each kind for a tiny model, with the oracle's way to the same scores."""

from __future__ import annotations

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
    head = ScoreHead(model.config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    head.score.weight.data = torch.randn(head.score.weight.shape, generator=generator)
    return HeadVerifier(head, base_name="tiny", base_fingerprint=fingerprint(model))


def peft_classifier(family: str, model: PreTrainedModel):
    """A random LoRA sequence classifier on `model`'s weights, as PEFT builds it."""
    classifier = AutoModelForSequenceClassification.from_config(tiny.config(family, num_labels=1))
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    targets = _LORA_TARGETS.get(family, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=targets, modules_to_save=["score"])
    adapted = get_peft_model(classifier, config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "score.modules_to_save" in name:
            scale = _SCORE_SCALE if "score" in name else 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return adapted.eval()


def _head_case(family: str, model: PreTrainedModel) -> Case:
    verifier = head_verifier(model)
    return Case(model, verifier, oracle.head_score(model, verifier.head.score.weight))


def _lora_case(family: str, model: PreTrainedModel) -> Case:
    adapted = peft_classifier(family, model)
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        verifier = Verifier.from_pretrained(directory)
    return Case(model, verifier, oracle.classifier_score(adapted))


def _full_case(family: str, model: PreTrainedModel) -> Case:
    classifier = tiny.classifier(family, num_hidden_layers=2)
    classifier.score.weight.data *= _SCORE_SCALE
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    return Case(model, verifier, oracle.classifier_score(classifier))
