"""Token quality exploration: what is measured, how pairs follow from it, and what it costs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arithmetic
import llm2_fast
import oracle
import tiny
from llm2_fast import ArgumentError, ExplorationConfig, GenerationConfig, explore
from llm2_fast.answers import GoldAnswer
from llm2_fast.backends.cached_decoder import block_bytes
from llm2_fast.cli import main
from llm2_fast.errors import CacheFullError
from llm2_fast.exploration.pairs import Pairs
from llm2_fast.exploration.rollouts import RolloutPool
from llm2_fast.exploration.tally import Tally
from llm2_fast.problems import load_problems
from llm2_fast.store import ShardStore
from llm2_fast.supervision import TokenPair, TokenQuality, check_positions, read_supervision, tokenize_messages
from verifiers import head_verifier

MODEL, TOKENIZER = arithmetic.model(), arithmetic.tokenizer()
PROBLEMS = arithmetic.problems(3)
BACKENDS = ("cpu", "reference")
FEW = {"n": 6, "max_new_tokens": 8, "threshold": 0.25}


@cache
def engine(backend="cpu"):
    return llm2_fast.load(MODEL, tokenizer=TOKENIZER, backend=backend)


def run(path, problems=PROBLEMS, backend="cpu", **options):
    """Examples by id, and the report."""
    report = explore(engine(backend), problems, path, **{**FEW, **options})
    return {example.id: example for example in read_supervision(path).examples}, report


def measured(example):
    """Pair -> quality of everything that was measured."""
    pairs = zip([*example.samples, *example.spared], [*example.quality, *example.spared_quality], strict=True)
    return dict(pairs)


# --- Against brute force -----------------------------------------------------------------------------------------


@cache
def _next_logits(tokens):
    return oracle.model_logits(MODEL)(list(tokens))


def next_logits(tokens):
    """By brute force, once for continuations that begin alike."""
    return _next_logits(tuple(tokens))


@cache
def brute_force(problem, seed, alpha, top_k, n, max_new_tokens):
    """{(position, token): (right, plausible, logprob)}, everything recomputed for every token."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{problem.id}".encode()).digest()[:8], "big")
    sampling = GenerationConfig(temperature=1.0, seed=key, max_new_tokens=max_new_tokens)
    messages = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]
    input_ids = tokenize_messages(messages, TOKENIZER)
    start = len(TOKENIZER(f"user {problem.question} assistant")["input_ids"])
    ends, found = tuple(arithmetic.END_TOKEN_IDS), {}
    for position in range(start, len(input_ids)):
        logits = next_logits(input_ids[:position])
        candidates = oracle.plausible(logits, GenerationConfig(alpha=alpha))
        truth = input_ids[position]
        for token in [token for token in candidates if token != truth][:top_k]:
            right = 0
            for sample in range(n):
                prefix = [*input_ids[:position], token]
                names = {"eos": ends, "sample": sample, "request": position * tiny.VOCAB + token}
                rest = [] if token in ends else oracle.generate(prefix, next_logits, None, sampling, **names)[0]
                complete = [token, *rest][-1] in ends
                text = TOKENIZER.decode([*prefix[start:], *rest], skip_special_tokens=True)
                right += GoldAnswer.parse(problem.answer).is_right(text, complete=complete)
            logprob = logits[token] - torch.logsumexp(torch.tensor(logits), 0).item()
            found[position, token] = (right, truth in candidates, logprob)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_qualities_are_those_of_brute_force(tmp_path, backend):
    options = {"n": 3, "max_new_tokens": 6, "seed": 5, "alpha": 0.2, "top_k": 2}
    # A threshold that no verdict can be known for before the last continuation.
    examples, _ = run(tmp_path, PROBLEMS[:2], backend, **options, threshold=0.01, thresholds=(0.99,), positive="best")
    for problem in load_problems(PROBLEMS[:2]):
        expected = brute_force(problem, **options)
        actual = {
            (pair.position, pair.negative_id): quality for pair, quality in measured(examples[problem.id]).items()
        }
        own = tokenize_messages(examples[problem.id].messages, TOKENIZER)
        actual = {key: quality for key, quality in actual.items() if own[key[0]] != key[1]}
        assert actual.keys() == expected.keys()
        for key, (right, plausible, logprob) in expected.items():
            quality = actual[key]
            assert (quality.right, quality.done, quality.n, quality.plausible) == (right, 3, 3, plausible)
            assert quality.quality == right / 3
            assert quality.logprob == pytest.approx(logprob, abs=1e-3)
    assert len({right for right, *_ in expected.values()}) > 1  # the task is neither trivial nor impossible


