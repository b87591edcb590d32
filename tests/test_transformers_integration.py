"""`VerifierLogitsProcessor` inside transformers' `generate`, against `llm2_fast.generate` and brute force."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import llm2_fast
import tiny
from llm2_fast import ArgumentError, Llm2FastError, Verifier
from llm2_fast.integrations.transformers import VerifierLogitsProcessor
from llm2_fast.verifier import FullVerifier
from tiny import VOCAB
from tolerances import TOLERANCES
from verifiers import KINDS, case

EOS = 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [20, 21, 22, 4]]  # ragged; the first is longer than the sliding windows
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def steered(kind, tmp_path_factory):
    """A model, a verifier that scores by itself over the same weights, and the brute-force score."""
    return make_steered("llama", kind, tmp_path_factory.mktemp(kind))


def make_steered(family, kind, directory):
    model, verifier, score = vars(case(family, kind)).values()
    verifier.save_pretrained(directory)
    return model, Verifier.from_pretrained(directory, base_model=model), score


def pad(prompts):
    """Left-padded ids and mask; the pad token is the end-of-sequence token."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[EOS] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def generate(model, processor, prompts=PROMPTS, **options):
    """Generated tokens [rows, new tokens] of transformers' own loop."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": EOS} | options
    inputs = pad(prompts)
    return model.generate(**inputs, logits_processor=[processor], **options)[:, inputs["input_ids"].shape[1] :]


def until_eos(row):
    """Tokens up to and with the first end-of-sequence token."""
    tokens = row.tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def adjusted_by_brute_force(score, prefix, logits, *, alpha=0.1, beta=0.25):
    """{candidate: z + beta * s} of one row."""
    plausible = [v for v, z in enumerate(logits) if z >= max(logits) + math.log(alpha)]
    if len(plausible) == 1:
        return {plausible[0]: logits[plausible[0]]}
    return {v: logits[v] + beta * score(prefix, v) for v in plausible}


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.3, "beta": 2.0}, {"alpha": 0.0, "candidate_top_k": 4}, {"max_candidates": 2}],
    ids=["defaults", "strong", "top-k candidates", "cut"],
)
def test_greedy_tokens_equal_the_engine(steered, options):
    model, verifier, _ = steered
    expected = llm2_fast.generate(model, verifier, PROMPTS, max_new_tokens=NEW_TOKENS, **options)
    processor = VerifierLogitsProcessor(verifier, attention_mask=pad(PROMPTS)["attention_mask"], **options)
    actual = generate(model, processor)
    assert [until_eos(row) for row in actual] == [result.samples[0].token_ids for result in expected]
    plain = llm2_fast.generate(model, None, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [r.samples[0].token_ids for r in plain] != [r.samples[0].token_ids for r in expected], "nothing was steered"


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_greedy_tokens_equal_the_engine_in_other_families(family, kind, tmp_path):
    model, verifier, _ = make_steered(family, kind, tmp_path)
    expected = llm2_fast.generate(model, verifier, PROMPTS, max_new_tokens=NEW_TOKENS)
    actual = generate(model, VerifierLogitsProcessor(verifier, prompt_lengths=[len(p) for p in PROMPTS]))
    assert [until_eos(row) for row in actual] == [result.samples[0].token_ids for result in expected]


def test_greedy_tokens_with_a_penalty_equal_the_engine(steered):
    model, verifier, _ = steered
    expected = llm2_fast.generate(model, verifier, PROMPTS, max_new_tokens=NEW_TOKENS, repetition_penalty=1.5)
    processor = VerifierLogitsProcessor(verifier, attention_mask=pad(PROMPTS)["attention_mask"], repetition_penalty=1.5)
    actual = [until_eos(row) for row in generate(model, processor)]
    assert actual == [result.samples[0].token_ids for result in expected]
    unpenalized = VerifierLogitsProcessor(verifier, attention_mask=pad(PROMPTS)["attention_mask"])
    assert actual != [until_eos(row) for row in generate(model, unpenalized)], "the penalty changed nothing"


class Recorder(VerifierLogitsProcessor):
    """Keeps what every step got and gave."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def __call__(self, input_ids, scores):
        raw, output = scores.clone(), super().__call__(input_ids, scores)
        assert torch.equal(raw, scores), "the logits of the caller were changed"
        self.steps.append((input_ids.clone(), raw, output))
        return output


