"""Evaluation: what is decoded and judged, what is compared with what, and what survives an interruption."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
from functools import cache

import pytest

import arithmetic
import llm2_fast
import tiny
from llm2_fast import ArgumentError, GenerationConfig, evaluate
from llm2_fast.cli import main
from llm2_fast.evaluation.arms import Arm, make_arms
from llm2_fast.evaluation.findings import COSTLY, MIN_PROBLEMS, find_failures
from llm2_fast.evaluation.grade import count_votes, grade, score_margins
from llm2_fast.evaluation.markdown import error_notes, to_markdown
from llm2_fast.evaluation.plots import plot_quality, plot_report
from llm2_fast.evaluation.prompts import make_prompt
from llm2_fast.evaluation.record import Record, SampleRecord
from llm2_fast.evaluation.report import EvaluationReport, summarize
from llm2_fast.evaluation.rerank import Reranker
from llm2_fast.problems import Problem, load_problems
from llm2_fast.results import Generation, Sample, TraceStep
from llm2_fast.store import ShardStore
from llm2_fast.supervision import Supervision, SupervisionExample, TokenPair, TokenQuality, write_supervision
from recipes.report import write_report
from recipes.stages import Stages
from tolerances import TOLERANCES
from verifiers import KINDS, case, head_verifier, lora_case

MODEL, TOKENIZER = arithmetic.model(), arithmetic.tokenizer()
PROBLEMS = arithmetic.problems(10)
CACHE_BYTES = 2**24
GREEDY = {"max_new_tokens": 10, "beta": 3.0}
SAMPLED = {**GREEDY, "temperature": 1.0, "n": 4, "seed": 5}


@cache
def engine(backend="cpu", verified=True):
    return make_engine(head_verifier(MODEL) if verified else None, backend)


def make_engine(verifier, backend="cpu"):
    memory = CACHE_BYTES if backend == "cpu" else None
    return llm2_fast.load(MODEL, verifier, tokenizer=TOKENIZER, backend=backend, kv_cache_memory_bytes=memory)


def read(path):
    """Records by id."""
    lines = [line for file in sorted(path.glob("shard-*.jsonl")) for line in file.read_text().splitlines()]
    records = [Record.from_json(line, "line") for line in lines]
    assert len({record.id for record in records}) == len(records)
    return {record.id: record for record in records}


def without_times(records):
    return {id: dataclasses.replace(record, seconds=0.0, rerank_seconds=0.0) for id, record in records.items()}


# --- Arms and prompts --------------------------------------------------------------------------------------------


def test_arms_of_greedy_decoding():
    config = GenerationConfig()
    arms = make_arms(config, {"beta": [0.0, 0.25, 1.0], "alpha": [0.1, 0.3]}, verified=True)
    assert [(arm.name, arm.baseline) for arm in arms] == [
        ("plain", None),
        ("verified", "plain"),
        ("verified, beta 0.0", "plain"),
        ("verified, alpha 0.3, beta 0.0", "plain"),
        ("verified, alpha 0.3", "plain"),
        ("verified, beta 1.0", "plain"),
        ("verified, alpha 0.3, beta 1.0", "plain"),
    ]
    assert len({arm.key for arm in arms}) == len(arms)


def test_sampled_arms_are_compared_with_their_own_truncation():
    config = GenerationConfig(temperature=0.7)
    arms = make_arms(config, {"beta": [0, 1], "alpha": [0.3]}, verified=True)
    assert [(arm.name, arm.baseline, arm.config.beta) for arm in arms] == [
        ("plain", None, 0.25),
        ("truncated", "plain", 0.0),
        ("truncated, alpha 0.3", "plain", 0.0),
        ("verified", "truncated", 0.25),
        ("verified, alpha 0.3, beta 1", "truncated, alpha 0.3", 1),
    ]


def test_top_k_is_swept_with_a_truncation_of_each():
    arms = make_arms(GenerationConfig(temperature=1.0), {"candidate_top_k": [1, 4], "beta": [0.5]}, verified=True)
    assert [(arm.name, arm.baseline, arm.settings.get("candidate_top_k")) for arm in arms] == [
        ("plain", None, None),
        ("truncated", "plain", None),
        ("truncated, candidate_top_k 1", "plain", 1),
        ("truncated, candidate_top_k 4", "plain", 4),
        ("verified", "truncated", None),
        ("verified, beta 0.5, candidate_top_k 1", "truncated, candidate_top_k 1", 1),
        ("verified, beta 0.5, candidate_top_k 4", "truncated, candidate_top_k 4", 4),
    ]


def test_keys_do_not_depend_on_how_a_number_is_written_or_what_else_is_swept():
    one, other = (Arm("verified", GenerationConfig(beta=beta), "plain").key for beta in (1, 1.0))
    assert one == other == "alpha=0.1 beta=1 candidate_top_k=None max_candidates=32"
    assert make_arms(GenerationConfig(), {}, verified=False)[0].key == "plain"


@pytest.mark.parametrize(
    ("config", "sweep", "verified", "message"),
    [
        ({}, {"temperature": [1.0]}, True, "sweep: expected one of alpha, beta, candidate_top_k"),
        ({}, {"beta": []}, True, "sweep\\['beta'\\]: expected at least one value"),
        ({}, {"beta": 0.5}, True, "sweep\\['beta'\\]: expected at least one value"),
        ({}, {"alpha": [2.0]}, True, "alpha: expected a number"),
        ({}, {"candidate_top_k": [33]}, True, "candidate_top_k: expected at most max_candidates = 32"),
        ({}, {"beta": [0.5]}, False, "sweep: expected nothing"),
        ({"beta": 0}, {}, True, "beta: expected > 0"),
    ],
)
def test_unusable_arms(config, sweep, verified, message):
    with pytest.raises(ArgumentError, match=message):
        make_arms(GenerationConfig(**config), sweep, verified=verified)


def test_prompts():
    problem = Problem(" How many? ", "7")
    assert make_prompt(problem, []) == [{"role": "user", "content": " How many? "}]
    examples = [
        Problem("1 + 1?", "One and one <<1+1=2>>make two.\n#### 2"),
        Problem("2 + 2?", "4"),
        Problem("1/2 * 1?", r"It is $\boxed{\frac{1}{2}}$."),
    ]
    assert make_prompt(problem, examples) == (
        "Question: 1 + 1?\nAnswer: One and one make two. So the answer is 2.\n\n"
        "Question: 2 + 2?\nAnswer: So the answer is 4.\n\n"
        "Question: 1/2 * 1?\nAnswer: It is $\\boxed{\\frac{1}{2}}$. So the answer is \\frac{1}{2}.\n\n"
        "Question: How many?\nAnswer:"
    )


# --- Grading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "votes"),
    [
        ([], []),
        (["7", "7.0", "8", "$7", None, "1,000", "apples", "1000"], [0, 0, 2, 0, None, 5, None, 5]),
    ],
)
def test_votes_for_numbers(answers, votes):
    assert count_votes(answers, "number") == votes


def test_votes_for_expressions():
    pytest.importorskip("math_verify")
    assert count_votes([r"\frac{1}{2}", "0.5", "x", "0.25", "x"], "math") == [0, 0, 2, 3, 2]
    assert count_votes(["3 + 4 = 7", "7"], "math") == count_votes(["7", "3 + 4 = 7"], "math") == [0, 0]


def step(scores, token=0):
    ids = tuple(range(len(scores or (1,))))
    return TraceStep(ids, (-1.0,) * len(ids), scores, (0.0,) * len(ids), 0, token)


def test_margins():
    samples = [Sample(trace=[step((1.0, 3.0, 2.52)), step(None), step((0.04, 0.0))]), Sample(trace=None)]
    assert score_margins(samples) == {"0.0": 1, "0.5": 1}


def test_grade():
    texts = ["#### 3", "The answer is 3.", "1 + 2 = 3", "#### 4", "nothing", ""]
    reasons = ["error", "eos", "length", "length", "stop", "error"]
    samples = [
        Sample([5, 6], text, reason, "broken" if reason == "error" else None)
        for text, reason in zip(texts, reasons, strict=True)
    ]
    problem, (plain, verified) = Problem("1 + 2", "#### 3"), make_arms(GenerationConfig(), {}, verified=True)
    record = grade(problem, plain, Generation([1], samples), 2.0)
    assert [(s.answer, s.right, s.vote) for s in record.samples] == [
        (None, False, None),  # an error: what it says is no answer
        ("3", True, 1),
        (None, False, None),  # cut off before an answer was stated
        ("4", False, 3),
        (None, False, None),
        (None, False, None),
    ]
    assert [s.error for s in record.samples] == ["broken", None, None, None, None, "broken"]
    assert [s.token_ids for s in record.samples] == [[5, 6]] * 6
    assert [s.token_ids for s in grade(problem, verified, Generation([1], samples), 2.0).samples] == [None] * 6
    assert Record.from_json(record.to_json(), "line") == record
    with pytest.raises(ArgumentError, match="line: expected a record of an evaluation"):
        Record.from_json("{}", "line")


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_scored_as_by_brute_force(kind):
    model, verifier, score = vars(case("llama", kind)).values()
    built = llm2_fast.load(model, verifier, backend="reference")
    (generation,) = llm2_fast.load(model, backend="reference").generate(
        [tiny.PROMPTS[0]], n=3, temperature=1.0, max_new_tokens=5
    )
    expected = []
    for sample in generation.samples:
        prefixes = [tiny.PROMPTS[0] + sample.token_ids[:i] for i in range(len(sample.token_ids))]
        expected.append(sum(score(p, token) for p, token in zip(prefixes, sample.token_ids, strict=True)))
    tolerance = TOLERANCES["verifier.score", built.model.model.dtype]
    assert Reranker(built).scores(generation) == pytest.approx(expected, rel=tolerance["rtol"], abs=1e-3)
    generation.samples[1].token_ids.append(tiny.VOCAB)
    scores = Reranker(built).scores(generation)
    assert scores[1] is None
    assert None not in (scores[0], scores[2])


def test_samples_that_are_empty_or_broken_are_not_chosen():
    reranker = Reranker(engine())
    (generation,) = engine(verified=False).generate("1 + 2 =", max_new_tokens=3)
    (sample,), (score,) = generation.samples, reranker.scores(generation)
    assert score is not None
    empty, broken = Sample([], "", "error", "out of memory"), Sample(sample.token_ids, "1", "error", "out of memory")
    samples = [empty, sample, broken, Sample([], "", "eos")]
    mixed = reranker.scores(Generation(generation.prompt_token_ids, samples))
    assert mixed == [None, pytest.approx(score), None, None]
    assert reranker.scores(Generation(generation.prompt_token_ids, [empty, empty])) == [None, None]


# --- Reports of made-up records ----------------------------------------------------------------------------------


def record(number, arm, right, *, votes=None, scores=None, seconds=1.0, ambiguous=5):
    """A record with ten tokens and steps per sample."""
    samples = [
        SampleRecord("text", "1", r, votes[i] if votes else int(not r), 10, "eos", scores[i] if scores else None)
        for i, r in enumerate(right)
    ]
    steps = 10 * len(right)
    return Record(f"{number:016x}", arm.key, samples, steps, ambiguous * len(right), 1, 0, steps, 7, {}, seconds)


def greedy_report(plain, verified, **steered):
    """Of problems that each arm has right or not."""
    arms = make_arms(GenerationConfig(), {}, verified=True)
    records = {
        arms[0].key: [record(i, arms[0], [right], ambiguous=0) for i, right in enumerate(plain)],
        arms[1].key: [record(i, arms[1], [right], **steered) for i, right in enumerate(verified)],
    }
    return summarize(arms, records, seed=0)


def test_figures_of_greedy_arms():
    report = greedy_report([True] * 20 + [False] * 20, [True] * 18 + [False] * 2 + [True] * 12 + [False] * 8)
    assert report.arm("plain").metrics["pass@1"].mean == 0.5
    assert report.arm("verified").metrics["pass@1"].mean == 0.75
    assert list(report.arm("verified").metrics) == ["pass@1"]
    comparison = report.comparison("verified", "plain")
    assert (comparison.wins, comparison.losses) == (12, 2)
    assert comparison.difference.mean == pytest.approx(0.25)
    assert comparison.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert 0 < comparison.difference.low < 0.25 < comparison.difference.high
    assert comparison.significance == 1
    arm = report.arm("verified")
    assert (arm.tokens, arm.seconds, arm.ambiguous_share, arm.mean_candidates) == (400, 40.0, 0.5, 1.0)
    assert find_failures(report) == []
    assert "No sign of a failing verifier.\n" in to_markdown(report)


def test_figures_of_sampled_arms():
    arms = make_arms(GenerationConfig(temperature=1.0), {}, verified=True)
    plain, truncated, verified = arms
    first = [True, False, False, False]
    records = {
        # By vote 1 is chosen in the first problem, by score 0; in the second all are wrong.
        plain.key: [
            record(0, plain, first, votes=[0, 1, 1, None], scores=[2.0, 1.0, None, 0.0]),
            record(1, plain, [False] * 4, votes=[None] * 4, scores=[None] * 4),
        ],
        truncated.key: [record(0, truncated, [True, True, False, False]), record(1, truncated, [False] * 4)],
        verified.key: [record(0, verified, [True] * 4), record(1, verified, [True, False, False, False])],
    }
    report = summarize(arms, records, seed=0)
    means = {metric: estimate.mean for metric, estimate in report.arm("plain").metrics.items()}
    # pairs (0, 1) and (2, 3): a tie that the first wins, and one vote; by score 0 and 3
    assert means == pytest.approx(
        {"pass@1": 0.125, "pass@2": 0.25, "pass@4": 0.5, "maj@2": 0.25, "maj@4": 0.0, "best@2": 0.25, "best@4": 0.5}
    )
    assert "best@4" not in report.arm("verified").metrics
    compared = [(c.arm, c.metric, c.other, c.other_metric) for c in report.comparisons]
    assert compared == [
        ("truncated", "pass@1", "plain", "pass@1"),
        ("truncated", "maj@4", "plain", "maj@4"),
        ("verified", "pass@1", "truncated", "pass@1"),
        ("verified", "pass@1", "plain", "pass@1"),
        ("verified", "maj@4", "truncated", "maj@4"),
        ("verified", "maj@4", "plain", "maj@4"),
        ("verified", "maj@4", "plain", "best@4"),
    ]
    assert report.comparison("verified", "truncated").difference.mean == pytest.approx(0.625 - 0.25)
    assert all(comparison.p_value is None for comparison in report.comparisons)
    assert find_failures(report) == []
    assert "too few for a verdict" in to_markdown(report)


def test_samples_with_errors_are_no_votes_and_are_reported():
    texts = {
        0: [("#### 4", "error"), ("#### 3", "eos"), ("#### 4", "error"), ("nothing", "eos")],  # 3 has the only vote
        1: [("#### 3", "error"), ("#### 3", "error"), ("#### 3", "error"), ("", "error")],
        2: [("#### 3", "eos")] * 4,
    }
    arm, problem = Arm("plain", GenerationConfig(), None), Problem("1 + 2", "#### 3")
    records = []
    for pairs in texts.values():
        samples = [Sample([5], text, reason, "broken" if reason == "error" else None) for text, reason in pairs]
        records.append(grade(problem, arm, Generation([1], samples), 1.0))
    report = summarize([arm], {arm.key: records}, seed=0)
    plain = report.arm("plain")
    assert (plain.errors, plain.failed_problems, plain.unanswered) == (6, 1, 1)
    assert plain.metrics["maj@4"].mean == pytest.approx(2 / 3)
    assert plain.metrics["pass@1"].mean == pytest.approx((1 / 4 + 0 + 1) / 3)
    note = "plain: 6 of 12 samples ended with an error: they count as wrong, not as votes; all samples of 1 problem"
    assert list(error_notes(report)) == [note]
    assert f"\n- {note}\n" in to_markdown(report)
    assert list(error_notes(summarize([arm], {arm.key: records[2:]}, seed=0))) == []


@pytest.mark.parametrize(
    ("plain", "verified", "steered", "expected"),
    [
        ([True] * 15, [False] * 15, {}, ["harmful"]),
        ([True] * 15, [True] * 15, {}, ["no_guidance"]),
        ([False] * 15, [False] * 15, {"seconds": 1.01 * COSTLY}, ["no_guidance", "costly"]),
        ([True] * 15, [False] * 15, {"seconds": 1.01 * COSTLY}, ["harmful", "costly"]),
        ([False] * 15, [True] * 15, {"seconds": 9.0}, []),  # costly, but a gain
        ([False] * 15, [True] * 3 + [False] * 12, {"seconds": 1.0}, []),  # perhaps a gain: p = 0.25
    ],
)
def test_failures_are_told_apart(plain, verified, steered, expected):
    rest = [True, False] * ((MIN_PROBLEMS - 14) // 2)
    report = greedy_report(plain + rest, verified + rest, **steered)
    assert report.num_problems >= MIN_PROBLEMS
    assert [failure.kind for failure in find_failures(report)] == expected


@pytest.mark.parametrize(("ambiguous", "cause"), [(5, "too slow"), (0, "filtered too hard")])
def test_the_cause_of_a_high_cost_is_named(ambiguous, cause):
    outcome = [True, False] * MIN_PROBLEMS
    report = greedy_report(outcome, outcome, seconds=2.0, ambiguous=ambiguous)
    assert cause in find_failures(report)[-1].message
    assert cause in to_markdown(report)


def test_a_gain_of_truncation_is_none_of_the_verifier():
    right = {"plain": 10, "truncated": 30, "verified": 31, "verified, beta 1.0": 31}  # of 40
    report = sampled_report({name: [i < count for i in range(40)] for name, count in right.items()})
    assert report.comparison("truncated", "plain").significance == 1
    assert report.comparison("verified", "plain").significance == 1
    assert report.comparison("verified", "truncated").significance == 0
    assert find_failures(report) == []
    assert "- No sign of a failing verifier, and no significant gain either" in to_markdown(report)
    report = sampled_report({name: [i < count for i in range(40)] for name, count in {**right, "verified": 40}.items()})
    assert "- No sign of a failing verifier.\n" in to_markdown(report)


def test_failures_are_part_of_the_json():
    report = greedy_report([True] * MIN_PROBLEMS, [False] * MIN_PROBLEMS, seconds=2.0)
    old = report.to_json()
    assert "failures" not in old
    assert EvaluationReport.from_json(old).to_json() == old
    entry = dataclasses.replace(report, failures=find_failures(report)).to_json()
    assert [(failure["kind"], failure["arm"]) for failure in entry["failures"]] == [
        ("harmful", "verified"),
        ("costly", "verified"),
    ]
    assert EvaluationReport.from_json(entry).failures == find_failures(report)
    assert EvaluationReport.from_json(entry).to_json() == json.loads(json.dumps(entry)) == entry


def test_a_recipe_reports_harm(tmp_path):
    pytest.importorskip("matplotlib")
    greedy = greedy_report([True] * MIN_PROBLEMS, [False] * MIN_PROBLEMS)
    sampled = sampled_report({name: [name != "verified"] * MIN_PROBLEMS for name in OUTCOMES})
    counts = ("problems", "positions", "explored_positions", "candidates", "rollouts", "spared_rollouts", "pairs")
    pairs = {"training_pairs": 3, "num_pairs": 2, "verifier": 0.5, "system1": 0.5, "combined": 0.5}
    results = {
        "explore": {**dict.fromkeys(counts, 1), "tokens_per_second": 1.0},
        "train head": pairs,
        "betas, head": greedy.to_json(),
        "greedy, head": greedy.to_json(),
        "sampled, head": sampled.to_json(),
    }
    stages = Stages(tmp_path, {})
    for name, result in results.items():
        stages.run(name, lambda result=result: result)
    text = write_report(stages, ["head"])
    assert "\n- greedy, head: harmful: verified is worse than plain decoding: pass@1 -100.0 points" in text
    assert "\n- sampled, head: harmful: verified is worse than plain decoding" in text
    assert "\n- sampled, head: no_guidance: verified, beta 1.0 gives no useful guidance" in text


# --- Whole evaluations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_greedy_arms_are_those_of_the_engines(tmp_path, backend):
    report = evaluate(engine(backend), PROBLEMS, tmp_path, **GREEDY)
    records = read(tmp_path)
    assert [arm.name for arm in report.arms] == ["plain", "verified"]
    for arm, used in zip(report.arms, (engine(backend, verified=False), engine(backend)), strict=True):
        mine = [record for record in records.values() if (record.arm == "plain") == (arm.name == "plain")]
        assert len(mine) == report.num_problems == len({problem.id for problem in load_problems(PROBLEMS)})
        for problem in load_problems(PROBLEMS):
            (found,) = [record for record in mine if record.problem_id == problem.id]
            chat = [{"role": "user", "content": problem.question}]
            (expected,) = used.generate(chat, **GREEDY)
            (sample,) = found.samples
            assert sample.text == expected.text
            complete = sample.finish_reason != "length"
            assert sample.right == problem.gold.is_right(expected.text, complete=complete)
            assert (found.steps, found.ambiguous_steps) == (expected.stats.steps, expected.stats.ambiguous_steps)
        assert arm.metrics["pass@1"].mean == sum(record.samples[0].right for record in mine) / len(mine)
    assert report.arm("verified").intervention_share > 0
    assert report.arm("plain").seconds > 0


def test_sampled_arms_are_those_of_the_engine(tmp_path):
    report = evaluate(engine(), PROBLEMS, tmp_path, **SAMPLED)
    assert [arm.name for arm in report.arms] == ["plain", "truncated", "verified"]
    records, problem = read(tmp_path), load_problems(PROBLEMS)[3]
    chat = [{"role": "user", "content": problem.question}]
    for arm in make_arms(GenerationConfig(**SAMPLED), {}, verified=True):
        used = engine(verified=arm.steered)
        (expected,) = used.generate(chat, arm.config, request_ids=[int(problem.id, 16) % 2**31])
        found = records[f"{problem.id} {arm.key}"]
        assert [sample.text for sample in found.samples] == [sample.text for sample in expected.samples]
        if not arm.steered:
            assert [sample.score for sample in found.samples] == Reranker(engine()).scores(expected)
            assert found.rerank_seconds > 0
    assert {"pass@1", "pass@2", "pass@4", "maj@2", "maj@4", "best@2", "best@4"} == set(report.arm("plain").metrics)


def test_plain_decoding_has_the_options_of_the_engine(tmp_path):
    options = {"tokenizer": TOKENIZER, "backend": "cpu", "quantization": "int8", "kv_cache_memory_bytes": CACHE_BYTES}
    quantized = llm2_fast.load(MODEL, head_verifier(MODEL), **options, max_batch_size=3, max_length=40)
    plain = quantized.without_verifier()
    assert (plain.max_batch_size, plain.max_length, plain.verifier) == (3, 40, None)
    assert plain.without_verifier() is plain
    evaluate(quantized, PROBLEMS[:3], tmp_path, **GREEDY)
    assert json.loads((tmp_path / "manifest.json").read_text())["options"]["quantization"] == "int8"
    expected = llm2_fast.load(MODEL, **options)
    for problem in load_problems(PROBLEMS[:3]):
        (generation,) = expected.generate([{"role": "user", "content": problem.question}], **GREEDY)
        assert read(tmp_path)[f"{problem.id} plain"].samples[0].text == generation.text


def test_few_shot_prompts_are_text_and_stop_before_another_problem(tmp_path):
    evaluate(engine(), PROBLEMS[:2], tmp_path, examples=arithmetic.problems(2, seed=7), **GREEDY)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["options"]["stop"] == ["\n\nQuestion:"]
    (expected,) = engine(verified=False).generate(
        make_prompt(load_problems(PROBLEMS)[0], load_problems(arithmetic.problems(2, seed=7))), **GREEDY
    )
    assert read(tmp_path)[f"{load_problems(PROBLEMS)[0].id} plain"].samples[0].text == expected.text
    with pytest.raises(ArgumentError, match="examples"):
        evaluate(engine(), PROBLEMS[:2], tmp_path, examples=arithmetic.problems(3, seed=7), **GREEDY)


def test_boxed_gold_answers_are_compared_as_expressions(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    problems = [
        {"problem": "1 + 2", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1"},
        {"problem": "2 + 1", "solution": r"So \boxed{\left( 3, \frac{\pi}{2} \right)}."},
        {"problem": "1 + 1", "solution": "There are two.", "answer": r"2\sqrt{3}"},
    ]
    says = {
        False: ["The answer is 1.", "3", "2"],
        True: ["0.5", r"\boxed{(3, \frac{\pi}{2})}", r"The answer is \sqrt{12}."],
    }
    monkeypatch.setattr(
        llm2_fast.Engine,
        "generate",
        lambda self, prompts, config, request_ids: [
            Generation(prompt, [Sample([5], text, "eos")])
            for prompt, text in zip(prompts, says[self is engine()], strict=True)
        ],
    )
    report = evaluate(engine(), problems, tmp_path, **GREEDY)
    assert [arm.metrics["pass@1"].mean for arm in report.arms] == [0.0, 1.0]


def test_without_a_verifier_there_is_plain_decoding_only(tmp_path):
    report = evaluate(engine(verified=False), PROBLEMS, tmp_path, **SAMPLED)
    assert [arm.name for arm in report.arms] == ["plain"]
    assert report.comparisons == []
    assert not any(name.startswith("best") for name in report.arm("plain").metrics)
    assert "|" in to_markdown(report)


def test_an_interrupted_evaluation_is_resumed(tmp_path, monkeypatch):
    whole = evaluate(engine(), PROBLEMS, tmp_path / "whole", **SAMPLED)
    append, room = ShardStore.append, iter(range(17))

    def until_full(self, record):
        if next(room, None) is None:
            raise OSError("no space left on device")
        append(self, record)

    monkeypatch.setattr(ShardStore, "append", until_full)
    with pytest.raises(OSError, match="no space"):
        evaluate(engine(), PROBLEMS, tmp_path / "parts", **SAMPLED)
    monkeypatch.undo()
    before = read(tmp_path / "parts")
    assert len(before) == 17
    resumed = evaluate(engine(), PROBLEMS, tmp_path / "parts", **SAMPLED)
    after = read(tmp_path / "parts")
    assert {id: after[id] for id in before} == before  # taken over, times included
    assert without_times(after) == without_times(read(tmp_path / "whole"))
    assert [arm.metrics for arm in resumed.arms] == [arm.metrics for arm in whole.arms]
    assert resumed.comparisons == whole.comparisons


def test_arms_and_problems_can_be_added_but_options_not_changed(tmp_path):
    evaluate(engine(), PROBLEMS[:4], tmp_path, **GREEDY)
    before = read(tmp_path)
    report = evaluate(engine(), PROBLEMS, tmp_path, sweep={"beta": [0.0, 1.0]}, **GREEDY)
    after = read(tmp_path)
    assert {id: after[id] for id in before} == before
    assert [arm.name for arm in report.arms] == ["plain", "verified", "verified, beta 0.0", "verified, beta 1.0"]
    beta_0, plain = (report.arm(name).metrics for name in ("verified, beta 0.0", "plain"))
    assert beta_0 == plain  # greedy decoding takes a candidate anyway
    with pytest.raises(ArgumentError, match="max_new_tokens 10 there, 9 here"):
        evaluate(engine(), PROBLEMS, tmp_path, **{**GREEDY, "max_new_tokens": 9})
    other = make_engine(head_verifier(MODEL, seed=6))
    with pytest.raises(ArgumentError, match="verifier 'head"):
        evaluate(other, PROBLEMS, tmp_path, **GREEDY)


def test_the_report_on_disk(tmp_path):
    report = evaluate(engine(), PROBLEMS, tmp_path, trace=True, **GREEDY)
    assert (tmp_path / "report.md").read_text() == to_markdown(report)
    entry = json.loads((tmp_path / "report.json").read_text())
    assert entry == json.loads(json.dumps(report.to_json()))
    assert entry["failures"] == []  # of too few problems
    ambiguous = sum(record.ambiguous_steps for record in read(tmp_path).values())
    assert sum(report.arm("verified").margins.values()) == ambiguous > 0


def test_a_harmful_verifier_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("llm2_fast.evaluation.grade.answers_equal", lambda *_: True)
    monkeypatch.setattr("llm2_fast.evaluation.grade.extract_answer", lambda text, complete: text[:1] or None)
    problems = arithmetic.problems(MIN_PROBLEMS + 20)
    plain = engine(verified=False)
    monkeypatch.setattr(  # an engine that says nothing with the verifier
        llm2_fast.Engine,
        "generate",
        lambda self, prompts, config, request_ids: [
            Generation(p, [Sample([5], "1" if self is not engine() else "", "eos")]) for p in prompts
        ],
    )
    assert plain is not engine()
    with caplog.at_level(logging.WARNING, logger="llm2_fast"):
        report = evaluate(engine(), problems, tmp_path, **GREEDY)
    assert [failure.kind for failure in report.failures] == ["harmful"]
    assert json.loads((tmp_path / "report.json").read_text())["failures"] == [dataclasses.asdict(report.failures[0])]
    assert "actively harmful: verified is worse than plain decoding: pass@1 -100.0 points" in caplog.text


def test_samples_that_a_broken_verifier_ends_are_reported(tmp_path, caplog):
    broken = head_verifier(MODEL)
    broken.head.score.weight.data.fill_(math.nan)
    with caplog.at_level(logging.WARNING, logger="llm2_fast"):
        report = evaluate(make_engine(broken), PROBLEMS, tmp_path, **SAMPLED)
    plain, truncated, verified = report.arms
    assert plain.errors == plain.failed_problems == 0
    for arm in (truncated, verified):  # 0 times NaN is NaN
        assert arm.errors > arm.failed_problems > 0
        found = [s for r in read(tmp_path).values() for s in r.samples if s.finish_reason == "error"]
        assert all((s.answer, s.right, s.vote) == (None, False, None) and s.error for s in found)
        assert f"{arm.name}: {arm.errors} of {report.num_problems * 4} samples ended with an error" in caplog.text


# --- Plain decoding of an earlier evaluation ---------------------------------------------------------------------


def without_times_in(report):
    arms = [dataclasses.replace(arm, seconds=0.0, rerank_seconds=0.0, taken_over=0) for arm in report.arms]
    return dataclasses.replace(report, arms=arms)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_plain_decoding_is_taken_over(tmp_path, monkeypatch, options):
    verifiers = [None, head_verifier(MODEL), head_verifier(MODEL, seed=6), lora_case(MODEL).verifier]
    alone = [evaluate(make_engine(v), PROBLEMS, tmp_path / f"alone-{i}", **options) for i, v in enumerate(verifiers)]
    monkeypatch.delattr(llm2_fast.Engine, "without_verifier")
    for i, verifier in enumerate(verifiers):
        engine = make_engine(verifier)
        for source in {0, 1, i}:
            plain, output = tmp_path / f"alone-{source}", tmp_path / f"{i}-from-{source}"
            report = evaluate(engine, PROBLEMS, output, plain=plain, **options)
            assert without_times_in(report) == without_times_in(alone[i])
            assert [arm.taken_over for arm in report.arms] == [report.num_problems] + [0] * (len(report.arms) - 1)
            mine, theirs, original = (read(path) for path in (output, tmp_path / f"alone-{i}", plain))
            assert {id: dataclasses.replace(r, taken_over=False) for id, r in without_times(mine).items()} == (
                without_times(theirs)
            )
            assert all(r.seconds == original[id].seconds for id, r in mine.items() if r.arm == "plain")
            assert "- plain: taken over from an earlier evaluation" in (output / "report.md").read_text()
    limits = {"kv_cache_memory_bytes": CACHE_BYTES, "max_length": 60}  # as of a verifier with a shorter context
    again = llm2_fast.load(MODEL, verifiers[1], tokenizer=TOKENIZER, **limits)
    evaluate(again, PROBLEMS[:3], tmp_path / "again", plain=tmp_path / "1-from-0", **options)
    assert len(read(tmp_path / "again")) == 3 * len(alone[1].arms)


def test_only_the_same_plain_decoding_is_taken_over(tmp_path):
    problems, plain = PROBLEMS[:4], tmp_path / "plain"
    evaluate(engine(), problems, plain, **SAMPLED)
    other_model = llm2_fast.load(arithmetic.model("gemma3"), tokenizer=TOKENIZER, kv_cache_memory_bytes=CACHE_BYTES)

    def refuses(message, *, used=None, problems=problems, plain=plain, **options):
        with pytest.raises(ArgumentError, match=f"^plain: expected {message}"):
            evaluate(used or engine(), problems, tmp_path / "output", plain=plain, **{**SAMPLED, **options})
        assert not (tmp_path / "output").exists()

    same = "an evaluation with the same model and options, got "
    refuses(f"{same}seed 5 there, 6 here", seed=6)
    refuses(f"{same}n 4 there, 2 here", n=2)
    refuses(f"{same}temperature 1.0 there, 0.5 here", temperature=0.5)
    refuses(f"{same}max_new_tokens 10 there, 9 here", max_new_tokens=9)
    refuses(f"{same}stop ", stop=("is",))
    refuses(f"{same}.*examples None there", examples=arithmetic.problems(2, seed=7))
    refuses(f"{same}backend 'cpu' there, 'reference' here", used=engine("reference"))
    refuses(f"{same}model_fingerprint ", used=other_model)
    refuses("a finished evaluation of all .* problems, got .* missing in .*plain, the first: '", problems=PROBLEMS)
    changed = [{**problems[0], "answer": "#### 2"}, *problems[1:]]
    refuses("a finished evaluation of all 4 problems, got 1 missing", problems=changed)
    refuses("the directory of an earlier evaluation, got ", plain=tmp_path / "nowhere")
    refuses("the directory of an earlier evaluation, got ", plain=7)
    for shard in plain.glob("shard-*.jsonl"):  # as before token ids were kept
        shard.write_text(re.sub(r'"token_ids": \[[^\]]*\]', '"token_ids": null', shard.read_text()))
    refuses("records with token ids, to rerank samples")


def test_the_progress_bar_shows_the_time_left(tmp_path, capsys, monkeypatch):
    clock = itertools.count(0, 60)  # a minute passes whenever the bar looks
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    evaluate(engine(), PROBLEMS, tmp_path, progress=True, **GREEDY)
    shown = re.findall(r"evaluate: .*? (\d+)/(\d+) \[[\d:]+<([\d:?]+),", capsys.readouterr().err)
    totals = {int(total) for _, total, _ in shown}
    assert totals == {2 * len({problem.id for problem in load_problems(PROBLEMS)})}
    left = {int(done): time for done, _, time in shown}
    assert left[0] == "?"
    assert left[max(totals)] == "00:00"
    halfway = [minutes for done, minutes in left.items() if 0 < done < max(totals)]
    assert len(halfway) > 1
    assert "00:00" not in halfway
    evaluate(engine(), PROBLEMS, tmp_path / "quiet", **GREEDY)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"problems": []}, {}, "problems: expected at least one problem"),
        ({"problems": [{"question": "1 ?", "answer": "\\boxed{}"}]}, {}, "answer: expected a final answer"),
        ({"examples": PROBLEMS[3:5]}, {}, "examples: expected none of the problems"),
        ({"config": {"n": 2}}, {}, "config: expected a GenerationConfig or None, got dict"),
        ({}, {"max_new_tokens": 1000}, "problems\\[0\\]: expected prompt and max_new_tokens within the context of 96"),
        ({}, {"no_such_option": 1}, "no_such_option"),
    ],
)
def test_unusable_arguments(tmp_path, arguments, options, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate(engine(), **{"problems": PROBLEMS, "output_dir": tmp_path / "out", **arguments}, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path):
    with pytest.raises(ArgumentError, match="engine: expected one whose model has a tokenizer"):
        evaluate(llm2_fast.load(MODEL, kv_cache_memory_bytes=CACHE_BYTES), PROBLEMS, tmp_path)


# --- The command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    MODEL.save_pretrained(root / "model")
    TOKENIZER.save_pretrained(root / "model")
    head_verifier(MODEL).save_pretrained(root / "verifier")
    (root / "problems.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in PROBLEMS))
    return root


def test_eval(saved, tmp_path, capsys):
    places = [str(saved / "model"), str(saved / "problems.jsonl"), str(tmp_path)]
    flags = [f"--verifier={saved / 'verifier'}", "--limit=5", "--beta=3", "--max-new-tokens=10"]
    (tmp_path / "examples.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in arithmetic.problems(3, seed=7)))
    few_shot = [f"--examples={tmp_path / 'examples.jsonl'}", "--num-examples=1", "--sweep=beta=0.5,1"]
    assert main(["eval", *places, *flags, *few_shot]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "report.md").read_text()
    assert "verified, beta 0.5" in out
    assert main(["eval", *places, *flags, *few_shot, "--json"]) == 0  # nothing is decoded again
    entry = json.loads(capsys.readouterr().out)
    assert entry == json.loads((tmp_path / "report.json").read_text())
    assert math.isclose(sum(arm["seconds"] for arm in entry["arms"]), sum(r.seconds for r in read(tmp_path).values()))


def test_eval_takes_plain_decoding_over(saved, tmp_path, capsys):
    def arguments(output, *flags):
        places = [str(saved / "model"), str(saved / "problems.jsonl"), str(tmp_path / output)]
        return ["eval", *places, "--limit=3", "--max-new-tokens=8", *flags]

    assert main(arguments("plain")) == 0
    flags = [f"--verifier={saved / 'verifier'}", f"--plain={tmp_path / 'plain'}"]
    assert main(arguments("verified", *flags)) == 0
    assert "- plain: taken over from an earlier evaluation, with its times, for 3 problems" in capsys.readouterr().out
    assert main(arguments("other", *flags, "--seed=1")) == 2
    assert "plain: expected an evaluation with the same model and options, got seed 0" in capsys.readouterr().err


def test_eval_sweeps_over_top_k(saved, tmp_path, capsys):
    places = [str(saved / "model"), str(saved / "problems.jsonl"), str(tmp_path)]
    flags = [f"--verifier={saved / 'verifier'}", "--limit=3", "--beta=3", "--max-new-tokens=8"]
    assert main(["eval", *places, *flags, "--sweep=candidate_top_k=1,2", "--json"]) == 0
    arms = {arm["settings"].get("candidate_top_k"): arm for arm in json.loads(capsys.readouterr().out)["arms"][1:]}
    assert list(arms) == [None, 1, 2]
    assert arms[1]["name"] == "verified, candidate_top_k 1"
    assert (arms[1]["ambiguous_share"], arms[1]["mean_candidates"]) == (0.0, 1.0)
    assert 1 < arms[2]["mean_candidates"] <= 2 < arms[None]["mean_candidates"]


# --- Figures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The axes of figures that are saved, by the file's name; the files are written, too."""
    figure = pytest.importorskip("matplotlib.figure")
    axes, save = {}, figure.Figure.savefig

    def record(self, path, **options):
        (axes[path.stem],) = self.axes
        save(self, path, **options)

    monkeypatch.setattr(figure.Figure, "savefig", record)
    return axes


