"""FlexAttention in packed passes against dense masks: the masks, losses and gradients, and when it is chosen."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import flex_attention as transformers_flex

import tiny
from llm2_fast.train import network
from llm2_fast.train.attention import AttentionChoice, block_masks, choose_attention, dense_masks
from llm2_fast.train.classifier import make_classifier
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Example
from llm2_fast.train.packing import pack, packed_loss
from test_train_runs import assert_same_weights, losses, train
from tolerances import TOLERANCES

FAMILIES = [family for family in tiny.FAMILIES if family != "gpt2"]  # whose class does not support it
CONFIG = TrainingConfig.for_kind("lora", lora_rank=3)
BLOCK = 128

# Tokens of each solution and pairs at random positions of it; None stands for an example without pairs.
PACKINGS = {
    "ragged": [(90, 20), (3, 1), (40, 60)],
    "many siblings": [(6, 80), (9, 30)],
    "one example": [(11, 7)],
    "padding": [(20, 9), None],
}
SEVERAL_BLOCKS = [(200, 100), None, (20, 150)]
sizes = st.none() | st.tuples(st.integers(2, 300), st.integers(1, 300))


def packed(shape, seed=0, vocab=tiny.VOCAB):
    """A packed batch of random examples."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    def example(length, num_pairs):
        input_ids = draw(0, vocab, length)
        # A third of the positives is not what the solution contains.
        pairs = [
            (position, other if i % 3 == 0 else input_ids[position], negative)
            for i, (position, other, negative) in enumerate(
                zip(draw(1, length, num_pairs), draw(0, vocab, num_pairs), draw(0, vocab, num_pairs), strict=True)
            )
        ]
        return Example.from_pairs(input_ids, pairs)

    return pack([None if size is None else example(*size) for size in shape])


def make(family, kind, *, flex, **shape):
    """A classifier in float64, all that trains random; the same with FlexAttention and without."""
    model = tiny.causal_lm(family, max_position_embeddings=400, **shape).base_model
    classifier = make_classifier(model, CONFIG, lora=kind == "lora", flex_attention=flex).double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in classifier.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return classifier