# --- Independence of everything else -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch_size", [1, 5])
def test_results_do_not_depend_on_batching_or_company(tmp_path, max_batch_size):
    together, _ = run(tmp_path / "together", max_batch_size=64)
    smaller, _ = run(tmp_path / "smaller", max_batch_size=max_batch_size)
    alone, _ = run(tmp_path / "alone", PROBLEMS[1:2])
    reversed_, _ = run(tmp_path / "reversed", PROBLEMS[::-1])
    assert together == smaller == reversed_
    assert alone.items() < together.items()


def test_backends_agree(tmp_path):
    (cpu, _), (reference, _) = (run(tmp_path / backend, PROBLEMS[:2], backend) for backend in BACKENDS)
    for example_id, example in cpu.items():
        other = reference[example_id]
        assert (example.samples, example.spared) == (other.samples, other.spared)
        for mine, theirs in zip(example.quality, other.quality, strict=True):
            assert dataclasses.replace(mine, logprob=0) == dataclasses.replace(theirs, logprob=0)


def test_the_seed_decides(tmp_path):
    first, again, other = (run(tmp_path / str(i), seed=seed)[0] for i, seed in enumerate((1, 1, 2)))
    assert first == again != other


# --- Stopping early ----------------------------------------------------------------------------------------------


