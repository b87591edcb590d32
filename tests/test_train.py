"""Training of every kind: pairs, verifiers that learn, and what is refused before anything is trained."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import llm2_fast
import oracle
import tiny
from llm2_fast import ArgumentError, IncompatibleVerifierError, MissingDependencyError, Verifier
from llm2_fast.models.decoder import LanguageModel
from llm2_fast.models.fingerprint import fingerprint
from llm2_fast.models.loading import tokenizer_hash
from llm2_fast.problems import Problem, load_problems
from llm2_fast.prompts import chat_template_hash
from llm2_fast.supervision import (
    Manifest,
    Supervision,
    SupervisionExample,
    TokenPair,
    tokenize_messages,
    write_supervision,
)
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Solution, load_source, tokenize_source
from llm2_fast.train.pairs import collect_pairs
from successors import RING, TOKENIZER, supervision
from tolerances import TOLERANCES
from verifiers import KINDS

# Each learns the successors well within them.
SETTINGS = {
    "head": {"epochs": 30, "learning_rate": 0.05, "mlp_size": 16, "layers": (0, -1)},
    "lora": {"epochs": 4, "learning_rate": 1e-2, "batch_size": 8, "per_device_batch_size": 8},
    "full": {"epochs": 4, "learning_rate": 3e-3, "batch_size": 8, "per_device_batch_size": 8},
}
HELDOUT = supervision(20, seed=1)


def problems(count, seed=0, length=12):
    """Random questions; solutions over a few words, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)

    def words(low, high, n):
        return " ".join(f"w{int(i)}" for i in torch.randint(low, high, (n,), generator=generator))

    return [{"question": words(5, 61, 4), "answer": words(20, 28, length)} for _ in range(count)]


def train(data, kind="head", **options):
    """`train_verifier` on a tiny model, a few steps unless told otherwise."""
    few = {"epochs": 1} if kind == "head" else {"epochs": 1, "batch_size": 4}
    defaults = {"heldout": HELDOUT, "tokenizer": TOKENIZER, "max_length": 90, **few}
    return llm2_fast.train_verifier(tiny.causal_lm("llama"), data, kind, **{**defaults, **options})


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pairs_of_problems_are_those_of_brute_force(family):
    model = tiny.causal_lm(family)
    lm = LanguageModel(model)
    config = TrainingConfig.for_kind("head", alpha=0.2, max_candidates=4, layers=(0, -1))
    solutions = tokenize_source(load_problems(problems(2)), TOKENIZER, tiny.VOCAB, 90, "problems")
    pairs = collect_pairs(lm, solutions, config)
    next_logits = oracle.model_logits(model)
    options = llm2_fast.GenerationConfig(alpha=0.2, max_candidates=4)
    row = 0
    for solution in solutions:
        assert solution.input_ids[-1] == TOKENIZER.eos_token_id
        for t in range(solution.start, len(solution.input_ids)):
            prefix, truth = solution.input_ids[:t], solution.input_ids[t]
            logits = next_logits(prefix)
            candidates = oracle.plausible(logits, options)
            for token in candidates:
                if token != truth:
                    check_pair(pairs, row, model, prefix, truth, token)
                    assert bool(pairs.system1.plausible[row]) == (truth in candidates)
                    assert float(pairs.system1.margin[row]) == pytest.approx(logits[truth] - logits[token], abs=1e-3)
                    row += 1
    assert row == len(pairs) > 10


def test_pairs_of_supervision_are_its_own():
    model = tiny.causal_lm("llama")
    # The second solution does not contain the positives of its last two pairs.
    solutions = [
        Solution([5, 6, 7, 8], 0, [(3, 8, 9), (1, 6, 30)]),
        Solution([9, 8, 7, 6], 0, [(2, 7, 8), (2, 40, 7), (2, 40, 41)]),
    ]
    config = TrainingConfig.for_kind("head", layers=(0, -1))
    pairs = collect_pairs(LanguageModel(model), solutions, config)
    next_logits = oracle.model_logits(model)
    expected = [(solution.input_ids[:p], *tokens) for solution in solutions for p, *tokens in solution.pairs]
    assert len(pairs) == len(expected)
    for row, (prefix, positive, negative) in enumerate(expected):
        check_pair(pairs, row, model, prefix, positive, negative)
        logits = next_logits(prefix)
        assert float(pairs.system1.margin[row]) == pytest.approx(logits[positive] - logits[negative], abs=1e-3)
        plausible = oracle.plausible(logits, llm2_fast.GenerationConfig(max_candidates=8))
        assert bool(pairs.system1.plausible[row]) == (positive in plausible)