def assert_steps_equal_brute_force(steps, score, starts):
    """Every row of every step against a full forward pass per candidate, without a cache. Gives the ambiguous rows."""
    ambiguous = 0
    for input_ids, raw, output in steps:
        for tokens, logits, row, start in zip(input_ids.tolist(), raw.tolist(), output, starts, strict=True):
            expected = torch.full_like(row, float("-inf"))
            for token, value in adjusted_by_brute_force(score, tokens[start:], logits).items():
                expected[token] = value
            torch.testing.assert_close(row, expected, **TOLERANCES["verifier.score", torch.float32])
            ambiguous += int(row.isfinite().sum() > 1)
    return ambiguous


def test_beams_equal_an_uncached_scorer(steered):
    model, verifier, score = steered
    processor = Recorder(verifier, attention_mask=pad(PROMPTS)["attention_mask"])
    generate(model, processor, num_beams=3, max_new_tokens=6)
    starts = [start for prompt in PROMPTS for start in [8 - len(prompt)] * 3]
    assert assert_steps_equal_brute_force(processor.steps, score, starts) > 0
    histories = [input_ids for input_ids, _, _ in processor.steps]
    moved = [not torch.equal(new[:, : old.shape[1]], old) for old, new in pairwise(histories)]
    assert any(moved), "no beam was reordered"


def test_sampling_chooses_candidates_only(steered):
    model, verifier, score = steered
    processor = Recorder(verifier, attention_mask=pad(PROMPTS)["attention_mask"])
    torch.manual_seed(0)
    sampling = {"temperature": 1.3, "top_k": 5, "top_p": 0.95, "min_p": 0.02}
    tokens = generate(model, processor, do_sample=True, num_return_sequences=2, max_new_tokens=6, **sampling)
    starts = [start for prompt in PROMPTS for start in [8 - len(prompt)] * 2]
    assert assert_steps_equal_brute_force(processor.steps, score, starts) > 0
    for step, (_, raw, _) in enumerate(processor.steps):
        for row, logits in zip(tokens, raw, strict=True):
            if EOS not in row[:step]:
                assert logits[row[step]] >= logits.max() + math.log(0.1)


def test_assisted_decoding_equals_greedy(steered):
    """The assistant runs ahead and is taken back; both loops call the same processor."""
    model, verifier, score = steered
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight += 0.3 * torch.randn_like(assistant.lm_head.weight)
    prompt = [PROMPTS[0]]
    expected = generate(model, VerifierLogitsProcessor(verifier, prompt_lengths=[8]), prompt)
    processor = Recorder(verifier, prompt_lengths=[8])
    actual = generate(model, processor, prompt, assistant_model=assistant)
    assert actual.tolist() == expected.tolist()
    assert assert_steps_equal_brute_force(processor.steps, score, [0]) > 0
    widths = [input_ids.shape[1] for input_ids, _, _ in processor.steps]
    assert widths != sorted(widths), "nothing was taken back"


def test_rows_with_one_candidate_are_not_scored(steered):
    _, verifier, _ = steered
    processor = VerifierLogitsProcessor(verifier, prompt_lengths=[2, 2])
    scored = []
    score = processor._session.score
    processor._session.score = lambda slots, branches: scored.append(branches) or score(slots, branches)
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 9.0
    logits[1, 9] = 8.0
    output = processor(torch.tensor([[5, 6], [7, 8]]), logits)
    assert scored == [[[7, 9]]]
    assert output[0, 7] == 9.0
    assert output.isfinite().sum(dim=1).tolist() == [1, 2]


@st.composite
def row_programs(draw):
    """Prompts and, step by step, arbitrary continuations of them: longer, shorter, swapped, more rows or fewer."""
    token = st.integers(3, 8)  # few, so that continuations share prefixes
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=2))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        copies, length = draw(st.integers(1, 3)), draw(st.integers(0, 4))
        rows = st.lists(token, min_size=length, max_size=length)
        steps.append([[draw(rows) for _ in range(copies)] for _ in prompts])
    return prompts, steps


@settings(max_examples=15)
@given(program=row_programs())
def test_any_rows_in_any_order_equal_brute_force(program):
    prompts, steps = program
    _, verifier, score = vars(case("llama", "full")).values()
    width = max(map(len, prompts))
    processor = Recorder(verifier, prompt_lengths=[len(p) for p in prompts])
    generator = torch.Generator().manual_seed(0)
    for continuations in [[[[]] for _ in prompts], *steps]:
        rows = [
            [EOS] * (width - len(prompt)) + prompt + continuation
            for prompt, group in zip(prompts, continuations, strict=True)
            for continuation in group
        ]
        starts = [width - len(prompt) for prompt, group in zip(prompts, continuations, strict=True) for _ in group]
        logits = 2.0 * torch.randn(len(rows), VOCAB, generator=generator)
        processor.steps.clear()
        processor(torch.tensor(rows), logits)
        assert_steps_equal_brute_force(processor.steps, score, starts)


