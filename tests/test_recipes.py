"""The recipes at a scale at which their figures say nothing: everything runs, goes on after a break, and adds up."""

from __future__ import annotations

import json
import random
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import arithmetic as tiny_arithmetic
import llm2_fast
import tiny
from llm2_fast.errors import ArgumentError
from llm2_fast.evaluation.markdown import percent
from llm2_fast.evaluation.report import Estimate, EvaluationReport
from llm2_fast.problems import load_problems
from recipes import ablations, arithmetic, gsm8k
from recipes.experiment import Experiment, Settings, choose_beta
from recipes.negatives import FORM, categorize
from recipes.report import table
from recipes.stages import Stages
from recipes.tokenizer import make_tokenizer
from recipes.word_problems import KINDS, MAX_VALUE, TARGET, generate, workshop
from verifiers import full_case, head_verifier

_EQUATION = re.compile(r"(\d)([-+*/])(\d)=(\d)$")


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_right(kind: str) -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for problem in islice(generate(kind, "seed"), 200):
        *lines, answer = problem["answer"].split("\n")
        value = None
        for line in lines:
            if kind == "record":
                assert f" {line}." in problem["question"]
                value = int(line[-1])
                continue
            first, operator, second, result = _EQUATION.search(line).groups()
            assert value is None or int(first) == value
            value = operations[operator](int(first), int(second))
            assert value == int(result)
            assert 0 <= value <= MAX_VALUE
            event, colon, _ = line.rpartition(": ")
            assert not colon or event in problem["question"]
        assert answer == f"#### {value}"


def test_problems_are_seeded_and_unlike() -> None:
    first, again = (list(islice(generate(TARGET, "seed"), 50)) for _ in range(2))
    assert first == again
    assert len({problem["question"] for problem in first}) == 50
    assert first != list(islice(generate(TARGET, "another"), 50))


@pytest.mark.parametrize("operations", [1, 2, 4])
def test_target_has_as_many_operations_as_asked(operations: int) -> None:
    draw = random.Random(0)
    assert all(len(workshop(draw, operations).solution.lines) == operations for _ in range(20))


@pytest.mark.parametrize("vocab_size", [None, 128])
def test_tokenizer_gives_text_back(vocab_size: int | None) -> None:
    problems = [problem for kind in KINDS for problem in islice(generate(kind, "seed"), 20)]
    texts = [text for problem in problems for text in problem.values()]
    tokenizer = make_tokenizer(texts, vocab_size)
    assert vocab_size is None or len(tokenizer) == vocab_size
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_stages_run_once_and_refuse_other_options(tmp_path) -> None:
    calls = []
    for _ in range(2):
        stages = Stages(tmp_path, {"seed": 0})
        assert stages.run("work", lambda: calls.append(1) or {"figure": 1.5}) == {"figure": 1.5}
    assert len(calls) == 1
    assert list(stages.seconds) == ["work"]
    with pytest.raises(ArgumentError, match="output"):
        Stages(tmp_path, {"seed": 1})


def test_a_stage_that_fails_runs_again(tmp_path) -> None:
    def fail() -> None:
        raise OSError("full")

    stages = Stages(tmp_path, {})
    with pytest.raises(OSError, match="full"):
        stages.run("work", fail)
    assert stages.run("work", lambda: 1) == 1


def test_the_smaller_of_equally_good_betas_is_chosen() -> None:
    accuracies = {None: 0.9, 2.0: 0.5, 0.5: 0.5, 0.25: 0.4}
    arms = [
        SimpleNamespace(settings={} if beta is None else {"beta": beta}, metrics={"pass@1": Estimate(mean, mean, mean)})
        for beta, mean in accuracies.items()
    ]
    assert choose_beta(SimpleNamespace(arms=arms)) == 0.5