@torch.no_grad()
def check_pair(pairs, row, model, prefix, positive, negative):
    """Compare a pair's features, of the first and the last layer, with those of whole passes."""

    def features(tokens):
        output = model.base_model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        return torch.cat([output.hidden_states[1][0, -1], output.last_hidden_state[0, -1]])

    tolerance = {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(pairs.positives[pairs.positive[row]], features([*prefix, positive]), **tolerance)
    torch.testing.assert_close(pairs.negatives[row], features([*prefix, negative]), **tolerance)


def test_long_solutions_are_cut():
    entry = supervision(1, seed=0)[0]
    (whole,) = tokenize_source(load_source([entry], "x"), TOKENIZER, tiny.VOCAB, 90, "x")
    (cut,) = tokenize_source(load_source([entry], "x"), TOKENIZER, tiny.VOCAB, 8, "x")
    assert cut.input_ids == whole.input_ids[:8]
    assert cut.pairs == [pair for pair in whole.pairs if pair.position < 8]
    assert tokenize_source(load_source([entry], "x"), TOKENIZER, tiny.VOCAB, 3, "x") == []


def test_sources(tmp_path):
    """Paths and entries in memory, of supervision and of problems."""
    examples = supervision(3, seed=0)
    write_supervision(tmp_path / "supervision.jsonl", examples)
    mappings = [json.loads(example.to_json()) for example in examples]
    for source in (tmp_path / "supervision.jsonl", str(tmp_path / "supervision.jsonl"), examples, mappings):
        assert load_source(source, "x") == Supervision(examples, None)
    (tmp_path / "problems.jsonl").write_text("\n" + "\n".join(map(json.dumps, problems(2))))
    parsed = [Problem(**entry) for entry in problems(2)]
    for source in (tmp_path / "problems.jsonl", problems(2), parsed):
        assert load_source(source, "x") == parsed


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def learned(request, tmp_path_factory):
    """Kind, directory and result of a run on which a verifier learns which word follows which."""
    directory = tmp_path_factory.mktemp(request.param) / "run"
    data = supervision(128, seed=0)
    result = train(data, request.param, output_dir=directory, **SETTINGS[request.param])
    return request.param, directory, result


def test_a_verifier_orders_pairs_it_has_not_seen(learned):
    _, directory, result = learned
    assert result.num_pairs == 128 * 18
    assert result.heldout.num_pairs == 20 * 18
    assert result.heldout.verifier > 0.9  # by chance, and by the words alone, one half
    assert result.heldout.combined > result.heldout.system1
    assert 0 < result.heldout_plausible.num_pairs < result.heldout.num_pairs
    record = json.loads((directory / "training.json").read_text())
    assert record["results"]["heldout"] == dataclasses.asdict(result.heldout)
    assert record["run"]["base_fingerprint"] == fingerprint(tiny.causal_lm("llama"))
    assert record["run"]["tokenizer_hash"] == tokenizer_hash(TOKENIZER)


def test_what_was_measured_is_what_decoding_scores(learned):
    """Scores of a session, with its cache and a candidate list per step, against those of the training passes."""
    kind, directory, result = learned
    session = Verifier.from_pretrained(directory, None if kind == "full" else tiny.causal_lm("llama")).session()
    solutions = tokenize_source(load_source(HELDOUT, "x"), TOKENIZER, tiny.VOCAB, 90, "x")
    slots = [session.add(solution.input_ids[:1]) for solution in solutions]
    margins = []
    for position in range(1, len(solutions[0].input_ids)):  # all are of one length
        pairs = [[pair for pair in solution.pairs if pair.position == position] for solution in solutions]
        # Positive and negative of every pair in turn.
        scores = session.score(slots, [[token for pair in some for token in pair[1:]] for some in pairs])
        margins += [margin for some, _ in scores for margin in (some[::2] - some[1::2]).tolist()]
        for slot, solution in zip(slots, solutions, strict=True):
            session.extend(slot, [solution.input_ids[position]])
    assert len(margins) == result.heldout.num_pairs
    share = sum(margin > 0 for margin in margins) / len(margins)
    assert share == pytest.approx(result.heldout.verifier, abs=1 / len(margins))  # but for a tie that rounding makes


def test_a_saved_verifier_steers_as_the_trained_one(learned):
    kind, directory, result = learned
    model = tiny.causal_lm("llama")
    options = {"beta": 5.0, "max_new_tokens": 12, "ignore_eos": True, "trace": True, "backend": "reference"}
    (expected,) = llm2_fast.generate(model, result.verifier, [5, 6], **options)
    (actual,) = llm2_fast.generate(model, Verifier.from_pretrained(directory), [5, 6], **options)
    assert result.verifier.kind == kind
    assert actual.samples[0].trace == expected.samples[0].trace
    assert any(step.scores for step in actual.samples[0].trace)
    assert actual.stats.interventions > 0


def test_checkpoints_are_those_of_the_libraries(learned):
    kind, directory, _ = learned
    model = tiny.causal_lm("llama")
    if kind == "head":
        assert sorted(path.name for path in directory.iterdir()) == [
            "config.json",
            "model.safetensors",
            "training.json",
        ]
        return
    assert not [path for suffix in ("*.bin", "*.pt", "*.pth") for path in directory.glob(suffix)]  # no pickles
    if kind == "full":
        classifier = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        assert type(classifier).__module__.startswith("transformers.")
        assert classifier.config.architectures == ["LlamaForSequenceClassification"]
        assert classifier.config.use_cache
    else:
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "LlamaForCausalLM"
        inner = AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=1))
        inner.base_model.load_state_dict(model.base_model.state_dict())
        classifier = PeftModel.from_pretrained(inner, directory).eval()
    session = Verifier.from_pretrained(directory, None if kind == "full" else model).session()
    candidates = [RING[0], RING[1], 2]
    ((scores, _),) = session.score([session.add([5, 6, 7])], [candidates])
    score = oracle.classifier_score(classifier)
    expected = torch.tensor([score([5, 6, 7], candidate) for candidate in candidates])
    torch.testing.assert_close(scores, expected, **TOLERANCES["verifier.score", torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_learning_from_problems(kind, tmp_path):
    def run(name, **options):
        return train(problems(30), kind, heldout=problems(10, seed=1), output_dir=tmp_path / name, **options)

    rate = {"head": 0.05, "lora": 1e-2, "full": 3e-3}[kind]
    every = run("every", epochs=5, learning_rate=rate, plausible_only=False)
    assert every.heldout.num_pairs > 100
    assert every.heldout.verifier > 0.6  # at most 7/8: one negative in eight is itself a word of the solutions
    # A random model finds few of the solutions' words plausible.
    assert 0 < run("plausible").num_pairs < every.num_pairs


@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats_with_the_seed_and_leaves_the_rest_alone(kind, tmp_path):
    model = tiny.causal_lm("llama").requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modules, state = str(model), torch.get_rng_state()
    few = {"epochs": 1, "batch_size": 4, "tokenizer": TOKENIZER, "heldout": HELDOUT[:4]}
    data = supervision(8, seed=0)

    def weights(run, seed):
        result = llm2_fast.train_verifier(model, data, kind, seed=seed, output_dir=tmp_path / run, **few)
        files = {"lora": "adapter_model.safetensors"}
        assert result.num_pairs == 8 * 18
        return load_file(tmp_path / run / files.get(kind, "model.safetensors"))

    first, again, other = weights("first", 1), weights("again", 1), weights("other", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert str(model) == modules
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_a_full_verifier_may_start_from_another_network(tmp_path):
    small = tiny.causal_lm("qwen3", seed=4, num_hidden_layers=2)
    result = train(supervision(8, seed=0), "full", init=small, output_dir=tmp_path / "run", learning_rate=1e-9)
    assert result.verifier.network.config.model_type == "qwen3"
    for name, parameter in small.base_model.named_parameters():
        torch.testing.assert_close(result.verifier.network.get_parameter(name), parameter, rtol=0, atol=1e-7)
    options = {"max_new_tokens": 4, "backend": "reference"}
    assert llm2_fast.generate(tiny.causal_lm("llama"), tmp_path / "run", [5, 6], **options)


# --- refusals and warnings --------------------------------------------------------------------------------------------


def test_a_verifier_that_learned_nothing_is_called_so():
    with pytest.warns(UserWarning, match="no better than chance"):
        train(problems(4), heldout=problems(6, seed=1), learning_rate=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tree"}, "kind: expected 'head' or 'lora' or 'full', got 'tree'"),
        ({"alpha": 0}, "alpha: expected a number > 0 and <= 1, got 0"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"learning_rate": 0}, "learning_rate: expected a number > 0, got 0"),
        (
            {"learning_rate": 1e30, "epochs": 4, "kind": "full"},
            "learning_rate: expected a rate at which the loss stays finite",
        ),
        ({"seed": 2**32}, "seed: expected an integer >= 0 and <= 4.29497e"),
        ({"bf16": 1, "kind": "full"}, "bf16: expected True or False or None, got 1"),
        ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
        ({"mlp_size": 4, "kind": "full"}, "mlp_size: expected an option of kind 'head' only, got kind 'full'"),
        ({"lora_rank": 4}, "lora_rank: expected an option of kind 'lora' only, got kind 'head'"),
        ({"save_steps": 4}, "save_steps: expected an option of kind 'lora' or 'full' only, got kind 'head'"),
        ({"heldout": 1.5}, "heldout: expected a number > 0 and <= 1, got 1.5"),
        ({"heldout": True}, "heldout: expected examples, or a share of the supervision"),
        ({"heldout": []}, "heldout: expected at least one example, got none"),
        ({"heldout": 0.9}, "supervision: expected more examples than are held out, got 4, 4 held out"),
        ({"tokenizer": None}, "tokenizer: expected a tokenizer, since the model came without one, got None"),
        ({"layers": (7,)}, r"layers: expected -1 \(the final norm\) or 0 to 1, got \(7,\)"),
        ({"layers": "1"}, "layers: expected a sequence of integers, got 1"),
        ({"max_length": 4}, "supervision: expected an example with pairs within 4 tokens, got none"),
        ({"kind": "lora", "output_dir": None}, "output_dir: expected a directory for the checkpoints of a 'lora'"),
        ({"resume": True, "output_dir": None}, "output_dir: expected the directory of the run to resume, got None"),
        ({"init": "x"}, "init: expected None for kind 'head', which stands on the LLM itself, got 'x'"),
        ({"trainer_options": {"fsdp": "x"}}, "trainer_options: expected none for a head"),
        (
            {"kind": "full", "trainer_options": {"learning_rate": 1}},
            "trainer_options: expected options that train_verifier has no argument for, got learning_rate",
        ),
        (
            {"kind": "full", "trainer_options": {"no_such": 1}},
            "trainer_options: expected options of transformers.Train",
        ),
        ({"kind": "full", "batch_size": 8}, "batch_size: expected at least two steps with 4 solutions, got 8"),
        ({"kind": "full", "batch_size": 6}, r"batch_size: expected a multiple of 4, which 1 process\(es\) compute"),
    ],
)
def test_bad_training_options(options, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        train(supervision(4, seed=0), **{"output_dir": tmp_path / "run", **options})


def bad_supervision(**changes):
    """Supervision whose second example is not right."""
    examples = supervision(3, seed=0)
    examples[1] = dataclasses.replace(examples[1], **changes)
    return examples


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((99, 5, 6), r"supervision\[1\].samples\[0\]: expected a position in \[1, 13\), got 99"),
        ((0, 3, 6), r"supervision\[1\].samples\[0\]: expected a position in \[1, 13\), got 0"),
        ((5, 60, 6), r"supervision\[1\].samples\[0\]: expected the solution's token 2\d at position 5, got 60"),
        ((1, None, 61), r"expected two different tokens in \[0, 61\), got \[\d+, 61\]"),
        ((1, None, None), r"expected two different tokens in \[0, 61\), got \[(\d+), \1\]"),
    ],
)
@pytest.mark.parametrize("kind", ["head", "full"])
def test_pairs_that_do_not_fit(kind, pair, message, tmp_path):
    position, positive, negative = pair
    truth = tokenize_messages(supervision(3, seed=0)[1].messages, TOKENIZER)[min(position, 12)]
    given = [truth if token is None else token for token in (positive, negative)]
    data = bad_supervision(samples=[TokenPair(position, *given)])
    with pytest.raises(ArgumentError, match=message):
        train(data, kind, output_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"question": "a"}], r"problems\[0\].answer: expected non-empty text, got None"),
        ([{"messages": [], "samples": []}], r"supervision\[0\].messages: expected a list of messages"),
        ([{"messages": [{"role": "user", "content": "w5"}]}], r"supervision\[0\].samples: expected a list"),
        ([3], r"problems\[0\]: expected an object with question and answer, got int"),
        ([], "supervision: expected at least one example, got none"),
        ("no/such/file.jsonl", "supervision: expected a JSON-lines file, or a directory that exploration wrote"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(ArgumentError, match=message):
        train(source)


def test_a_source_that_is_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match="supervision: expected JSON lines in UTF-8"):
        train(tmp_path / "x.jsonl")