def test_half_precision_logits_keep_their_dtype(steered):
    _, verifier, _ = steered
    processor = VerifierLogitsProcessor(verifier, prompt_lengths=[2])
    assert processor(torch.tensor([[5, 6]]), torch.randn(1, VOCAB).bfloat16()).dtype == torch.bfloat16


def test_minus_infinity_is_never_a_candidate(steered):
    _, verifier, _ = steered
    processor = VerifierLogitsProcessor(verifier, prompt_lengths=[1], alpha=0.0, candidate_top_k=5)
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [4, 5]] = 1.0  # a tie
    assert processor(torch.tensor([[3]]), logits).isfinite().nonzero().tolist() == [[0, 4], [0, 5]]


def test_tokens_unknown_to_the_verifier_are_no_candidates():
    classifier = tiny.classifier("llama", vocab_size=50)
    verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    processor = VerifierLogitsProcessor(verifier, prompt_lengths=[1])
    logits = torch.zeros(1, VOCAB)
    logits[0, 49:51] = 9.0
    assert processor(torch.tensor([[3]]), logits).isfinite().nonzero().tolist() == [[0, 49]]
    with pytest.raises(ArgumentError, match=r"token_ids: expected ids in \[0, 50\)"):
        VerifierLogitsProcessor(verifier, prompt_lengths=[1])(torch.tensor([[50]]), torch.zeros(1, VOCAB))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_without_a_finite_maximum_are_refused(steered, bad):
    _, verifier, _ = steered
    processor = VerifierLogitsProcessor(verifier, prompt_lengths=[1, 1, 1])
    logits = torch.zeros(3, VOCAB)
    logits[1] = bad
    with pytest.raises(ArgumentError, match=r"scores: expected .* finite maximum .* rows \[1\]"):
        processor(torch.tensor([[3], [4], [5]]), logits)


def test_nan_scores_raise_and_leave_nothing_behind(steered):
    model, verifier, _ = steered
    processor = VerifierLogitsProcessor(verifier, attention_mask=pad(PROMPTS)["attention_mask"])
    expected = generate(model, processor)
    network = processor._session._scorer.decoder.model

    handle = network.layers[0].register_forward_hook(lambda module, args, output: output * float("nan"))
    processor.reset(attention_mask=pad(PROMPTS)["attention_mask"])
    ids, logits = pad(PROMPTS)["input_ids"], torch.zeros(len(PROMPTS), VOCAB)
    try:
        with pytest.raises(Llm2FastError, match=r"verifier: expected scores without NaN, .* rows \[0, 1, 2\]"):
            processor(ids, logits)
    finally:
        handle.remove()
    assert generate(model, processor).tolist() == expected.tolist()


def test_second_call_with_the_same_prompts(steered):
    model, verifier, _ = steered
    processor = VerifierLogitsProcessor(verifier, attention_mask=pad(PROMPTS)["attention_mask"])
    first = generate(model, processor)
    generate(model, processor, num_beams=2, max_new_tokens=4)
    assert generate(model, processor).tolist() == first.tolist()