def errorbars(axes):
    """Points of each label: x, mean, lower and upper end of the bar."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        found[container.get_label()] = [
            (x, y, *(float(end) for end in bar[:, 1]))
            for x, y, bar in zip(line.get_xdata(), line.get_ydata(), bars.get_segments(), strict=True)
        ]
    return found


def point(x, estimate):
    return pytest.approx((x, 100 * estimate.mean, 100 * estimate.low, 100 * estimate.high))


def sampled_report(outcomes, margins=None, **steered):
    """Of two equal samples per problem: which problems an arm has right, by its kind and beta."""
    arms = make_arms(GenerationConfig(temperature=1.0), {"beta": [1.0]}, verified=True)
    records = {
        arm.key: [
            record(i, arm, [right] * 2, scores=None if arm.steered else [1.0, 0.0], **(steered if arm.steered else {}))
            for i, right in enumerate(outcomes[arm.name])
        ]
        for arm in arms
    }
    for arm in arms[1:] if margins else []:
        records[arm.key] = [dataclasses.replace(r, margins=margins) for r in records[arm.key]]
    return summarize(arms, records, seed=0)


OUTCOMES = {
    "plain": [True, False, False, False],
    "truncated": [True, True, False, False],
    "verified": [True, True, True, False],
    "verified, beta 1.0": [False, True, False, False],
}


def test_figures_show_the_report(tmp_path, drawn):
    report = sampled_report(OUTCOMES, margins={"0.0": 1, "2.0": 3}, seconds=3.0, ambiguous=4)
    plot_report(report, tmp_path)
    accuracies = {arm.name: arm.metrics["pass@1"] for arm in report.arms}
    steered = [name for name in OUTCOMES if name != "plain"]

    by_beta = drawn["accuracy_by_beta"]
    betas = zip((0.0, 0.25, 1.0), steered, strict=True)
    assert errorbars(by_beta) == {"alpha 0.1": [point(beta, accuracies[name]) for beta, name in betas]}

    by_ambiguity = drawn["accuracy_by_ambiguity"]
    assert errorbars(by_ambiguity) == {name: [point(40.0, accuracies[name])] for name in steered}
    assert by_ambiguity.get_xlabel() == "ambiguous steps, %"
    for axes in (by_beta, by_ambiguity):
        (level,) = [line.get_ydata() for line in axes.lines if line.get_label() == "plain"]
        assert list(level) == [25.0, 25.0]

    cost = {name: 50.0 if name == "plain" else 150.0 for name in OUTCOMES}  # 20 tokens per problem
    assert errorbars(drawn["accuracy_by_cost"]) == {name: [point(cost[name], accuracies[name])] for name in OUTCOMES}

    curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in drawn["accuracy_by_samples"].lines}
    assert curves.keys() == {*OUTCOMES, "plain, reranked"}
    assert curves["verified"] == [(1, 75.0), (2, 75.0)]
    assert curves["plain, reranked"] == [(1, 25.0), (2, 25.0)]

    outlines = {patch.get_label(): patch.get_xy() for patch in drawn["margins"].patches}
    assert outlines.keys() == set(steered)
    assert {round(float(height), 6) for height in outlines["verified"][:, 1]} == {0.0, 0.25, 0.75}


def test_plots(saved, tmp_path, drawn):
    example = SupervisionExample(
        [{"role": "user", "content": "1"}],
        [TokenPair(4, 7, 12)],
        [TokenQuality(0.25, 5, 20, 20, True, -1.5)],
        spared=[TokenPair(4, 7, 13)],
        spared_quality=[TokenQuality(0.75, 15, 20, 20, True, -1.5)],
    )
    write_supervision(tmp_path / "supervision.jsonl", [example])
    places = [str(saved / "model"), str(saved / "problems.jsonl"), str(tmp_path / "out")]
    flags = [f"--verifier={saved / 'verifier'}", "--limit=4", "--max-new-tokens=8", "--n=2", "--temperature=1"]
    flags += ["--trace", "--sweep=beta=0,1", "--plots", f"--supervision={tmp_path / 'supervision.jsonl'}"]
    assert main(["eval", *places, *flags]) == 0
    by_kind = {"accuracy_by_beta", "accuracy_by_ambiguity", "accuracy_by_cost", "accuracy_by_samples", "margins"}
    assert drawn.keys() == {path.stem for path in (tmp_path / "out").glob("*.png")} == {*by_kind, "quality"}
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    bars = {patch.get_x(): patch.get_height() for patch in drawn["quality"].patches if patch.get_height()}
    assert sorted(bars.values()) == [1, 1]
    assert min(bars) == pytest.approx(0.25)  # the bins are between the least and the greatest quality
    assert [text.get_text() for text in drawn["quality"].figure.legends[0].texts] == ["negatives (1)", "others (1)"]
    report = EvaluationReport.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    shares = {name: points[0][0] for name, points in errorbars(drawn["accuracy_by_ambiguity"]).items()}
    assert shares == {arm.name: pytest.approx(100 * arm.ambiguous_share) for arm in report.arms[1:]}


def test_only_what_there_are_figures_for_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report = greedy_report([True], [False])
    names = [path.name for path in plot_report(report, tmp_path)]
    assert names == ["accuracy_by_ambiguity.png", "accuracy_by_cost.png"]
    with pytest.raises(ArgumentError, match="supervision: expected examples with measured qualities"):
        plot_quality(Supervision([], None), tmp_path / "quality.png")


def test_plots_without_matplotlib_are_refused_before_anything_is_loaded(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llm2_fast.evaluation.plots.find_spec", lambda name: None)
    assert main(["eval", "no/model", "no/problems", str(tmp_path / "out"), "--plots"]) == 2
    assert "plots need: pip install 'llm2-fast[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--supervision=x"], "--supervision: expected together with --plots, got x"),
        (["--sweep=beta"], "--sweep: expected OPTION=X,Y with numbers, got beta"),
        (["--sweep=beta=a"], "--sweep: expected OPTION=X,Y with numbers, got beta=a"),
        (["--limit=0"], "--limit: expected an integer >= 1, got 0"),
        ([], "problems: expected the path of a JSON-lines file"),
    ],
)
def test_unusable_flags(flags, message, capsys):
    assert main(["eval", "no/model", "no/problems", "no/output", *flags]) == 2
    assert message in capsys.readouterr().err
