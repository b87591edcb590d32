"""The sequence classifiers that become `full` and `lora` verifiers."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from llm2_fast.errors import ArgumentError
from llm2_fast.models.decoder import Decoder
from llm2_fast.train.attention import FLEX_ATTENTION
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.packing import score_rows


def make_classifier(
    network: PreTrainedModel, config: TrainingConfig, *, lora: bool, flex_attention: bool = False
) -> PreTrainedModel:
    """A sequence classifier with one label that scores packed batches, its head random, ready to train.

    For `full`, a float32 copy of the network. For `lora`, a PEFT model over the network's own tensors, which stay
    frozen, with adapter and head in float32.

    Args:
        network: Decoder layers without a head.
        config: Its `lora_rank` and `lora_alpha` are read.
        lora: For `lora`, otherwise for `full`.
        flex_attention: Attend with FlexAttention instead of dense masks, where `choose_attention` says so.

    Raises:
        ArgumentError: The network has no such classifier, or does not keep the conventions of packed passes.
    """
    shape = copy.deepcopy(network.config)
    shape.num_labels = 1
    options = {
        "dtype": network.dtype if lora else torch.float32,
        "attn_implementation": network.config._attn_implementation,
    }
    try:
        classifier = AutoModelForSequenceClassification.from_config(shape, **options)
    except ValueError as error:  # transformers has no classifier for this configuration
        raise ArgumentError("model", "an architecture with a sequence classifier", type(network).__name__) from error
    classifier.base_model.load_state_dict(network.state_dict(), assign=lora)
    classifier.to(network.device)
    classifier.name_or_path = None  # PEFT would look it up on the hub at every checkpoint
    Decoder(classifier.base_model).check()
    if flex_attention:  # only now: cached passes have dense masks
        classifier.set_attn_implementation(FLEX_ATTENTION)
    score_rows(classifier)
    classifier.score.float()
    return _with_adapter(classifier, config) if lora else classifier


def _with_adapter(classifier: PreTrainedModel, config: TrainingConfig) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model  # a full verifier does not need it

    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",  # but the head
        modules_to_save=["score"],
    )
    return get_peft_model(classifier, adapter)
