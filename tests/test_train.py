"""Training: pairs, loss and a head that learns."""

import json

import pytest
import torch

import llm2_fast
import oracle
import tiny
from llm2_fast import ArgumentError, Verifier
from llm2_fast.models.decoder import LanguageModel
from llm2_fast.problems import Problem, load_problems
from llm2_fast.train.pairs import collect_pairs, tokenize_solution
from llm2_fast.train.trainer import pairwise_loss
from tiny_tokenizer import tokenizer

TOKENIZER = tokenizer()


def problems(count, seed=0, length=12):
    """Random questions; solutions over a few words, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)

    def words(low, high, n):
        return " ".join(f"w{int(i)}" for i in torch.randint(low, high, (n,), generator=generator))

    return [{"question": words(5, 61, 4), "answer": words(20, 28, length)} for _ in range(count)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pairs_are_those_of_brute_force(family):
    model = tiny.causal_lm(family)
    lm = LanguageModel(model)
    alpha, max_candidates = 0.2, 4
    entries = load_problems(problems(2))
    pairs = collect_pairs(
        lm, TOKENIZER, entries, layers=(0, -1), alpha=alpha, max_candidates=max_candidates, max_length=90
    )
    next_logits = oracle.model_logits(model)
    options = llm2_fast.GenerationConfig(alpha=alpha, max_candidates=max_candidates)

    @torch.no_grad()
    def features(tokens):
        output = model.base_model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        return torch.cat([output.hidden_states[1][0, -1], output.last_hidden_state[0, -1]])

    row = 0
    for problem in entries:
        prompt, solution = tokenize_solution(problem, TOKENIZER, tiny.VOCAB, 90)
        assert solution[-1] == TOKENIZER.eos_token_id
        for t, truth in enumerate(solution):
            prefix = [*prompt, *solution[:t]]
            logits = next_logits(prefix)
            candidates = oracle.plausible(logits, options)
            for token in candidates:
                if token != truth:
                    positive = pairs.positives[pairs.position[row]].float()
                    torch.testing.assert_close(positive, features([*prefix, truth]), rtol=2e-3, atol=2e-3)
                    torch.testing.assert_close(
                        pairs.negatives[row].float(), features([*prefix, token]), rtol=2e-3, atol=2e-3
                    )
                    assert bool(pairs.plausible[row]) == (truth in candidates)
                    assert float(pairs.system1_margin[row]) == pytest.approx(logits[truth] - logits[token], abs=1e-3)
                    row += 1
    assert row == len(pairs) > 10


def test_loss_is_that_of_the_definition():
    positive, negative = torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 1.0, -30.0])
    expected = -torch.log(1 / (1 + torch.exp(negative - positive))).mean()
    torch.testing.assert_close(pairwise_loss(positive, negative), expected)


def train(**options):
    defaults = {
        "heldout": problems(12, seed=1),
        "tokenizer": TOKENIZER,
        "epochs": 10,
        "learning_rate": 0.05,
        "max_length": 90,
        "plausible_only": False,  # a random model finds few of the solutions' words plausible
    }
    return llm2_fast.train_verifier(tiny.causal_lm("llama"), problems(40), **{**defaults, **options})


def test_a_trained_head_orders_pairs_it_has_not_seen(tmp_path):
    result = train(layers=(0, -1), mlp_size=16)
    assert result.heldout.num_pairs > 100
    # Not 1: one negative in eight is itself a word of the solutions, and chance is a half.
    assert result.heldout.verifier > 0.75
    assert result.heldout.combined > result.heldout.system1
    assert 0 < result.heldout_plausible.num_pairs < result.heldout.num_pairs
    assert train(epochs=1, plausible_only=True).num_pairs < result.num_pairs
    result.verifier.save_pretrained(tmp_path)
    model = tiny.causal_lm("llama")
    (generation,) = llm2_fast.generate(
        model, Verifier.from_pretrained(tmp_path), [5, 6], beta=5.0, max_new_tokens=12, ignore_eos=True
    )
    assert generation.stats.interventions > 0


def test_training_repeats_with_the_seed():
    first, again, other = (train(seed=seed, epochs=2, mlp_size=4).verifier.head.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["score.weight"], other["score.weight"])


def test_training_leaves_the_model_alone():
    model = tiny.causal_lm("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    llm2_fast.train_verifier(
        model, problems(5), heldout=problems(2, seed=1), tokenizer=TOKENIZER, epochs=1, max_length=90
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_problems_from_a_file(tmp_path):
    path = tmp_path / "train.jsonl"
    # U+2028 separates lines for str.splitlines, not in JSON lines.
    entries = [{"question": "a\u2028b", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}]
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries) + "\n", encoding="utf-8")
    (problem,) = load_problems(path)
    assert problem.question == "a\u2028b"
    assert problem.solution == "2 + 3 = 5\nThe answer is 5."
    assert load_problems([problem]) == [problem]


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("43", "43"),
        ("no marks", "no marks"),
        ("x\n#### 1,200", "x\nThe answer is 1,200."),
        ("#### 7", "The answer is 7."),
    ],
)
def test_solutions(answer, solution):
    assert Problem("q", answer).solution == solution


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"question": "a"}], r"problems\[0\].answer: expected non-empty text, got None"),
        ([{"question": "", "answer": "b"}], r"problems\[0\].question: expected non-empty text"),
        ([3], r"problems\[0\]: expected an object with question and answer, got int"),
        ("no/such/file.jsonl", "problems: expected the path of a JSON-lines file, got no/such/file.jsonl"),
    ],
)
def test_bad_problems(source, message):
    with pytest.raises(ArgumentError, match=message):
        load_problems(source)


def test_bad_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(ArgumentError, match="x.jsonl:2: expected a JSON object"):
        load_problems(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "full"}, "kind: expected 'head', got 'full'"),
        ({"alpha": 0}, "alpha: expected a number > 0 and <= 1, got 0"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"learning_rate": 0}, "learning_rate: expected a number > 0, got 0"),
        ({"heldout": 1.5}, "heldout: expected a number > 0 and <= 1, got 1.5"),
        ({"heldout": []}, "heldout: expected at least one problem, got none"),
        ({"tokenizer": None}, "tokenizer: expected a tokenizer, since the model came without one, got None"),
        ({"layers": (7,)}, r"layers: expected -1 \(the final norm\) or 0 to 1, got \(7,\)"),
    ],
)
def test_bad_training_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        train(**options)
