"""Loading of models, and fingerprints."""

import pytest
import torch

import llm2_fast
import tiny
from llm2_fast import CheckpointError
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import load_model
from tiny_tokenizer import tokenizer


@pytest.fixture
def saved(tmp_path):
    """A saved model with its tokenizer."""
    model = tiny.causal_lm("llama")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_directory_and_loaded_model_generate_the_same(saved):
    (from_path,) = llm2_fast.generate(str(saved), None, "w5 w6 w7", max_new_tokens=6)
    (from_memory,) = llm2_fast.generate(
        tiny.causal_lm("llama"), None, "w5 w6 w7", tokenizer=tokenizer(), max_new_tokens=6
    )
    assert from_path.samples[0].token_ids == from_memory.samples[0].token_ids
    assert from_path.text == from_memory.text


def test_directory_without_tokenizer(tmp_path):
    tiny.causal_lm("llama").save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None


def test_dtype_of_the_checkpoint_or_the_one_asked_for(saved):
    assert load_model(saved).model.dtype == torch.float32
    assert load_model(saved, dtype="bfloat16").model.dtype == torch.bfloat16
    load_model(saved, dtype=torch.bfloat16).model.save_pretrained(saved / "bf16")
    assert load_model(saved / "bf16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_generates(saved, dtype):
    (result,) = llm2_fast.generate(saved, None, [5, 6, 7], dtype=dtype, max_new_tokens=4)
    assert result.samples[0].error is None


def test_missing_directory_truncated_and_missing_weights(saved):
    with pytest.raises(CheckpointError, match="model 'no/such-model': cannot be loaded"):
        load_model("no/such-model")
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(saved)


def test_incomplete_weights_are_not_filled_with_random_numbers(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj.weight"):
        load_model(saved)


def test_pickled_weights_are_refused_unless_asked_for(saved):
    model = load_model(saved).model
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are read with allow_pickle=True only"):
        load_model(saved)
    assert fingerprint(load_model(saved, allow_pickle=True).model) == fingerprint(model)


def test_missing_and_damaged_gguf(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(CheckpointError, match="bad.gguf"):
        load_model(tmp_path / "bad.gguf")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fingerprint_is_that_of_the_weights(family, tmp_path):
    model = tiny.causal_lm(family)
    expected = fingerprint(model)
    assert fingerprint(model.base_model) == expected
    assert fingerprint(tiny.causal_lm(family).to(torch.bfloat16)) == expected
    model.save_pretrained(tmp_path)
    assert fingerprint(load_model(tmp_path).model) == expected
    assert fingerprint(tiny.causal_lm(family, seed=1)) != expected
    last = list(model.base_model.parameters())[-1]
    last.data.view(-1)[0] += 1
    assert fingerprint(model) != expected
