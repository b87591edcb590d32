"""Checkpoints that are read tensor by tensor: the same tokens and bits as with the model in memory, and less memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import llm2_fast
import tiny
from llm2_fast import ArgumentError, CheckpointError, GenerationConfig, Verifier, ops
from llm2_fast.models import checkpoint
from llm2_fast.models.checkpoint import CheckpointSource, open_checkpoint
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import load_model
from llm2_fast.models.source import MemorySource
from verifiers import KINDS, case, head_verifier

needs_extension = pytest.mark.skipif(ops.cpu_extension() is None, reason=str(ops.cpu_extension_problem()))
pytestmark = pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning")

load = partial(llm2_fast.load, device="cpu")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
CPU = torch.device("cpu")


@pytest.fixture
def nothing_whole(monkeypatch):
    """Fail where a whole model is loaded."""

    def refuse(auto_class, source, **options):
        pytest.fail(f"{source} was read whole")

    monkeypatch.setattr(checkpoint, "read_checkpoint", refuse)


def everything(engine, **options):
    """Tokens and the exact logprobs and scores of all samples."""
    config = GenerationConfig(**{"max_new_tokens": 8, "ignore_eos": True, "trace": True, **options})
    return [
        (sample.token_ids, sample.logprobs, [(step.scores, step.adjusted_logits) for step in sample.trace])
        for result in engine.generate(tiny.PROMPTS, config)
        for sample in result.samples
    ]


def edit_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def open_causal_lm(directory, dtype="auto", allow_pickle=False):
    return open_checkpoint(AutoModelForCausalLM, directory, device=CPU, dtype=dtype, allow_pickle=allow_pickle)


@pytest.fixture
def saved(tmp_path):
    tiny.causal_lm("llama").save_pretrained(tmp_path)
    return tmp_path


# --- The same results ----------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_equal_those_of_the_model_in_memory(family, kind, tmp_path, request):
    model, verifier, _ = vars(case(family, kind)).values()
    options = {"temperature": 1.0, "n": 2}
    expected = everything(load(model, verifier, backend="cpu"), **options)
    model.save_pretrained(tmp_path / "model")
    if kind is not None:
        verifier.save_pretrained(tmp_path / "verifier")
    request.getfixturevalue("nothing_whole")
    engine = load(tmp_path / "model", kind and tmp_path / "verifier")
    assert engine.backend == "cpu"
    assert everything(engine, **options) == expected


def shard(directory: Path) -> None:
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink()


LAYOUTS = {
    "sharded": shard,
    "decoder_only": lambda directory: edit_tensors(
        directory, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    ),
    "old_buffers": lambda directory: edit_tensors(
        directory, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
}


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_files(layout, saved, caplog, nothing_whole):
    expected = everything(load(saved, backend="cpu"))
    LAYOUTS[layout](saved)
    engine = load(saved, backend="cpu")
    assert len(engine.model.source.files) > 1 or layout != "sharded"
    assert everything(engine) == expected
    assert not [record for record in caplog.records if record.name.startswith("llm2_fast")]


@needs_extension
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "int8", "int8-channel"])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_and_tied_embeddings(tied, quantization, dtype, stored, tmp_path, monkeypatch):
    tiny.causal_lm("llama", tie_word_embeddings=tied).to(stored).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1000)  # several chunks even of these weights
    options = {"backend": "cpu", "quantization": quantization}
    engine = load(tmp_path, dtype=dtype, **options)
    assert isinstance(engine.model.source, CheckpointSource)
    assert engine.model.dtype == model.dtype
    assert everything(engine) == everything(load(model, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_has_the_values_and_the_computation_of_the_model(family, tmp_path):
    model = tiny.causal_lm(family)
    model.save_pretrained(tmp_path)
    source = open_causal_lm(tmp_path)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    for name, parameter in source.skeleton.named_parameters():
        expected = model.get_parameter(name)
        assert torch.equal(source.tensor(parameter), expected)
        assert torch.equal(source.rows(parameter, [0, len(parameter) - 1]), expected[[0, -1]])
    assert fingerprint(source) == fingerprint(model)
    assert source.skeleton.num_parameters() == model.num_parameters()
    ids = torch.tensor([tiny.PROMPTS[0]])
    with source.running() as running, torch.no_grad():
        assert torch.equal(running(ids).logits, model(ids).logits)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert torch.equal(source.load().skeleton(ids).logits, model(ids).logits)


def test_skeleton_is_emptied_after_an_error(saved):
    source = open_causal_lm(saved)

    def interrupt(_module, _args, _output):
        raise KeyboardInterrupt

    handle = source.skeleton.model.layers[1].mlp.up_proj.register_forward_hook(interrupt)  # before it is emptied
    with pytest.raises(KeyboardInterrupt), source.running() as running:
        running(torch.tensor([[5]]))
    handle.remove()
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.skeleton.modules())


@needs_extension
def test_end_of_sequence_tokens_are_those_of_the_model(saved):
    assert load(saved)._eos_token_ids == (2,)
    path = saved / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 2]}))
    assert load(saved)._eos_token_ids == (7, 2)
    path.unlink()
    edit_config(saved, eos_token_id=5)
    assert load(saved)._eos_token_ids == (5,)


@needs_extension
def test_hub_ids_are_found_in_the_local_cache(tmp_path, monkeypatch, nothing_whole):
    repository = tmp_path / "models--org--tiny"
    tiny.causal_lm("llama").save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = open_causal_lm("org/tiny")
    assert [file.parent.name for file in source.files] == ["abc"]
    assert fingerprint(source) == fingerprint(tiny.causal_lm("llama"))


# --- Who needs the whole model gets it -------------------------------------------------------------------------------


@needs_extension
def test_reference_backend_and_sessions_load_the_model(tmp_path):
    model, verifier, _ = vars(case("llama", "full")).values()
    model.save_pretrained(tmp_path / "model")
    verifier.save_pretrained(tmp_path / "verifier")
    engine = load(tmp_path / "model", tmp_path / "verifier", backend="reference")
    assert [ids for ids, *_ in everything(engine)] == [
        ids for ids, *_ in everything(load(model, verifier, backend="reference"))
    ]
    lazy = Verifier.from_pretrained(tmp_path / "verifier")
    assert isinstance(lazy.source, CheckpointSource)
    session = lazy.session()
    assert session.score([session.add([5, 6])], [[7, 8]])[0][0].shape == (2,)
    head_verifier(model).save_pretrained(tmp_path / "head")
    session = Verifier.from_pretrained(tmp_path / "head", tmp_path / "model").session()
    assert session.score([session.add([5, 6])], [[7, 8]])[0][0].shape == (2,)


@needs_extension
def test_a_model_that_somebody_has_is_what_is_packed(tmp_path):
    """It may have been changed since, or its files may be gone."""
    model, verifier, _ = vars(case("llama", "full")).values()
    verifier.save_pretrained(tmp_path)
    lazy = Verifier.from_pretrained(tmp_path, device="cpu")
    lazy.network.norm.weight.data *= 0.5
    for path in tmp_path.iterdir():
        path.unlink()
    changed = everything(load(model, lazy, backend="cpu"))
    assert changed != everything(load(model, verifier, backend="cpu"))
    reference = load(model, lazy, backend="reference")
    assert [ids for ids, *_ in changed] == [ids for ids, *_ in everything(reference)]


def test_unsupported_families_are_loaded_at_once_and_without_a_word(tmp_path, caplog):
    tiny.causal_lm("gpt2").save_pretrained(tmp_path)
    assert isinstance(open_causal_lm(tmp_path), MemorySource)
    assert isinstance(open_causal_lm(tmp_path, dtype=torch.float16), MemorySource)
    assert not [record for record in caplog.records if record.name.startswith("llm2_fast")]


def pickle_weights(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def untie_in_the_file(directory):
    edit_config(directory, tie_word_embeddings=True)  # but both are there, and differ


@pytest.mark.parametrize(
    ("change", "message"),
    [(pickle_weights, "its weights are no safetensors"), (untie_in_the_file, "lm_head.weight: expected the values of")],
    ids=["pickled", "tied"],
)
def test_what_only_transformers_can_read_is_read_whole_and_reported(change, message, saved, caplog):
    change(saved)
    source = open_causal_lm(saved, allow_pickle=True)
    assert isinstance(source, MemorySource)
    (record,) = [record for record in caplog.records if record.name.startswith("llm2_fast")]
    assert "read whole instead of tensor by tensor" in record.getMessage()
    assert message in record.getMessage()


@needs_extension
def test_files_that_are_gone_when_they_are_asked_for(saved):
    source = open_causal_lm(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors': cannot be read"):
        source.tensor(source.skeleton.lm_head.weight)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        source.load()


# --- Refusals ------------------------------------------------------------------------------------------------------


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return tensors


def shrink(tensors):
    return {**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}


@pytest.mark.parametrize("change", [drop, shrink])
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_missing_and_misshapen_tensors(auto_class, change, saved):
    edit_tensors(saved, change)
    with pytest.raises(CheckpointError, match="up_proj"):
        open_checkpoint(auto_class, saved, device=CPU, dtype="auto", allow_pickle=False)


@pytest.mark.parametrize("damage", ["index", "shard"])
def test_damaged_shards(damage, saved):
    shard(saved)
    if damage == "index":
        (saved / "model.safetensors.index.json").write_text("[]")
    else:
        next(saved.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(saved)


def test_tensors_without_a_place_are_reported(saved, caplog):
    extra = {"model.layers.2.self_attn.q_proj.bias": torch.zeros(32)}
    edit_tensors(saved, lambda tensors: {**tensors, **extra, "score.weight": torch.zeros(1, 32)})
    with caplog.at_level(logging.WARNING, logger="llm2_fast"):
        assert isinstance(open_causal_lm(saved), CheckpointSource)
    (record,) = [record for record in caplog.records if record.name.startswith("llm2_fast")]
    assert "model.layers.2.self_attn.q_proj.bias and 0 more tensors are ignored" in record.getMessage()


@needs_extension
def test_a_family_that_computes_something_else_is_refused(saved, monkeypatch):
    """As after a change in transformers that compiled decoders do not know."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.5 * forward(self, x))
    with pytest.raises(ArgumentError, match="layers that compute what their type says"):
        load(saved, backend="cpu")


