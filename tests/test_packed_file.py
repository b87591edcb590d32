"""Packed weights in files: mapped instead of packed again, never those of another model, tier or build."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import llm2_fast
import tiny
from llm2_fast import ArgumentError, GenerationConfig, ops
from llm2_fast.models import packed_file
from llm2_fast.models.loading import load_model
from llm2_fast.models.packed_file import PackedFile
from llm2_fast.models.weights import PackedWeights
from verifiers import KINDS, case

extension = ops.cpu_extension()
pytestmark = [
    pytest.mark.skipif(extension is None, reason=str(ops.cpu_extension_problem())),
    pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier:UserWarning"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The directory of packed files, not there yet."""
    monkeypatch.setenv("LLM2_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint: with biases, and with sizes that are no multiples of anything."""
    model = tiny.causal_lm("llama", attention_bias=True, intermediate_size=47, vocab_size=67)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(model, verifier=None, **options):
    return llm2_fast.load(model, verifier, device="cpu", backend="cpu", cache_packed=True, **options)


def everything(engine):
    """Tokens and the exact logprobs and scores of all samples."""
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True, trace=True, temperature=1.0)
    return [
        (sample.token_ids, sample.logprobs, [step.scores for step in sample.trace])
        for result in engine.generate(tiny.PROMPTS, config)
        for sample in result.samples
    ]


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


@pytest.fixture
def packings(monkeypatch):
    """The sources that were packed, in order."""
    packed, pack = [], PackedWeights.pack

    def record(extension, source, quantization=None):
        packed.append(source)
        return pack(extension, source, quantization)

    monkeypatch.setattr(PackedWeights, "pack", record)
    return packed


# --- Hits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_second_load_packs_nothing_and_gives_the_same_bits(family, kind, tmp_path, packings, cache):
    model, verifier, _ = vars(case(family, kind)).values()
    model.save_pretrained(tmp_path / "model")
    if kind is not None:
        verifier.save_pretrained(tmp_path / "verifier")
    arguments = (tmp_path / "model", kind and tmp_path / "verifier")
    expected = everything(llm2_fast.load(*arguments, device="cpu", backend="cpu"))
    assert not cache.exists()  # nobody asked for it
    assert everything(load(*arguments)) == expected
    assert len(list(cache.iterdir())) == (2 if kind == "full" else 1)
    packings.clear()
    assert everything(load(*arguments)) == expected
    assert packings == []


@pytest.mark.parametrize("quantization", [None, "int8", "int8-channel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_and_tied_embeddings(tied, dtype, quantization, tmp_path, packings):
    tiny.causal_lm("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    options = {"dtype": dtype, "quantization": quantization}
    expected = everything(load(tmp_path / "model", **options))
    packings.clear()
    assert everything(load(tmp_path / "model", **options)) == expected
    assert packings == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_file_is_mapped_and_its_tensors_are_aligned(saved, cache):
    load(saved)
    engine = load(saved)
    path = only_file(cache)
    assert str(path) in Path("/proc/self/maps").read_text()
    with safe_open(path, framework="pt") as file:
        assert all(file.get_tensor(name).data_ptr() % 64 == 0 for name in file.keys())  # noqa: SIM118
        metadata = file.metadata()
    assert json.loads(metadata["key"])["isa"] == extension.cpu_isa()
    assert path.stat().st_mode & 0o777 == 0o644
    del engine  # whose weights the mapping holds


def test_each_place_dtype_and_quantization_has_its_file(saved, tmp_path, cache):
    tiny.causal_lm("llama").save_pretrained(tmp_path / "other")
    for model in (saved, tmp_path / "other"):
        for dtype in ("float32", "bfloat16"):
            for quantization in (None, "int8", "int8-channel"):
                load(model, dtype=dtype, quantization=quantization)
    assert len(list(cache.iterdir())) == 12


# --- What does not fit is packed again -----------------------------------------------------------------------------


def test_another_checkpoint_in_the_same_place(saved, packings, cache):
    load(saved)
    before = only_file(cache).read_bytes()
    stat = (saved / "model.safetensors").stat()
    other = tiny.causal_lm("llama", seed=1, attention_bias=True, intermediate_size=47, vocab_size=67)
    other.save_pretrained(saved)
    # As after unpacking an archive with fixed times: only the content differs.
    os.utime(saved / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (saved / "model.safetensors").stat().st_size == stat.st_size
    packings.clear()
    assert everything(load(saved)) == everything(llm2_fast.load(other, backend="cpu"))
    assert only_file(cache).read_bytes() != before


def test_the_same_checkpoint_written_again(saved, packings, cache):
    load(saved)
    os.utime(saved / "model.safetensors")
    packings.clear()
    load(saved)
    assert len(packings) == 1
    only_file(cache)


def test_another_configuration(saved, packings):
    load(saved)
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.1}))
    packings.clear()
    results = everything(load(saved))
    assert len(packings) == 1
    assert results == everything(llm2_fast.load(saved, device="cpu", backend="cpu"))


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (packed_file, "_FORMAT_VERSION", 99),
        (packed_file, "__version__", "0.0.0"),
        (packed_file.transformers, "__version__", "0.0.0"),
    ],
    ids=["format", "llm2_fast", "transformers"],
)
def test_another_version(module, name, value, saved, packings, monkeypatch):
    load(saved)
    packings.clear()
    monkeypatch.setattr(module, name, value)
    load(saved)
    assert len(packings) == 1


