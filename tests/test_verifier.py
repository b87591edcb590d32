"""Verifier checkpoints: every layout, round trips, and what is refused."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import llm2_fast
import oracle
import tiny
import verifiers
from llm2_fast import CheckpointError, IncompatibleVerifierError, Verifier
from llm2_fast.models.loading import LoadedModel
from llm2_fast.verifier import FullVerifier
from tiny_tokenizer import tokenizer
from verifiers import KINDS, case, peft_classifier

TOKENS = [5, 9, 33, 2, 17, 8]
CANDIDATES = [4, 7, 60, 2]


def scores(verifier, model=None):
    """Scores of the candidates behind `TOKENS`."""
    if model is not None:
        verifier.base = LoadedModel(model, None, "tiny")
    session = verifier.session()
    ((result, _),) = session.score([session.add(TOKENS)], [CANDIDATES])
    return result


def expected(score):
    return torch.tensor([score(TOKENS, candidate) for candidate in CANDIDATES])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, family, tmp_path):
    model, verifier, score = vars(case(family, kind)).values()
    verifier.save_pretrained(tmp_path)
    loaded = Verifier.from_pretrained(tmp_path, model if kind != "full" else None)
    assert loaded.kind == kind
    torch.testing.assert_close(scores(loaded), expected(score), rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob("*.bin"))


def test_head_checkpoint_names_its_base(tmp_path):
    verifier = case("llama", "head").verifier
    verifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model"] == "tiny"
    assert config["base_fingerprint"] == verifier.base_fingerprint
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


# --- lora ----------------------------------------------------------------------------------------------------------


def test_saved_lora_verifier_loads_in_peft(tmp_path):
    model, verifier, score = vars(case("llama", "lora")).values()
    verifier.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=1))
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    adapted = PeftModel.from_pretrained(classifier, tmp_path).eval()
    torch.testing.assert_close(expected(oracle.classifier_score(adapted)), expected(score))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_is_bitwise_that_of_peft_in_every_dtype(dtype, adapter_dtype, tmp_path):
    case("llama", "lora").verifier.save_pretrained(tmp_path)
    edit_tensors(tmp_path / "adapter_model.safetensors", lambda t: {k: v.to(adapter_dtype) for k, v in t.items()})
    model, token_ids = tiny.causal_lm("llama").to(dtype), torch.tensor([TOKENS])
    decoder = Verifier.from_pretrained(tmp_path, model).scorer(LoadedModel(model, None, "tiny")).decoder
    with torch.no_grad(), decoder._applied():
        ours = model.base_model(token_ids).last_hidden_state
    classifier = AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=1)).to(dtype)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    adapted = PeftModel.from_pretrained(classifier, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(ours, adapted.base_model.model.base_model(token_ids).last_hidden_state)


def test_peft_checkpoint_with_patterns_and_rslora(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny.causal_lm("llama")
    classifier = AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=1))
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"up_proj": 9},
        layers_to_transform=[1, 2],
        modules_to_save=["score"],
    )
    adapted = get_peft_model(classifier, config).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path)
    verifier = Verifier.from_pretrained(tmp_path, model)
    torch.testing.assert_close(scores(verifier), expected(oracle.classifier_score(adapted)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora expected to be off, got True"),
        ({"bias": "all"}, "bias expected 'none', got 'all'"),
        ({"peft_type": "IA3"}, "peft_type expected 'LORA', got 'IA3'"),
        ({"task_type": "CAUSAL_LM"}, "task_type expected 'SEQ_CLS', got 'CAUSAL_LM'"),
        (
            {"modules_to_save": ["score", "embed_tokens"]},
            r"modules_to_save expected only score, got \['embed_tokens'\]",
        ),
        ({"trainable_token_indices": [3]}, "trainable_token_indices expected to be off"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights expected True, False, None, 'gaussian', got 'pissa'"),
        ({"some_future_option": 1}, "some_future_option expected to be off, got 1"),
        ({"lora_alpha": "x"}, "lora_alpha or alpha_pattern cannot be used"),
        ({"alpha_pattern": ["q"]}, "lora_alpha or alpha_pattern cannot be used"),
    ],
)
def test_adapters_beyond_plain_lora_are_refused_by_name(changes, message, tmp_path):
    case("llama", "lora").verifier.save_pretrained(tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        Verifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "score" not in k}, "expected base_model.model.score.weight"),
        (
            lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)},
            "lora_embedding_A",
        ),
        (lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj.lora_B" not in k}, "q_proj.lora_B"),
    ],
)
def test_adapter_tensors_that_do_not_fit(change, message, tmp_path):
    case("llama", "lora").verifier.save_pretrained(tmp_path)
    edit_tensors(tmp_path / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        Verifier.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:llm2_fast. this lora verifier")
def test_adapter_for_another_shape_is_refused(tmp_path):
    case("llama", "lora").verifier.save_pretrained(tmp_path)
    edit_json(tmp_path / "llm2_verifier.json", base_fingerprint=None)
    other = tiny.causal_lm("llama", num_key_value_heads=4)
    with pytest.raises(
        IncompatibleVerifierError, match=r"k_proj expected an update of shape \(32, 32\), got \(16, 32\)"
    ):
        Verifier.from_pretrained(tmp_path).scorer(LoadedModel(other, None, "other"))
    fewer = tiny.causal_lm("llama", num_hidden_layers=2)
    with pytest.raises(IncompatibleVerifierError, match=r"expected a module 'layers.2\."):
        Verifier.from_pretrained(tmp_path).scorer(LoadedModel(fewer, None, "fewer"))


@pytest.mark.filterwarnings("default:llm2_fast")
def test_adapter_without_a_fingerprint_is_named_and_can_be_bound(tmp_path):
    model, verifier, score = vars(case("llama", "lora")).values()
    verifier.save_pretrained(tmp_path)
    (tmp_path / "llm2_verifier.json").unlink()
    with pytest.warns(UserWarning, match="does not say which weights it was trained on"):
        llm2_fast.load(model, tmp_path)
    bound = Verifier.from_pretrained(tmp_path, base_model=model)
    torch.testing.assert_close(scores(bound), expected(score), rtol=1e-4, atol=1e-4)
    bound.save_pretrained(tmp_path)
    with pytest.raises(IncompatibleVerifierError, match="expected a model with fingerprint"):
        llm2_fast.load(tiny.causal_lm("llama", seed=9), tmp_path)


def test_directory_of_another_kind_is_refused(tmp_path):
    case("llama", "head").verifier.save_pretrained(tmp_path)
    with pytest.raises(llm2_fast.ArgumentError, match="path: expected no head verifier in the directory of a lora one"):
        case("llama", "lora").verifier.save_pretrained(tmp_path)


def test_files_beside_the_checkpoint_are_not_read(tmp_path):
    classifier = tiny.classifier("llama")
    classifier.save_pretrained(tmp_path)
    save_file({"score.weight": torch.zeros(1, 32)}, tmp_path / "zz-old.safetensors")
    by_hand = expected(oracle.classifier_score(classifier))
    torch.testing.assert_close(scores(Verifier.from_pretrained(tmp_path)), by_hand, rtol=1e-4, atol=1e-5)


def test_head_of_a_bfloat16_network_keeps_its_precision(tmp_path):
    full = case("llama", "full").verifier
    full.save_pretrained(tmp_path / "first")
    half = Verifier.from_pretrained(tmp_path / "first", dtype="bfloat16")
    half.save_pretrained(tmp_path / "second")
    again = Verifier.from_pretrained(tmp_path / "second")
    assert torch.equal(again.head.weight, full.head.weight)
    assert torch.equal(scores(again), scores(half))


def test_adapter_with_a_fingerprint_is_bound_to_its_base(tmp_path):
    model, verifier, _ = vars(case("llama", "lora")).values()
    verifier.save_pretrained(tmp_path)
    edit_json(tmp_path / "llm2_verifier.json", base_fingerprint="0" * 32)
    with pytest.raises(IncompatibleVerifierError, match="expected a model with fingerprint 0000"):
        Verifier.from_pretrained(tmp_path, model)


def test_peft_itself_agrees_with_the_whole_generation(tmp_path):
    """The adapter through PEFT's own loading, not only through the model it was made from."""
    model = case("llama", "lora").model
    base = AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=1))
    base.base_model.load_state_dict(model.base_model.state_dict())
    base.save_pretrained(tmp_path / "base")
    adapted = peft_classifier(model)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1).eval()
    config = llm2_fast.GenerationConfig(max_new_tokens=6)
    score = oracle.classifier_score(auto)
    tokens, *_ = oracle.generate(TOKENS, oracle.model_logits(model), score, config, eos=(2,))
    (result,) = llm2_fast.generate(model, Verifier.from_pretrained(tmp_path / "adapter", model), TOKENS, config=config)
    assert result.samples[0].token_ids == tokens