# --- Memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys

def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}

import torch, transformers
bare = status()
import llm2_fast
tiny, model, dtype, quantization, verified = (argument or None for argument in sys.argv[1:])

def used(checkpoint):
    engine = llm2_fast.load(
        checkpoint, checkpoint if verified else None, device="cpu", dtype=dtype, quantization=quantization,
        max_length=64, kv_cache_memory_bytes=1 << 23,
    )
    engine.generate([[1, 2, 3]], max_new_tokens=4, ignore_eos=True)
    return engine

used(tiny)  # so that what is used has been imported, and its code is in memory
warm = status()
engine = used(model)
caches = [engine._backend._llm, *([engine._backend._plan._verifier] if verified else [])]
print(json.dumps({
    "bare": bare, "warm": warm, "end": status(), "backend": engine.backend,
    "kv": sum(cache._keys.nbytes + cache._values.nbytes for cache in caches),
}))
"""
MEBIBYTE = 1 << 20


def save_constant(config, directory) -> dict[str, torch.Size]:
    """A checkpoint whose weights are all alike, verifier's head included; returns the shapes of the LLM's tensors."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    tensors = {name: torch.full(shape, 0.01, dtype=config.dtype) for name, shape in shapes.items()}
    save_file({**tensors, "score.weight": torch.zeros(1, config.hidden_size)}, directory / "model.safetensors")
    return shapes