def test_supervision_without_pairs(tmp_path):
    data = [SupervisionExample(entry.messages, []) for entry in supervision(3, seed=0)]
    with pytest.raises(ArgumentError, match="supervision: expected an example with pairs"):
        train(data)
    with pytest.raises(ArgumentError, match="heldout: expected an example with pairs"):
        train(supervision(3, seed=0), heldout=data)
    implausible = [dataclasses.replace(entry, samples=entry.samples[:1]) for entry in supervision(3, seed=0)]
    for kind in ("head", "full"):
        with pytest.raises(ArgumentError, match="its positive plausible with plausible_only"):
            train(implausible, kind, plausible_only=True, alpha=1.0, output_dir=tmp_path / kind)
        assert not (tmp_path / kind).exists()  # so that the next try is not taken for a second run


def manifest(**changes):
    hashes = {"tokenizer_hash": tokenizer_hash(TOKENIZER), "chat_template_hash": chat_template_hash(TOKENIZER)}
    ours = {"model": "tiny", "model_fingerprint": fingerprint(tiny.causal_lm("llama")), **hashes}
    return Manifest(**{**ours, "options": {}, "llm2_fast_version": "0", **changes})


def test_positives_that_the_solution_does_not_contain():
    """As exploration makes them with `positive="best"`; elsewhere they are a mistake."""
    data = supervision(3, seed=0)
    data[1] = dataclasses.replace(data[1], samples=[TokenPair(5, 40, 41), TokenPair(5, 40, 42)])
    with pytest.raises(ArgumentError, match="expected the solution's token"):
        train(Supervision(data, manifest()))
    assert train(Supervision(data, manifest(options={"positive": "best"}))).num_pairs == 2 * 18 + 2


def test_supervision_made_with_something_else():
    data = supervision(8, seed=0)
    train(Supervision(data, manifest()))
    for name in ("tokenizer_hash", "chat_template_hash"):
        with pytest.raises(ArgumentError, match=rf"supervision\.{name}: expected \w+, that of LlamaForCausalLM, got x"):
            train(Supervision(data, manifest(**{name: "x"})))
    with pytest.warns(UserWarning, match="supervision was made with tiny, not with LlamaForCausalLM"):
        train(Supervision(data, manifest(model_fingerprint="x")))


def test_a_network_with_another_tokenizer(tmp_path):
    with pytest.raises(IncompatibleVerifierError, match="expected a vocabulary of 61 tokens, got 67"):
        train(supervision(3, seed=0), "full", init=tiny.causal_lm("llama", vocab_size=67), output_dir=tmp_path / "run")


@pytest.mark.parametrize(("kind", "library"), [("full", "accelerate"), ("lora", "peft")])
def test_missing_libraries(kind, library, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find_spec(name))
    with pytest.raises(MissingDependencyError, match=rf"{library}: pip install 'llm2-fast\[train\]'"):
        train(supervision(3, seed=0), kind, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- problems ---------------------------------------------------------------------------------------------------------


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
