"""int8 weights in torch: the definition's properties, and models that compute with rounded weights for a while."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from llm2_fast import ArgumentError
from llm2_fast.models.quantization import Quantization

NAMES = {"int8": 32, "int8-group64": 64, "int8-group128": 128, "int8-channel": None}


@given(
    out_features=st.integers(1, 5),
    in_features=st.integers(1, 40),
    group_size=st.sampled_from([None, 2, 6, 32]),
    exponent=st.integers(-100, 100),
    seed=st.integers(0, 1000),
)
def test_each_weight_is_within_half_a_scale(out_features, in_features, group_size, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 2.0**exponent
    quantization = Quantization(group_size)
    values, scales = quantization.quantize(weight)
    size = group_size or in_features
    assert (values.dtype, values.shape) == (torch.int8, weight.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (out_features, -(-in_features // size)))
    for index, (group, ints) in enumerate(zip(weight.split(size, 1), values.split(size, 1), strict=True)):
        scale = scales[:, index : index + 1]
        assert torch.equal(scale, group.abs().amax(1, keepdim=True) / 127)
        assert (ints.abs().amax(1) == 127).all()
        assert ((group.double() - scale.double() * ints).abs() <= scale * (0.5 + 1e-5)).all()
    assert torch.equal(quantization.round_trip(weight), values * scales[:, torch.arange(in_features) // size])
    assert torch.equal(quantization.quantize(-weight)[0], -values)


def test_more_rows_than_one_part_of_a_round_trip():
    weight = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0))
    values, scales = Quantization(2).quantize(weight)
    assert torch.equal(Quantization(2).round_trip(weight), values * scales[:, [0, 0, 1]])


def test_bfloat16_weights_keep_their_dtype():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantization = Quantization(None)
    assert torch.equal(quantization.round_trip(weight), quantization.round_trip(weight.float()).bfloat16())


@pytest.mark.parametrize(("name", "group_size"), NAMES.items())
def test_names(name, group_size):
    assert Quantization.from_name(name) == Quantization(group_size)
    assert Quantization(group_size).name == name


@pytest.mark.parametrize("name", ["int4", "INT8", "int8-group32", "", 8, None, ["int8"]], ids=repr)
def test_other_names_are_refused(name):
    with pytest.raises(ArgumentError, match="quantization: expected None or one of 'int8', 'int8-group64', .*, got"):
        Quantization.from_name(name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_with_rounded_weights_for_a_while(tied):
    model = tiny.causal_lm("llama", tie_word_embeddings=tied)
    quantization, ids = Quantization(None), torch.tensor([[3, 4, 5]])
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        with quantization.applied_to(model):
            rounded = model(ids).logits
            with pytest.raises(IndexError):
                model(torch.tensor([[tiny.VOCAB]]))
            with pytest.raises(RuntimeError):
                model.model.layers[0].mlp.down_proj(torch.zeros(1, 3))
        after = model(ids).logits
        expected = tiny.rounded(model, quantization)(ids).logits
    assert torch.equal(rounded, expected)
    assert not torch.equal(rounded, before)
    assert torch.equal(after, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    embedding = tiny.rounded(model, quantization).get_input_embeddings().weight
    assert torch.equal(embedding, model.get_input_embeddings().weight) != tied
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_norms_and_biases_are_kept():
    model = tiny.causal_lm("qwen2")
    rounded = tiny.rounded(model, Quantization(None)).state_dict()
    kept = {name for name, weight in model.state_dict().items() if torch.equal(weight, rounded[name])}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kept == model.state_dict().keys() - linear