@needs_extension
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "dtype", "quantization", "verified"),
    [
        ("float32", "float32", "", False),
        ("float32", "bfloat16", "", False),
        ("float32", "bfloat16", "int8", False),
        ("bfloat16", "bfloat16", "", False),
        ("bfloat16", "bfloat16", "", True),
    ],
)
def test_memory_is_that_of_the_packed_weights(stored, dtype, quantization, verified, tmp_path):
    """The peak, file pages included, and what stays. With a copy of the vocabulary or a layer it would be exceeded."""
    tiny = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, dtype=stored,
    )  # fmt: skip
    save_constant(tiny, tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=20000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, dtype=stored,
    )  # fmt: skip
    sizes = [shape.numel() for shape in save_constant(config, tmp_path / "model").values()]
    arguments = [str(tmp_path / "tiny"), str(tmp_path / "model"), dtype, quantization, "verified" if verified else ""]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["backend"] == "cpu"
    assert measured["kv"] < 32 * MEBIBYTE
    weight_bytes = 1 if quantization else getattr(torch, dtype).itemsize
    table = config.vocab_size * config.hidden_size
    packed = sum(sizes) * weight_bytes
    if verified:
        packed += packed - table * weight_bytes
    mapped = table * weight_bytes if verified else 0  # the verifier's table, of which rows are looked up
    bound = packed + measured["kv"]
    bare, warm, end = (measured[name] for name in ("bare", "warm", "end"))
    # Of a library's file as much is resident as the page cache maps at a time: 70 to 120 MB for the same imports.
    libraries = warm["RssFile"] - bare["RssFile"]
    assert end["VmHWM"] - bare["VmRSS"] - libraries <= bound + mapped + 150 * MEBIBYTE
    assert end["VmHWM"] - warm["VmRSS"] < bound + mapped + 32 * MEBIBYTE
    assert end["RssAnon"] - warm["RssAnon"] < bound + 32 * MEBIBYTE