def test_tables() -> None:
    assert table(("a", "b"), [(1, 2), (3,)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"
    assert percent(Estimate(mean=0.5, low=0.25, high=0.75), "+") == "+50.0 [+25.0, +75.0]"


def test_plain_decoding_is_done_once_for_all_kinds(tmp_path, monkeypatch) -> None:
    model = tiny_arithmetic.model()
    saved = tmp_path / "system1"
    for part in (model, tiny_arithmetic.tokenizer()):
        part.save_pretrained(saved)
    problems = tiny_arithmetic.problems(16)
    sizes = {"sampled": 4, "samples": 3, "max_new_tokens": 8, "max_batch_size": 4}
    settings = Settings(**sizes, exploration={}, verifiers={"head": {}, "full": {}}, control=None)

    def run(name: str) -> tuple[list[dict[str, Any]], int]:
        """Results without times, and how often plain decoding had an engine of its own."""
        experiment = Experiment(Stages(tmp_path / name, {}), saved, settings, seed=0)
        arithmetic.write_problems(experiment.problems("validation"), problems[:8])
        arithmetic.write_problems(experiment.problems("test"), problems[8:])
        head_verifier(model).save_pretrained(experiment.directory / "head")
        full = full_case(model, tiny.classifier("llama", num_hidden_layers=2)).verifier
        full.save_pretrained(experiment.directory / "full")
        plain_engine, made = llm2_fast.Engine.without_verifier, []
        with monkeypatch.context() as patch:
            patch.setattr(llm2_fast.Engine, "without_verifier", lambda self: made.append(1) or plain_engine(self))
            results = []
            for kind in settings.verifiers:
                results.append(experiment.compare_betas(kind))
                results.append(experiment.greedy(saved, kind, 1.0, experiment.plain_of_first("greedy", kind)))
                results.append(experiment.sample(kind, 1.0))
        for arm in (arm for result in results for arm in result["arms"]):
            del arm["seconds"], arm["rerank_seconds"], arm["taken_over"]
        return results, len(made)

    shared, engines = run("shared")
    monkeypatch.setattr(Experiment, "plain_of_first", lambda *_: None)
    alone, engines_alone = run("alone")
    assert shared == alone
    assert (engines, engines_alone) == (3, 6)
    assert all(any(arm["intervention_share"] > 0 for arm in result["arms"]) for result in shared)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*no better than chance:UserWarning")
def test_arithmetic_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    output = tmp_path / "run"
    arguments = ["--quick", "--output", str(output)]
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(arithmetic.Experiment, "compare_betas", interrupt)
        with pytest.raises(KeyboardInterrupt):
            arithmetic.main(arguments)
    before = json.loads((output / "recipe.json").read_text())["stages"]
    arithmetic.main(arguments)
    after = json.loads((output / "recipe.json").read_text())["stages"]
    assert {name: after[name] for name in before} == before

    scale = arithmetic.QUICK
    splits = {split: load_problems(output / f"{split}.jsonl") for split in ("train", "validation", "test")}
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert len(set(questions)) == len(questions)
    assert len(splits["test"]) == scale.test
    for kind in scale.settings.verifiers:
        report = after[f"greedy, {kind}"]["result"]
        assert report["num_problems"] == scale.test
        assert EvaluationReport.from_json(report).to_json() == report
        assert report["arms"][0]["metrics"] == after["greedy, head"]["result"]["arms"][0]["metrics"]
    text = (output / "report.md").read_text()
    assert all(f"| {kind} |" in text for kind in scale.settings.verifiers)
    assert (output / "accuracy_by_beta.svg").read_text().lstrip().startswith("<?xml")
    ablations.main(arguments)
    text = (output / "ablations" / "report.md").read_text()
    assert all(label in text for label in ("Q < 0.25", "bypass", "likelihood", "| 4 |", "| 128 |", "| 0.05 |", FORM))
    check_gsm8k(output, tmp_path / "gsm8k")


def check_gsm8k(arithmetic_run: Path, output: Path) -> None:
    """Problems in a file and a model in a directory are all that this recipe needs."""
    counts = "--fine-tune 16 --num-train 30 --num-validation 4 --num-test 8 --sampled 2 --rollouts 2 --positions 2"
    model, problems = arithmetic_run / "system1", arithmetic_run / "train.jsonl"
    options = f"--kinds head --max-new-tokens 32 --model {model} --train {problems} --output {output} {counts}"
    gsm8k.main(options.split())
    splits = [load_problems(output / f"{name}.jsonl") for name in ("system1", "train", "validation", "test")]
    assert [len(problems) for problems in splits] == [16, 30, 4, 8]
    assert len({problem.question for problems in splits for problem in problems}) == 58
    assert "| as it is | head |" in (output / "report.md").read_text()

    counts = f"--num-train 12 --num-validation 2 --num-test 4 --sampled 1 --epochs 4 --test {arithmetic_run}/test.jsonl"
    options = f"--kinds lora --bypass --control --max-new-tokens 16 --model {model} --train {problems} {counts}"
    other = output.with_name("gsm8k-bypass")
    gsm8k.main([*options.split(), "--output", str(other)])
    tested = {problem.question for problem in load_problems(other / "test.jsonl")}
    assert tested <= {problem.question for problem in load_problems(arithmetic_run / "test.jsonl")}
    assert "| fine-tuned | none |" in (other / "report.md").read_text()
    with pytest.raises(ArgumentError, match="train: expected a file with 500 more problems, got .* left for test"):
        gsm8k.main(["--train", str(problems), "--output", str(output.with_name("short"))])


@pytest.mark.parametrize(
    ("written", "ground_truth", "token", "category"),
    [
        ("Ann", " melts", " wraps", "which event: what somebody does"),
        ("", "Ann", "Ben", "which event: somebody's name"),
        ("Ann melts", " 2", " 3", "which event: how many"),
        ("Ann melts 2:", " 5", " 6", "the number so far"),
        ("Ann melts 2: 5", "-", "+", "whether a number rises or falls"),
        ("Ann melts 2: 5-", "2", "3", "the operand"),
        ("Ann melts 2: 5-2=", "3", "4", "the result"),
        ("The answer is", " 3", " 4", "the answer"),
        ("", "The", "Ann", FORM),
    ],
)
def test_negatives_are_sorted_by_decision(written: str, ground_truth: str, token: str, category: str) -> None:
    assert categorize(written, ground_truth, token) == category
