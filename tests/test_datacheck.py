"""The data checker: every planted defect is found, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

import arithmetic
import llm2_fast
from llm2_fast import ArgumentError
from llm2_fast.cli import main
from llm2_fast.datacheck import DataCheck
from llm2_fast.supervision import (
    SupervisionExample,
    TokenPair,
    manifest_path,
    read_supervision,
    tokenize_messages,
    write_supervision,
)

TOKENIZER = arithmetic.tokenizer()
PROBLEMS = arithmetic.problems(3)
FIRST = [{"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "The answer is 3 ."}]
INPUT_IDS = tokenize_messages(FIRST, TOKENIZER)
PROMPT_LENGTH = 6  # user 1 + 2 = assistant
PAIR = TokenPair(PROMPT_LENGTH, INPUT_IDS[PROMPT_LENGTH], 20)


def write(path, entries):
    path.write_text("".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries))
    return path


def check(*paths, test=(), tokenizer=TOKENIZER):
    checker = DataCheck(tokenizer)
    checker.check(paths, test)
    return checker


def kinds(checker):
    return [finding.kind for finding in checker.findings]


def test_clean_data_has_no_findings(tmp_path):
    problems = write(tmp_path / "problems.jsonl", PROBLEMS[:2])
    test = write(tmp_path / "test.jsonl", PROBLEMS[2:])
    engine = llm2_fast.load(arithmetic.model(), tokenizer=TOKENIZER)
    llm2_fast.explore(engine, problems, tmp_path / "out", n=3, max_new_tokens=4)
    llm2_fast.explore(engine, problems, tmp_path / "best", n=3, max_new_tokens=4, positive="best")
    assert any(read_supervision(tmp_path / "out").examples[0].samples)
    for path in (problems, tmp_path / "out", tmp_path / "best"):
        checker = check(path, test=[test])
        assert (checker.findings, checker.num_entries) == ([], 3)


@pytest.mark.parametrize(
    ("pair", "detail"),
    [
        (PAIR._replace(position=len(INPUT_IDS)), "expected a position in"),
        (PAIR._replace(position=0), "expected a position in"),
        (PAIR._replace(ground_truth_id=21), "expected the solution's token"),
        (PAIR._replace(negative_id=PAIR.ground_truth_id), "the negative is the ground truth"),
        (TokenPair(2, INPUT_IDS[2], 20), "inside the prompt of 6 tokens"),
        (PAIR._replace(negative_id=len(TOKENIZER)), "a negative that the tokenizer does not know"),
    ],
)
def test_wrong_positions_are_found(tmp_path, pair, detail):
    path = tmp_path / "s.jsonl"
    write_supervision(path, [SupervisionExample(FIRST, [PAIR, pair])])
    checker = check(path)
    assert kinds(checker) == ["position"]
    assert detail in checker.findings[0].detail
    assert checker.findings[0].where == f"{path}:1"


def test_another_chat_template_is_found(tmp_path):
    engine = llm2_fast.load(arithmetic.model(), tokenizer=TOKENIZER)
    llm2_fast.explore(engine, PROBLEMS, tmp_path, n=3, max_new_tokens=4)
    other = arithmetic.tokenizer()
    other.chat_template = "answer " + other.chat_template
    assert set(kinds(check(tmp_path, tokenizer=other))) == {"template", "position"}
    backward = arithmetic.tokenizer()
    backward.chat_template = "{% for message in messages|reverse %}{{ message['content'] }} {% endfor %}"
    assert "template" in kinds(check(tmp_path, tokenizer=backward))
    refusing = arithmetic.tokenizer()
    refusing.chat_template = "{{ raise_exception('no') }}"
    assert set(kinds(check(tmp_path, tokenizer=refusing))) == {"template"}


def test_missing_gold_answers_are_found(tmp_path):
    long = "First add the apples and then add the pears, and there you have the sum of them"
    path = write(
        tmp_path / "p.jsonl",
        [{"question": f"q{i}", "answer": a} for i, a in enumerate([r"so \boxed{}", long, f"{long}\n#### 7", "43"])],
    )
    checker = check(path)
    assert [(f.kind, f.where) for f in checker.findings] == [("gold answer", f"{path}:{i}") for i in (1, 2)]


def expressions(path, *answers):
    return write(path, [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)])


def test_gold_answers_that_cannot_be_read_are_found(tmp_path):
    pytest.importorskip("math_verify")
    good = [r"\frac{3}{56}", r"so \boxed{2\sqrt{3}}", r"\text{(C)}", "Evelyn", "#### 7", "12 apples"]
    bad = ["n/a", "@@@", r"\boxed{\frac{3}}", "#### ???", r"\boxed{None}"]
    path = expressions(tmp_path / "p.jsonl", *good, *bad)
    checker = check(path)
    lines = range(len(good) + 1, len(good) + len(bad) + 1)
    assert [(f.kind, f.where) for f in checker.findings] == [("gold answer", f"{path}:{line}") for line in lines]
    unread = r"math-verify cannot read it: '\\frac{3}'"
    assert [f.detail for f in checker.findings][:3:2] == ["stands for no answer: 'n/a'", unread]
    assert checker.num_unread_answers == 0


def test_without_math_verify_it_is_said_how_many_gold_answers_were_not_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    path = expressions(tmp_path / "p.jsonl", "@@@", r"\boxed{2\sqrt{3}}", "7", "n/a")
    checker = check(path)
    assert (kinds(checker), checker.num_unread_answers) == (["gold answer"], 2)
    assert main(["data", "check", str(path)]) == 1
    assert "; 2 gold answers were not checked, for want of math-verify: pip install" in capsys.readouterr().out
    assert main(["data", "check", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["unread_answers"] == 2


def test_lines_that_cannot_be_read_are_found_and_the_rest_is_checked(tmp_path):
    path = write(
        tmp_path / "p.jsonl", ["{", {"question": "q"}, {"messages": FIRST}, "[]", {"question": "q", "answer": "5"}]
    )
    checker = check(path)
    assert kinds(checker) == ["layout"] * 4
    assert checker.num_entries == 1
    assert "expected non-empty text" in checker.findings[1].detail
    manifest_path(path).write_text("{}")
    assert kinds(check(path)) == ["layout"] * 5


def test_duplicates_are_found_across_files(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"question": "How many apples?", "answer": "5"}])
    second = write(tmp_path / "b.jsonl", [{"question": "how many  APPLES", "answer": "6"}, PROBLEMS[0]])
    checker = check(first, second)
    assert [(f.kind, f.where, f.detail) for f in checker.findings] == [
        ("duplicate", f"{second}:1", f"the same as {first}:1")
    ]
    # Another solution of the same question is none.
    other = [FIRST[0], {"role": "assistant", "content": "1 + 2 = 3"}]
    write_supervision(tmp_path / "s.jsonl", [SupervisionExample(m, []) for m in (FIRST, other, FIRST)])
    assert [(f.kind, f.where) for f in check(tmp_path / "s.jsonl").findings] == [("duplicate", f"{tmp_path}/s.jsonl:3")]


def test_contamination_is_found(tmp_path):
    words = [
        "Tom",
        "has",
        "three",
        "boxes",
        "of",
        "apples",
        "and",
        "every",
        "box",
        "of",
        "his",
        "holds",
        "four",
        "red",
        "apples",
    ]
    assert len(words) == 15
    text = " ".join(words)
    test = write(tmp_path / "test.jsonl", [{"question": f"{text}. How many?", "answer": "12"}, PROBLEMS[0]])
    train = write(
        tmp_path / "train.jsonl",
        [
            PROBLEMS[0],
            {"question": f"Once upon a time, {text.upper()}! Why?", "answer": "5"},
            {"question": " ".join(words[:12]), "answer": "5"},  # short enough for chance
        ],
    )
    checker = check(train, test=[test])
    assert [(f.kind, f.where) for f in checker.findings] == [("contamination", f"{train}:{i}") for i in (1, 2)]
    assert "13 words in a row" in checker.findings[1].detail
    examples = [SupervisionExample([{"role": "user", "content": PROBLEMS[0]["question"]}, FIRST[1]], [])]
    write_supervision(tmp_path / "s.jsonl", examples)
    assert kinds(check(tmp_path / "s.jsonl", test=[test])) == ["contamination"]


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="expected a JSON-lines file"):
        check(tmp_path / "none.jsonl")


def test_the_command_line_reports_and_exits(tmp_path, capsys):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "s.jsonl"
    bad = [dataclasses.replace(SupervisionExample(FIRST, [PAIR._replace(position=50)]), id=str(i)) for i in range(12)]
    write_supervision(path, [SupervisionExample(FIRST, [PAIR])])
    arguments = ["data", "check", str(path)]
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*arguments, *tokenizer]) == 0
    assert capsys.readouterr().out == "1 entries read, 0 findings\n"
    assert main(arguments) == 0
    assert "positions were not checked" in capsys.readouterr().out
    write_supervision(path, bad)
    assert main([*arguments, *tokenizer]) == 1
    out = capsys.readouterr().out
    assert "position: 12\n" in out
    assert "and 2 more" in out
    assert main([*arguments, *tokenizer, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["entries"], result["positions_checked"]) == (12, True)
    assert {finding["kind"] for finding in result["findings"]} == {"position", "duplicate"}
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    assert "expected a JSON-lines file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*arguments, "--tokenizer", str(tmp_path / "empty")]) == 2
    assert "--tokenizer: expected" in capsys.readouterr().err