@given(
    outcomes=st.lists(st.booleans(), min_size=1, max_size=24),
    thresholds=st.lists(st.floats(-0.5, 1.5) | st.integers(0, 24).map(lambda i: i / 24), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_decided_tally_has_the_verdict_of_all_outcomes(outcomes, thresholds, data):
    n = len(outcomes)
    tally = Tally(n, tuple(thresholds))
    order = []
    while not tally.decided:
        # As the pool does: no more under way than needed, finishing in any order.
        launched = range(tally.done, tally.done + tally.needed)
        pending = [index for index in launched if index not in order]
        index = data.draw(st.sampled_from(pending))
        order.append(index)
        tally.add(index, float(outcomes[index]))
    assert sorted(order) == list(range(tally.done))  # none in vain
    quality = TokenQuality(
        None if tally.done == 0 else tally.total / tally.done, round(tally.total), tally.done, n, True, 0.0
    )
    if tally.done:
        for threshold in thresholds:
            assert quality.is_below(threshold) == (sum(outcomes) / n < threshold)


def test_verdicts_are_those_of_all_continuations(tmp_path):
    thresholds = (0.1, 0.5)
    early, saved = run(tmp_path / "early", n=10, threshold=0.3, thresholds=thresholds)
    full, whole = run(tmp_path / "full", n=10, threshold=0.3, negatives_per_position=100, strategy="quality")
    assert whole.spared_rollouts == 0 < saved.spared_rollouts
    assert saved.rollouts < whole.rollouts
    for example_id, example in early.items():
        for threshold in (0.3, *thresholds):
            assert example.with_threshold(threshold).samples == full[example_id].with_threshold(threshold).samples
        everything = measured(full[example_id])
        for pair, quality in measured(example).items():
            assert quality.right <= everything[pair].right
            assert everything[pair].done == 10
    assert any(quality.done < quality.n for example in early.values() for quality in measured(example).values())
    undecided = next(q for example in early.values() for q in measured(example).values() if q.right < q.done < q.n)
    with pytest.raises(ArgumentError, match="threshold: expected one that the exploration decided"):
        undecided.is_below((undecided.right + 0.5) / undecided.n)


# --- Pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_of_a_position(tmp_path):
    examples, report = run(tmp_path)
    assert report.pairs == sum(len(example.samples) for example in examples.values()) > 0
    for example in examples.values():
        input_ids = tokenize_messages(example.messages, TOKENIZER)
        check_positions(example, input_ids, example.id)
        assert [pair.position for pair in example.samples] == sorted(pair.position for pair in example.samples)
        for pair, quality in zip(example.samples, example.quality, strict=True):
            assert quality.is_below(FEW["threshold"])
            assert pair.negative_id != pair.ground_truth_id
        assert not any(quality.is_below(FEW["threshold"]) for quality in example.spared_quality)
    assert report.explored_positions <= report.positions
    assert report.candidates == sum(len(measured(example)) for example in examples.values())


def test_bypass_samples_nothing(tmp_path):
    examples, report = run(tmp_path, bypass=True)
    explored, _ = run(tmp_path / "explored", top_k=31)
    assert (report.rollouts, report.generated_tokens) == (0, 0)
    for example_id, example in examples.items():
        assert sorted(example.samples) == sorted(measured(explored[example_id]))
        assert all((q.quality, q.done, q.n) == (None, 0, 0) for q in example.quality)
        assert example.spared == []
    narrow, _ = run(tmp_path / "narrow", bypass=True, top_k=1)  # every plausible one, whatever top_k
    assert {i: e.samples for i, e in narrow.items()} == {i: e.samples for i, e in examples.items()}
    assert any(len(e.samples) > len({pair.position for pair in e.samples}) for e in narrow.values())


def quality(right, logprob=-1.0):
    return TokenQuality(right / 10, right, 10, 10, True, logprob)


@pytest.mark.parametrize(
    ("own", "positive", "samples", "spared"),
    [
        (9, 7, [5, 6], [7]),  # its own token is the best
        (8, 7, [5, 6], [7]),  # as good as the best other
        (6, 8, [5, 6], [7, 8]),  # another is better
        (4, 8, [5, 6, 7], [8]),  # and its own leads astray
    ],
)
def test_the_best_token_as_the_positive(own, positive, samples, spared):
    tokens = {5: quality(2), 6: quality(4), 7: quality(own), 8: quality(8)}
    pairs = Pairs()
    pairs.add(3, 7, tokens, ExplorationConfig(positive="best"), "seed")
    assert pairs.samples == [TokenPair(3, positive, token) for token in samples]
    assert [pair.negative_id for pair in pairs.spared] == sorted({5, 6, 7, 8} - set(samples))


@pytest.mark.parametrize(
    ("strategy", "weights"),
    [("uniform", [1, 1, 1]), ("base", [0.5, 0.3, 0.1]), ("quality", [1.0, 0.8, 0.6])],
)
def test_negatives_are_drawn_by_the_strategy(strategy, weights):
    tokens = {5: quality(0, math.log(0.5)), 6: quality(2, math.log(0.3)), 7: quality(4, math.log(0.1))}
    config = ExplorationConfig(strategy=strategy, negatives_per_position=1)
    draws = 4000
    pairs = Pairs()
    for position in range(draws):
        pairs.add(position, 9, tokens, config, "seed")
    assert len(pairs.samples) == draws
    for token, weight in zip(tokens, weights, strict=True):
        share = sum(pair.negative_id == token for pair in pairs.samples) / draws
        assert share == pytest.approx(weight / sum(weights), abs=0.03)  # four standard deviations
    both = Pairs()
    both.add(3, 9, tokens, config.merge(negatives_per_position=2), "seed")
    assert len({pair.negative_id for pair in both.samples}) == 2


def test_positions_are_bounded(tmp_path):
    every, _ = run(tmp_path / "every")
    examples, report = run(tmp_path / "bounded", max_positions=2)
    assert report.explored_positions == 2 * len(PROBLEMS)
    for example_id, example in examples.items():
        assert len({pair.position for pair in measured(example)}) == 2
        assert measured(example).items() <= measured(every[example_id]).items()


# --- Quality -------------------------------------------------------------------------------------------------------


def test_a_quality_of_ones_own(tmp_path):
    seen = []

    def length(problem, text):
        assert problem in load_problems(PROBLEMS)
        seen.append(text)
        return float(len(text.split()))

    examples, report = run(tmp_path, quality=length, threshold=12.0)
    assert report.spared_rollouts == 0
    assert len(seen) >= report.rollouts
    for example in examples.values():
        solution = example.messages[1]["content"].split()
        for pair, measure in measured(example).items():
            assert (measure.right, measure.done) == (None, FEW["n"])
            assert 0 < measure.quality <= len(solution) + FEW["max_new_tokens"] + 1
            assert (pair in example.samples) == (measure.quality < 12.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_likelihood_of_the_gold_answer(tmp_path, backend):
    options = {"n": 1, "max_new_tokens": 5, "max_positions": 4, "seed": 3}
    examples, _ = run(tmp_path / "a", PROBLEMS[:1], backend, quality="likelihood", threshold=-2.0, **options)
    texts = []
    run(tmp_path / "b", PROBLEMS[:1], "cpu", quality=lambda _, text: texts.append(text) or 0.0, **options)
    (example,) = examples.values()
    prompt = TOKENIZER(f"user {PROBLEMS[0]['question']} assistant")["input_ids"]
    gold = GoldAnswer.parse(PROBLEMS[0]["answer"]).text
    expected = []
    for text in texts:
        marker = next((m for m in ("#### ", "answer is ") if m in text and text.split(m)[-1].strip()), None)
        before = text[: text.rindex(marker) + len(marker)] if marker else f"{text} The answer is "
        tokens = [*prompt, *TOKENIZER(before)["input_ids"]]
        expected.append(torch.tensor(next_logits(tokens)).log_softmax(0)[TOKENIZER(gold)["input_ids"][0]].item())
    actual = [measure.quality for measure in measured(example).values()]
    assert sorted(actual) == pytest.approx(sorted(expected), abs=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_quality_that_is_no_number_skips_the_problem(tmp_path, value):
    examples, report = run(tmp_path, PROBLEMS[:1], quality=lambda *_: value)
    assert report.skipped == {"a quality is not finite": 1}
    assert all(example.samples == [] for example in examples.values())


# --- Solutions -----------------------------------------------------------------------------------------------------


def test_problems_without_a_solution_use_the_models_own(tmp_path):
    problems = arithmetic.problems(4, solutions=False)
    examples, report = run(tmp_path, problems, attempts=6, max_positions=2)
    solved = [example for example in examples.values() if example.skipped is None]
    assert 0 < len(solved) < len(problems)
    assert report.skipped == {"none of the model's own samples is right": len(problems) - len(solved)}
    for problem in load_problems(problems):
        example = examples[problem.id]
        if example.skipped is None:
            assert problem.gold.is_right(example.messages[1]["content"])
            check_positions(example, tokenize_messages(example.messages, TOKENIZER), "example")
        else:
            assert (len(example.messages), example.samples) == (1, [])
    # The reference can be left aside, too.
    own, _ = run(tmp_path / "own", PROBLEMS, solutions="model", attempts=50, max_positions=1)
    references = {problem.solution for problem in load_problems(PROBLEMS)}
    assert all(example.messages[-1]["content"] not in references for example in own.values())


def test_what_does_not_fit_is_skipped(tmp_path):
    long = {"question": " ".join(["1"] * 90), "answer": "1 + 1 = 2\n#### 2"}
    examples, report = run(tmp_path, [long, PROBLEMS[0]])
    assert report.skipped == {"longer than the model's context": 1}
    assert sorted(bool(example.samples) for example in examples.values()) == [False, True]


def test_continuations_end_with_the_context(tmp_path):
    question = " ".join(["1"] * (96 - 12))  # the solution's last tokens are the last of the context
    examples, _ = run(tmp_path, [{"question": question, "answer": PROBLEMS[0]["answer"]}], max_new_tokens=50)
    (example,) = examples.values()
    assert len(tokenize_messages(example.messages, TOKENIZER)) == 96
    assert max(pair.position for pair in measured(example)) == 95


def test_duplicates_are_explored_once(tmp_path):
    examples, report = run(tmp_path, [*PROBLEMS[:1] * 3])
    assert len(examples) == report.problems == 1


def test_broken_logits_skip_the_problem(tmp_path):
    model = arithmetic.model()
    word = arithmetic.NUMBERS[-1]
    model.model.embed_tokens.weight.data[arithmetic.VOCABULARY.index(word)] = math.nan
    broken = llm2_fast.load(model, tokenizer=TOKENIZER)
    problem = {"question": f"{word} + 1", "answer": "1 + 1 = 2\n#### 2"}
    report = explore(broken, [problem], tmp_path, **FEW)
    assert report.skipped == {"the model's logits are not finite": 1}


# --- Cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefixes_are_computed_once_and_everything_is_given_back(tmp_path, backend):
    built = llm2_fast.load(arithmetic.model(), tokenizer=TOKENIZER, backend=backend)
    report = explore(built, PROBLEMS[:1], tmp_path, **FEW)
    (example,) = read_supervision(tmp_path).examples
    tokens = tokenize_messages(example.messages, TOKENIZER)
    # The solution once, and once more for the logits at its positions.
    assert report.prefilled_tokens == len(tokens) + report.positions
    assert report.shared_tokens > report.rollouts * (len(tokens) - report.positions)
    assert report.tokens_per_second > 0
    backend = built._backend
    assert (
        backend._llm.lengths == {}
        if built.backend == "cpu"
        else len(backend._cache._free) == len(backend._cache.lengths)
    )


@pytest.mark.parametrize("quality", ["answer", "likelihood"])
@pytest.mark.parametrize("endless", [False, True])
def test_a_small_cache_changes_nothing(tmp_path, quality, endless, monkeypatch):
    # Continuations that need more blocks while they run, two in all or three.
    options = {**FEW, "max_new_tokens": 30, "quality": quality}
    if quality == "likelihood":
        options |= {"threshold": -2.0, "n": 2}
    if endless:
        options |= {"max_new_tokens": 75, "n": 2, "max_positions": 2}
    model = tiny.causal_lm("llama") if endless else MODEL

    def results(name, **load_options):
        built = llm2_fast.load(model, tokenizer=TOKENIZER, backend="cpu", **load_options)
        report = explore(built, PROBLEMS, tmp_path / name, **options)
        assert built._backend._llm.lengths == {}
        counts = (report.problems, report.pairs, report.candidates, report.positions, report.explored_positions)
        return {example.id: example for example in read_supervision(tmp_path / name).examples}, counts

    called = {"_resume": 0, "_postpone": 0}
    for name, original in [(name, getattr(RolloutPool, name)) for name in called]:

        def count(self, argument, name=name, original=original):
            called[name] += 1
            original(self, argument)

        monkeypatch.setattr(RolloutPool, name, count)
    expected = results("roomy")
    assert not any(called.values())
    for num_blocks in (4 if quality == "answer" else 5, 7, 9, 13):
        block = block_bytes(engine()._backend._llm.spec)
        assert results(str(num_blocks), kv_cache_memory_bytes=num_blocks * block) == expected
    assert called["_resume"]
    assert called["_postpone"] or not endless or quality == "likelihood"
    with pytest.raises(CacheFullError):
        results("too small", kv_cache_memory_bytes=2 * block)


def test_everything_is_given_back_after_an_error(tmp_path):
    built = llm2_fast.load(arithmetic.model(), tokenizer=TOKENIZER, backend="cpu")

    def fail(problem, text):
        raise RuntimeError("quality failed")

    with pytest.raises(RuntimeError, match="quality failed"):
        explore(built, PROBLEMS, tmp_path, quality=fail, **FEW)
    assert built._backend._llm.lengths == {}
    assert built.generate("1 + 1 =", max_new_tokens=2)[0].samples[0].token_ids


def test_a_full_disk_leaves_the_engine_usable(tmp_path, monkeypatch):
    def full(self, example):
        raise OSError("no space left on device")

    monkeypatch.setattr(ShardStore, "append", full)
    built = llm2_fast.load(MODEL, tokenizer=TOKENIZER, backend="cpu")
    with pytest.raises(OSError, match="no space left") as error:
        explore(built, PROBLEMS, tmp_path, **FEW)
    assert error.tb is not None  # while the error is still around
    assert built._backend._llm.lengths == {}
    assert built.generate("1 + 1 =", max_new_tokens=2)[0].samples[0].token_ids


# --- Command line --------------------------------------------------------------------------------------------------


def test_the_command_line_explores(tmp_path, capsys):
    MODEL.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    arguments = ["explore", str(tmp_path / "model"), str(tmp_path / "problems.jsonl")]
    options = ["--n=6", "--max-new-tokens=8", "--threshold=0.25", "--thresholds=0.5", "--max-batch-size=16"]
    assert main([*arguments, str(tmp_path / "out"), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected, same = run(tmp_path / "expected", thresholds=(0.5,))
    assert {example.id: example for example in read_supervision(tmp_path / "out").examples} == expected
    assert (report["problems"], report["rollouts"]) == (same.problems, same.rollouts)
    assert main([*arguments, str(tmp_path / "out"), *options]) == 0
    assert "0 explored, 3 there already" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "out"), "--n=7"]) == 2
    assert "expected results of the same model and options" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out"), "--quality=beauty"]) == 2
    assert "invalid choice: 'beauty'" in capsys.readouterr().err


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha: expected a number > 0 and <= 1"),
        ({"top_k": 0}, "top_k: expected an integer >= 1"),
        ({"n": 0}, "n: expected"),
        ({"temperature": 0}, "temperature: expected a number > 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"bypass": 1}, "bypass: expected True or False"),
        ({"quality": "beauty"}, "quality: expected one of 'answer', 'likelihood'"),
        ({"quality": "likelihood"}, "threshold: expected thresholds of at most 0"),
        ({"quality": "likelihood", "threshold": -1.0, "thresholds": (0.5,)}, "threshold: expected thresholds of at"),
        ({"positive": "worst"}, "positive: expected one of"),
        ({"thresholds": 0.5}, "thresholds: expected a sequence"),
        ({"threshold": math.nan}, "threshold: expected a number"),
        ({"negatives_per_position": 0}, "negatives_per_position: expected"),
        ({"bypass": True, "positive": "best"}, "bypass: expected positive="),
        ({"thresold": 0.5}, "did you mean 'threshold'"),
        ({"max_batch_size": 0}, "max_batch_size: expected"),
        ({"config": 5}, "config: expected an ExplorationConfig"),
        ({"problems": []}, "problems: expected at least one"),
        ({"problems": [{"question": "q", "answer": r"\boxed{}"}]}, "answer: expected a final answer"),
        ({"load_options": {"dtype": "float32"}}, "load_options: expected none"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_done(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        explore(engine(), **{"problems": PROBLEMS, "output_dir": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_unusable_models_are_refused(tmp_path):
    model = arithmetic.model()
    no_template = arithmetic.tokenizer()
    no_template.chat_template = None
    for built, message in [
        (llm2_fast.load(model, head_verifier(model), tokenizer=TOKENIZER), "an engine without a verifier"),
        (llm2_fast.load(model), "got no tokenizer"),
        (llm2_fast.load(model, tokenizer=no_template), "got no chat template"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            explore(built, PROBLEMS, tmp_path / "out")