def loss_and_gradients(classifier, batch):
    classifier.zero_grad()
    output = classifier(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    loss = packed_loss(output, batch["labels"])
    loss.backward()
    return loss, {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention on the CPU, not compiled, and with the gradients that torch does not offer there.

    Returns:
        The dtypes of queries, keys and values of every call, with its mask.
    """
    calls = []

    def eager(query, key, value, *, training, **options):
        calls.append(({query.dtype, key.dtype, value.dtype}, options["block_mask"]))
        return torch_flex.flex_attention(query, key, value, **options)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", eager)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *operands: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    return calls


def in_blocks(visible):
    """bool [B, N, BLOCK, N, BLOCK] of bool [B, Q, Q], what lies beyond Q invisible."""
    missing = -visible.shape[1] % BLOCK
    visible = torch.nn.functional.pad(visible, (0, missing, 0, missing))
    num_blocks = visible.shape[1] // BLOCK
    return visible.view(-1, num_blocks, BLOCK, num_blocks, BLOCK)


def listed(num_blocks, indices):
    """bool [B, N, N]: which blocks of keys the tables of a mask list for each block of rows."""
    first = torch.arange(indices.shape[-1]) < num_blocks[..., None]
    return torch.zeros_like(first).scatter(-1, indices.long(), first)[:, 0]


@given(st.lists(sizes, min_size=1, max_size=3), st.integers(0, 2**31), st.none() | st.integers(1, 200))
def test_masks_are_the_dense_ones(shape, seed, window):
    """Every element of the function, and every block of the tables that say where the kernels evaluate it."""
    position_ids = packed(shape, seed)["position_ids"]
    windows = {"full_attention": window}
    expected = dense_masks(position_ids, windows, torch.float32)[:, 0] == 0
    mask = block_masks(position_ids, windows)
    batch_size, width = position_ids.shape
    assert mask.shape == (batch_size, 1, width, width)
    actual = torch_flex.create_mask(mask.mask_mod, batch_size, None, width, width, device="cpu")
    assert torch.equal(actual[:, 0], expected)

    some, every = (in_blocks(expected).any(dim=-1).any(dim=2), in_blocks(expected).all(dim=-1).all(dim=2))
    partial, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert not (some & ~(partial | full)).any()
    assert not (full & ~every).any()
    if window is None:  # nothing is evaluated in vain
        assert torch.equal(partial | full, some)
        assert torch.equal(full, every)


def test_masks_of_layers_that_differ():
    masks = block_masks(packed([(90, 20)])["position_ids"], {"sliding_attention": 5, "full_attention": None})
    assert list(masks) == ["sliding_attention", "full_attention"]
    assert masks["sliding_attention"].mask_mod is not masks["full_attention"].mask_mod


def test_nothing_is_allocated_per_row_and_key():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    position_ids = packed([(8_000, 8_000), (9_000, 4_000)])["position_ids"]
    with Largest() as largest:
        block_masks(position_ids, {"sliding_attention": 100, "full_attention": None})
    batch_size, width = position_ids.shape
    assert width > 16_000
    num_blocks = -(-width // BLOCK)
    assert largest.elements <= batch_size * max(num_blocks * BLOCK, num_blocks * (num_blocks + 1))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_dense_masks(family, packing, eager_flex):
    """Grouped heads everywhere; windows of five tokens in qwen2, mistral and gemma3."""
    batch = packed(PACKINGS[packing])
    for kind in ("full", "lora"):
        expected, expected_gradients = loss_and_gradients(make(family, kind, flex=False), batch)
        assert not eager_flex
        actual, actual_gradients = loss_and_gradients(make(family, kind, flex=True), batch)
        assert len(eager_flex) == 3  # layers
        assert all(isinstance(mask, torch_flex.BlockMask) for _, mask in eager_flex)
        eager_flex.clear()
        tolerance = TOLERANCES["packing", torch.float64]
        torch.testing.assert_close(actual, expected, **tolerance)
        assert actual_gradients.keys() == expected_gradients.keys()
        assert len(actual_gradients) > (10 if kind == "full" else 5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(actual_gradients[name], gradient, **tolerance, msg=name)


def test_autocast(eager_flex):
    """Rotated queries and keys are float32 inside autocast, values bfloat16: attention takes all in bfloat16."""
    batch = packed(PACKINGS["ragged"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = loss_and_gradients(make("llama", "full", flex=False).float(), batch)
        actual, _ = loss_and_gradients(make("llama", "full", flex=True).float(), batch)
    assert [dtypes for dtypes, _ in eager_flex] == [{torch.bfloat16}] * 3
    assert actual.item() == pytest.approx(expected.item(), rel=0.02)


def test_choice():
    model = tiny.causal_lm("llama", head_dim=16).base_model
    chosen = choose_attention(model, "cuda")
    assert chosen == (True, "the device and the model support it")
    assert str(chosen) == "FlexAttention: the device and the model support it"
    assert choose_attention(model, "cpu") == (False, "FlexAttention trains on cuda, not on cpu")
    model.config._attn_implementation = "eager"
    reason = "the model was loaded with attn_implementation 'eager', not 'sdpa'"
    assert choose_attention(model, "cuda") == (False, reason)
    model = tiny.causal_lm("llama", head_dim=16, attention_dropout=0.1).base_model
    assert choose_attention(model, "cuda") == (False, "FlexAttention has no dropout")
    model = tiny.causal_lm("gpt2").base_model
    assert str(choose_attention(model, "cuda")) == "dense masks: GPT2Model does not support FlexAttention"
    model = tiny.causal_lm("llama").base_model
    assert choose_attention(model, "cuda") == (False, "FlexAttention needs heads of at least 16 elements, not 8")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_with_it(family):
    assert choose_attention(tiny.causal_lm(family, head_dim=16).base_model, "cuda").flex


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run(kind, tmp_path, eager_flex, monkeypatch, caplog):
    """From choice to verifier, with activations computed again; the verifier decodes as any other."""
    options = {"epochs": 1, "gradient_checkpointing": True}
    with caplog.at_level(logging.INFO, logger=network.__name__):
        train(kind, tmp_path / "dense", **options)
        assert not eager_flex
        monkeypatch.setattr(network, "choose_attention", lambda model, device_type: AttentionChoice(True, "a test"))
        result = train(kind, tmp_path / "flex", **options)
    assert eager_flex
    said = [record.getMessage() for record in caplog.records if record.name == network.__name__]
    assert said == [
        "packed passes attend with dense masks: FlexAttention trains on cuda, not on cpu",
        "packed passes attend with FlexAttention: a test",
    ]
    record = json.loads((tmp_path / "flex" / "training.json").read_text())
    assert record["results"]["attention"] == "FlexAttention: a test"
    assert_same_weights(kind, tmp_path / "flex", tmp_path / "dense")
    assert losses(tmp_path / "flex") == pytest.approx(losses(tmp_path / "dense"), rel=1e-4)
    assert "flex" not in "".join(path.read_text() for path in (tmp_path / "flex").glob("*config.json"))
    if kind == "full":
        assert result.verifier.network.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family, kind, bf16):
    """Compiled, in float32 and under bfloat16 autocast, through widths that change, with activations computed again."""
    classifiers = [make(family, kind, flex=flex, head_dim=16).float().cuda() for flex in (False, True)]
    assert choose_attention(tiny.causal_lm(family, head_dim=16).base_model, "cuda").flex
    classifiers[1].train()
    classifiers[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for packing in (*PACKINGS.values(), SEVERAL_BLOCKS):
        batch = {name: tensor.cuda() for name, tensor in packed(packing).items()}
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
            (expected, expected_gradients), (actual, actual_gradients) = (
                loss_and_gradients(classifier, batch) for classifier in classifiers
            )
        assert actual.item() == pytest.approx(expected.item(), rel=0.02 if bf16 else 1e-4)
        gradient = torch.cat([gradient.flatten() for gradient in expected_gradients.values()])
        difference = torch.cat([actual_gradients[name].flatten() for name in expected_gradients]) - gradient
        assert difference.norm() < (0.05 if bf16 else 1e-3) * gradient.norm()