@pytest.mark.skipif(extension is None or len(extension.cpu_isas()) < 2, reason="needs two tiers")
def test_tiers_do_not_share_files(saved, packings, cache, monkeypatch):
    load(saved)
    expected = everything(llm2_fast.load(saved, device="cpu", backend="cpu"))
    portable_extension = tiny.extension_of("portable")
    monkeypatch.setattr(ops, "cpu_extension", lambda: portable_extension)
    portable = [tokens for tokens, *_ in everything(load(saved))]
    assert portable == [tokens for tokens, *_ in expected]
    assert len(list(cache.iterdir())) == 2
    packings.clear()
    assert [tokens for tokens, *_ in everything(load(saved))] == portable
    assert packings == []
    # Under the name of the other tier's file: refused for its key.
    ours, theirs = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    os.replace(ours, theirs)
    load(saved)
    assert len(packings) == 1


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


DAMAGES = {
    "empty": lambda content: b"",
    "short": lambda content: content[: len(content) // 2],
    "lacks_a_byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "header_length": lambda content: flip(content, 0),
    "header": lambda content: flip(content, 8),
    "no_metadata": lambda content: content.replace(b"__metadata__", b"__metadatb__", 1),
    "layout": lambda content: content.replace(b'\\"in_features\\": 32', b'\\"in_features\\": 33', 1),
    "panel_shape": lambda content: content.replace(b'\\"panel_shape\\": [', b'\\"panel_shape\\": [1', 1)
    .replace(b"            ", b"           ", 1),
    "first_tensor": lambda content: flip(content, header_end(content)),
    "zeros": lambda content: content[: header_end(content)] + bytes(len(content) - header_end(content)),
    "another_format": lambda content: b"GGUF" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_packed_again(damage, saved, packings, cache, caplog):
    expected = everything(load(saved))
    path = only_file(cache)
    content = path.read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    path.write_bytes(damaged)
    packings.clear()
    with caplog.at_level(logging.WARNING, logger="llm2_fast"):
        assert everything(load(saved)) == expected
    assert len(packings) == 1
    (record,) = caplog.records
    assert f"packed weights {path}: damaged, packed again" in record.getMessage()
    assert path.read_bytes() == content


def test_every_tensor_is_checked(saved, cache):
    load(saved)
    path = only_file(cache)
    content = path.read_bytes()
    file = PackedFile(extension, load_model(saved, device="cpu").source)
    header = json.loads(content[8 : header_end(content)])
    names = [name for name in header if not name.startswith(("__metadata__", "padding."))]
    assert {"layers.2.gate_up.weights", "layers.0.qkv.bias", "lm_head.weights", "final_norm", "embedding"} <= set(names)
    for name in names:
        _, end = header[name]["data_offsets"]
        path.write_bytes(flip(content, header_end(content) + end - 1))
        assert file.read() is None
    path.write_bytes(content)
    assert file.read() is not None


def test_weights_that_fail_the_check_are_not_kept(saved, cache, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.5 * forward(self, x))
    with pytest.raises(ArgumentError, match="layers that compute what their type says"):
        load(saved)
    assert not cache.exists()


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_to_is_done_without(saved, cache, caplog, monkeypatch, tmp_path):
    expected = everything(llm2_fast.load(saved, device="cpu", backend="cpu"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM2_FAST_CACHE", str(tmp_path / "file"))  # no directory, whoever runs the test
    assert everything(load(saved)) == expected
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk_full", "interrupted"])
def test_failed_writes_leave_nothing_behind(error, saved, cache, monkeypatch):
    def fail(source, target):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    if isinstance(error, OSError):
        load(saved)
    else:
        with pytest.raises(KeyboardInterrupt):
            load(saved)
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_write_and_read_at_once(saved, cache):
    source = load_model(saved, device="cpu").source
    weights = PackedWeights.pack(extension, source)
    file = PackedFile(extension, source)

    def work(failures):
        for _ in range(20):
            file.write(weights)
            if file.read() is None:
                failures.put("unreadable")

    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [context.Process(target=work, args=(failures,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert failures.empty()
    only_file(cache)
    assert everything(load(saved)) == everything(llm2_fast.load(saved, device="cpu", backend="cpu"))


# --- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_packed": 1}, "cache_packed: expected True or False, got 1"),
        ({"cache_packed": True}, "cache_packed: expected False, or .* got a model in memory"),
        ({"cache_packed": True, "backend": "reference"}, "cache_packed: expected False, .* got the reference backend"),
    ],
)
def test_what_cannot_be_cached_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        llm2_fast.load(tiny.causal_lm("llama"), **options)


def test_a_model_that_the_cpu_backend_cannot_run_is_refused(tmp_path):
    tiny.causal_lm("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="cache_packed: expected False, or the cpu backend, got the reference"):
        llm2_fast.load(tmp_path, device="cpu", cache_packed=True)