def test_second_call_with_other_prompts_needs_a_reset(steered):
    model, verifier, _ = steered
    others = [[9, 8, 7], [6, 5, 4, 3, 4, 5, 6, 7], [11]]
    processor = VerifierLogitsProcessor(verifier, attention_mask=pad(PROMPTS)["attention_mask"])
    generate(model, processor)
    with pytest.raises(ArgumentError, match=r"input_ids: expected the prompts of the first step.*reset"):
        generate(model, processor, others)
    processor.reset(attention_mask=pad(others)["attention_mask"])
    expected = llm2_fast.generate(model, verifier, others, max_new_tokens=NEW_TOKENS)
    assert [until_eos(row) for row in generate(model, processor, others)] == [r.samples[0].token_ids for r in expected]


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ({"attention_mask": pad(PROMPTS)["attention_mask"][:, 1:]}, "input_ids: expected prompts 7 tokens wide"),
        ({"attention_mask": torch.ones(3, 9)}, "input_ids: expected prompts 9 tokens wide"),
        ({"prompt_lengths": [7, 1, 4]}, "input_ids: expected prompts 7 tokens wide"),
        ({"attention_mask": torch.ones(2, 8)}, "input_ids: expected rows for 2 prompts"),
    ],
    ids=["narrower mask", "wider mask", "shorter prompts", "fewer prompts"],
)
def test_padding_of_other_prompts_is_refused(steered, padding, message):
    model, verifier, _ = steered
    with pytest.raises(ArgumentError, match=message):
        generate(model, VerifierLogitsProcessor(verifier, **padding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "attention_mask: expected either attention_mask or prompt_lengths, got neither"),
        ({"attention_mask": torch.ones(1, 2), "prompt_lengths": [2]}, "attention_mask: .* got both"),
        ({"attention_mask": torch.tensor([[1, 1], [1, 0]])}, r"attention_mask: .* rows \[1\]"),  # right-padded
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, r"attention_mask: .* rows \[0\]"),
        ({"attention_mask": torch.tensor([[0, 0]])}, r"attention_mask: .* rows \[0\]"),
        ({"attention_mask": torch.tensor([[0, 2]])}, r"attention_mask: .* rows \[0\]"),
        ({"attention_mask": torch.ones(2)}, r"attention_mask: expected shape \[B, prompt_width\]"),
        ({"attention_mask": torch.ones(0, 2)}, r"attention_mask: expected shape \[B, prompt_width\]"),
        ({"prompt_lengths": []}, "prompt_lengths: expected at least one prompt"),
        ({"prompt_lengths": [3, 0]}, r"prompt_lengths\[1\]: expected an integer >= 1, got 0"),
        ({"prompt_lengths": [2], "alpha": 2.0}, "alpha: "),
        ({"prompt_lengths": [2], "alpha": 0.0}, "alpha: .*candidate_top_k"),
        ({"prompt_lengths": [2], "beta": -1.0}, "beta: "),
        ({"prompt_lengths": [2], "candidate_top_k": 40}, "candidate_top_k: expected at most max_candidates"),
        ({"prompt_lengths": [2], "repetition_penalty": 0.0}, "repetition_penalty: "),
        ({"prompt_lengths": [2], "generation_config": {}}, "generation_config: expected a transformers"),
    ],
)
def test_bad_arguments_are_refused(steered, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        VerifierLogitsProcessor(steered[1], **arguments)


def test_what_is_not_a_verifier_is_refused():
    with pytest.raises(ArgumentError, match=r"verifier: expected a llm2_fast\.Verifier, got str"):
        VerifierLogitsProcessor("verifier", prompt_lengths=[1])


EARLIER = {
    "repetition_penalty": 1.1,
    "encoder_repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "sequence_bias": [[[3], 1.0]],
    "min_length": 4,
    "min_new_tokens": 4,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.1),
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "guidance_scale": 1.5,
}


@pytest.mark.parametrize("name", EARLIER)
def test_options_that_change_logits_first_are_refused(steered, name):
    _, verifier, _ = steered
    config = GenerationConfig(**{name: EARLIER[name]})
    with pytest.raises(ArgumentError, match=rf"generation_config\.{name}: expected"):
        VerifierLogitsProcessor(verifier, prompt_lengths=[1], generation_config=config)


def test_every_processor_that_runs_first_is_refused(steered):
    """What transformers puts before custom processors, found by asking it, is what is refused."""
    model, _, _ = steered
    alone = model._get_logits_processor(prepared(model), logits_processor=[])
    assert len(alone) == 0
    for name, value in EARLIER.items():
        added = model._get_logits_processor(
            prepared(model, **{name: value}), input_ids_seq_length=3, encoder_input_ids=torch.tensor([[3, 4, 5]])
        )
        assert len(added) == 1, name


def prepared(model, **options):
    config = GenerationConfig(eos_token_id=EOS, max_length=20, **options)
    config._eos_token_tensor = torch.tensor([EOS])
    return config


def test_options_that_run_afterwards_are_accepted(steered):
    model, verifier, _ = steered
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, num_beams=2, repetition_penalty=1.0
    )
    VerifierLogitsProcessor(verifier, prompt_lengths=[1], generation_config=config)
    VerifierLogitsProcessor(verifier, prompt_lengths=[1], generation_config=model.generation_config)


def test_continuous_batching_is_declined():
    assert VerifierLogitsProcessor.supports_continuous_batching is False