# --- full ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sequence_classifier_checkpoint(family, tmp_path):
    classifier = tiny.classifier(family)
    classifier.save_pretrained(tmp_path)
    torch.testing.assert_close(
        scores(Verifier.from_pretrained(tmp_path)), expected(oracle.classifier_score(classifier)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_token_classifier_checkpoint_and_its_bias(family, tmp_path):
    shape = tiny.config(family, num_labels=1)
    classifier = tiny.randomize(AutoModelForTokenClassification.from_config(shape), seed=4)
    classifier.save_pretrained(tmp_path / "first")
    ids = torch.tensor([[*TOKENS, CANDIDATES[0]]])
    with torch.no_grad():
        first = classifier(ids).logits[0, -1, 0]
    verifier = Verifier.from_pretrained(tmp_path / "first")
    assert verifier.head.bias is not None
    torch.testing.assert_close(scores(verifier)[0], first, rtol=1e-4, atol=1e-5)
    verifier.save_pretrained(tmp_path / "second")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits[0, -1, 0], first)


def test_official_layout_a_causal_lm_with_a_score_head(tmp_path):
    causal_lm = tiny.causal_lm("llama", seed=8)
    causal_lm.save_pretrained(tmp_path)
    score = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: {**tensors, "score.weight": score})
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    verifier = Verifier.from_pretrained(tmp_path)
    by_hand = oracle.head_score(causal_lm, {"score.weight": score})
    torch.testing.assert_close(scores(verifier), expected(by_hand), rtol=1e-4, atol=1e-5)
    verifier.save_pretrained(tmp_path / "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    torch.testing.assert_close(scores(verifier), expected(oracle.classifier_score(classifier)), rtol=1e-4, atol=1e-5)


def test_two_labels_are_refused(tmp_path):
    tiny.classifier("llama", num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"verifier head: expected shape \(1, 32\), got \(2, 32\)"):
        Verifier.from_pretrained(tmp_path)


def test_another_tokenizer_is_refused():
    model = LoadedModel(tiny.causal_lm("llama"), tokenizer(), "tiny")
    full = case("llama", "full").verifier
    same = FullVerifier(full.network, full.head.weight, tokenizer=tokenizer())
    same.scorer(model)
    other = FullVerifier(full.network, full.head.weight, tokenizer=tokenizer(tiny.VOCAB - 1))
    with pytest.raises(
        IncompatibleVerifierError, match=re.escape("tokenizer of tiny (61 tokens), got another one (60")
    ):
        other.scorer(model)


@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_vocabularies_may_differ_in_padding_only(beta):
    """One tokenizer, embeddings padded to different sizes: fine, and padding ids can never be chosen."""
    words = tokenizer()
    padded = tiny.causal_lm("llama", vocab_size=tiny.VOCAB + 3)
    padded.lm_head.weight.data[tiny.VOCAB :] *= 5  # padding rows that would win
    full = case("llama", "full").verifier
    verifier = FullVerifier(full.network, full.head.weight, tokenizer=tokenizer())
    engine = llm2_fast.load(padded, verifier, tokenizer=words, backend="reference")
    for options in ({"alpha": 0.0, "candidate_top_k": 32, "temperature": 3.0}, {}):
        (result,) = engine.generate([5, 6, 7], max_new_tokens=8, beta=beta, **options)
        assert all(token < tiny.VOCAB for token in result.samples[0].token_ids)
        assert result.samples[0].error is None
    with pytest.raises(llm2_fast.ArgumentError, match=r"prompts\[0\]: expected token ids in \[0, 61\), got 62"):
        engine.generate([5, 62])


# --- damaged and unknown files -------------------------------------------------------------------------------------


def test_unknown_directory_lists_what_it_found(tmp_path):
    with pytest.raises(CheckpointError, match="found an empty directory"):
        Verifier.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(CheckpointError, match=r"expected adapter_config.json or config.json .* found notes.txt"):
        Verifier.from_pretrained(tmp_path)


def test_neither_directory_nor_hub_id():
    with pytest.raises(CheckpointError, match="'no/such-verifier': neither a directory nor a hub id"):
        Verifier.from_pretrained("no/such-verifier")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_weights(kind, tmp_path):
    case("llama", kind).verifier.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged|cannot be loaded"):
        Verifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_weights(kind, tmp_path):
    case("llama", kind).verifier.save_pretrained(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="expected .*safetensors|cannot be loaded"):
        Verifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["", "not json", "[]", '"text"', "\xff"])
