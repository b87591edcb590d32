"""The model `llm2_fast` of lm-evaluation-harness: what is generated is the engine's, likelihoods are the model's."""

from __future__ import annotations

import json

import pytest
import torch

import arithmetic
import llm2_fast
from llm2_fast import ArgumentError
from verifiers import head_verifier

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'llm2-fast[lm-eval]'")
from lm_eval.api.instance import Instance  # noqa: E402

from llm2_fast.integrations.lm_eval import EngineLM  # noqa: E402

MODEL, TOKENIZER = arithmetic.model(), arithmetic.tokenizer()
CONTEXTS = ["1 + 2 =", "3 + 3 + 1 =", "2 + 1 ="]


def make(**options):
    return EngineLM(MODEL, tokenizer=TOKENIZER, batch_size=2, **options)


def requests(kind, *arguments):
    return [Instance(kind, {}, argument, i, ("tiny", i, 1)) for i, argument in enumerate(arguments)]


@pytest.mark.parametrize("verified", [False, True])
def test_generations_are_those_of_the_engine(verified):
    verifier = head_verifier(MODEL) if verified else None
    greedy = {"until": ["is", ""], "max_gen_toks": 10, "do_sample": False, "temperature": 0.7}
    sampled = {"until": "####", "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 0.9}
    kwargs = [greedy, sampled, greedy]
    texts = make(verifier=verifier, beta=3.0, seed=5).generate_until(
        requests("generate_until", *zip(CONTEXTS, kwargs, strict=True)), disable_tqdm=True
    )
    engine = llm2_fast.load(MODEL, verifier, tokenizer=TOKENIZER)
    expected = [
        engine.generate(CONTEXTS[i], beta=3.0, seed=5, request_ids=[i], **options)[0].text
        for i, options in enumerate(
            [
                {"stop": "is", "max_new_tokens": 10},
                {"stop": "####", "max_new_tokens": 8, "temperature": 0.9, "top_p": 0.9},
                {"stop": "is", "max_new_tokens": 10},
            ]
        )
    ]
    assert texts == expected
    assert any(texts)


def test_repeats_are_other_samples_and_long_contexts_lose_their_beginning():
    sampled = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    first, second = make().generate_until(requests("generate_until", *[(CONTEXTS[0], sampled)] * 2), disable_tqdm=True)
    assert first != second
    greedy = {"until": [], "max_gen_toks": 6}
    long, cut = make().generate_until(
        requests("generate_until", ("1 + " * 60, greedy), ("1 + " * 45, greedy)), disable_tqdm=True
    )
    assert long == cut  # 90 tokens of context are left


def test_likelihoods_are_those_of_the_model_with_a_verifier_too():
    pair = ("1 + 2 =", " 3 .")
    ((value, greedy),) = make(verifier=head_verifier(MODEL), beta=3.0).loglikelihood(
        requests("loglikelihood", pair), disable_tqdm=True
    )
    context, token_ids = (TOKENIZER(text)["input_ids"] for text in (pair[0], "".join(pair)))
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    rows = range(len(context) - 1, len(token_ids) - 1)
    assert value == pytest.approx(sum(float(logprobs[i, token_ids[i + 1]]) for i in rows), abs=1e-3)
    assert greedy == all(int(logprobs[i].argmax()) == token_ids[i + 1] for i in rows)


def test_a_task_runs_from_the_registry():
    from lm_eval.api.registry import get_model

    assert get_model("llm2_fast") is EngineLM


@pytest.mark.parametrize("verified", [False, True])
def test_a_task_is_evaluated(tmp_path, verified):
    """A task with data of its own, from its files to its score."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": context, "answer": " 3"}) + "\n" for context in CONTEXTS))
    generation = {"until": ["\n"], "max_gen_toks": 1, "do_sample": False}
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": generation,
        "metric_list": [{"metric": "exact_match"}],
    }
    verifier = head_verifier(MODEL) if verified else None
    model = make(verifier=verifier, beta=3.0)
    results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True)
    answers = [sample["filtered_resps"][0] for sample in results["samples"]["sums"]]
    engine = llm2_fast.load(MODEL, verifier, tokenizer=TOKENIZER)
    expected = [result.text for result in engine.generate(CONTEXTS, beta=3.0, stop="\n", max_new_tokens=1)]
    assert answers == expected
    right = sum(answer == " 3" for answer in answers) / len(answers)
    assert results["results"]["sums"]["exact_match,none"] == pytest.approx(right)


def test_unusable_options():
    with pytest.raises(ArgumentError, match="option: expected one of alpha, beta"):
        make(temperature=1.0)
    with pytest.raises(ArgumentError, match="batch_size: expected an integer"):
        EngineLM(MODEL, tokenizer=TOKENIZER, batch_size="auto")
    for kwargs, message in (
        ({"typical_p": 0.5, "max_gen_toks": 4}, "generation_kwargs: expected one of"),
        ({"max_gen_toks": 96}, "max_gen_toks: expected fewer than the context of 96"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make().generate_until(requests("generate_until", ("1 +", kwargs)), disable_tqdm=True)