def test_damaged_config(kind, content, tmp_path):
    case("llama", kind).verifier.save_pretrained(tmp_path)
    name = "adapter_config.json" if kind == "lora" else "config.json"
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="config.*cannot be read|config.*expected a JSON object"):
        Verifier.from_pretrained(tmp_path)


def test_head_config_that_does_not_fit_its_weights(tmp_path):
    case("llama", "head").verifier.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", hidden_size=64)
    with pytest.raises(CheckpointError, match="config and weights do not fit"):
        Verifier.from_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", format_version=99)
    with pytest.raises(CheckpointError, match="got kind 'head', format_version 99"):
        Verifier.from_pretrained(tmp_path)


def test_pickled_verifier_is_refused_unless_asked_for(tmp_path):
    classifier = tiny.classifier("llama")
    classifier.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(classifier.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are read with allow_pickle=True only"):
        Verifier.from_pretrained(tmp_path)
    loaded = Verifier.from_pretrained(tmp_path, allow_pickle=True)
    torch.testing.assert_close(scores(loaded), expected(oracle.classifier_score(classifier)), rtol=1e-4, atol=1e-5)


def test_session_without_a_base_names_what_is_missing():
    verifier = verifiers.head_verifier(tiny.causal_lm("llama"))
    with pytest.raises(CheckpointError, match="'tiny'"):
        verifier.session()


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_tell_verifiers_apart(kind, tmp_path):
    verifier = case("llama", kind).verifier
    verifier.save_pretrained(tmp_path)
    assert len(verifier.fingerprint) == 32
    assert Verifier.from_pretrained(tmp_path).fingerprint == verifier.fingerprint
    (path,) = tmp_path.glob("*.safetensors")
    edit_tensors(path, lambda tensors: {name: 2 * t if "score" in name else t for name, t in tensors.items()})
    assert Verifier.from_pretrained(tmp_path).fingerprint != verifier.fingerprint
