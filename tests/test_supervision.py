"""The layout of supervision files."""

import json

import pytest

from llm2_fast import ArgumentError
from llm2_fast.prompts import encode_prompt
from llm2_fast.supervision import (
    Manifest,
    SupervisionExample,
    TokenPair,
    TokenQuality,
    check_positions,
    manifest_path,
    read_supervision,
    tokenize_messages,
    write_supervision,
)
from tiny_tokenizer import tokenizer

TOKENIZER = tokenizer()
MESSAGES = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8 w9"}]
PAIR = TokenPair(4, 7, 12)
QUALITY = TokenQuality(0.25, 5, 20, 20, True, -1.5)
FULL = SupervisionExample(MESSAGES, [PAIR], [QUALITY], [TokenPair(5, 8, 9)], [QUALITY], id="a")
MANIFEST = Manifest("tiny", "f" * 32, "0" * 32, "1" * 32, {"alpha": 0.1, "thresholds": [0.5]}, "0.1.0")


@pytest.mark.parametrize(
    "example", [FULL, SupervisionExample(MESSAGES, [PAIR]), SupervisionExample(MESSAGES[:1], [], skipped="why")]
)
def test_files_come_back_as_written(tmp_path, example):
    path = tmp_path / "s.jsonl"
    write_supervision(path, [example, FULL], MANIFEST)
    read = read_supervision(path)
    assert (read.examples, read.manifest) == ([example, FULL], MANIFEST)


def test_the_official_layout_is_read(tmp_path):
    path = tmp_path / "official.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES, "samples": [[4, 7, 12], [4, 7, 12]]}) + "\n\n")
    read = read_supervision(path)
    assert read.examples == [SupervisionExample(MESSAGES, [PAIR, PAIR])]
    assert read.manifest is None


def test_the_shards_of_a_directory_are_read_in_order(tmp_path):
    examples = [SupervisionExample(MESSAGES, [], id=str(i)) for i in range(3)]
    write_supervision(tmp_path / "shard-00001.jsonl", examples[2:])
    write_supervision(tmp_path / "shard-00000.jsonl", examples[:2])
    manifest_path(tmp_path).write_text(MANIFEST.to_json())
    read = read_supervision(tmp_path)
    assert (read.examples, read.manifest) == (examples, MANIFEST)


def test_positions_index_the_chat_template():
    input_ids = tokenize_messages(MESSAGES, TOKENIZER)
    prompt = encode_prompt(MESSAGES[:1], TOKENIZER, len(TOKENIZER), "prompt")
    assert input_ids[: len(prompt)] == prompt
    assert input_ids[PAIR.position] == PAIR.ground_truth_id
    check_positions(FULL, input_ids, "here")
    for pair, message in {
        TokenPair(4, 8, 12): r"here.samples\[0\]: expected the solution's token 7 at position 4, got 8",
        TokenPair(0, input_ids[0], 12): r"here.samples\[0\]: expected a position in \[1, 7\), got 0",
        TokenPair(7, 7, 12): "got 7",
    }.items():
        with pytest.raises(ArgumentError, match=message):
            check_positions(SupervisionExample(MESSAGES, [pair]), input_ids, "here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "s.jsonl:1: expected a JSON object"),
        ("[]", "s.jsonl:1: expected a JSON object, got list"),
        ('{"samples": []}', "s.jsonl:1.messages: expected a list of messages"),
        ('{"messages": [{"role": "user"}], "samples": []}', r"s.jsonl:1.messages\[0\]: expected an object with role"),
        (json.dumps({"messages": MESSAGES}), "s.jsonl:1.samples: expected a list"),
        (json.dumps({"messages": MESSAGES, "samples": [[1, 2]]}), r"s.jsonl:1.samples\[0\]: expected \[position"),
        (json.dumps({"messages": MESSAGES, "samples": [[1, 2, -1]]}), r"samples\[0\]: expected \[position"),
        (json.dumps({"messages": MESSAGES, "samples": [[1, 2, 3]], "quality": []}), "quality: expected 1 entries"),
        (
            json.dumps({"messages": MESSAGES, "samples": [], "spared": [[1, 2, 3]]}),
            "spared_quality: expected 1 entries",
        ),
        (json.dumps({"messages": MESSAGES, "samples": [[1, 2, 3]], "quality": [{}]}), r"quality\[0\]: expected an obj"),
    ],
)
def test_lines_of_another_layout_are_refused(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text(line)
    with pytest.raises(ArgumentError, match=message):
        read_supervision(path)


def test_missing_files_and_other_manifests_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ArgumentError, match="supervision: expected a JSON-lines file"):
            read_supervision(path)
    write_supervision(tmp_path / "s.jsonl", [FULL])
    for text in ("nonsense", "{}", MANIFEST.to_json().replace('"format_version": 1', '"format_version": 2')):
        manifest_path(tmp_path / "s.jsonl").write_text(text)
        with pytest.raises(ArgumentError, match="expected a manifest"):
            read_supervision(tmp_path / "s.jsonl")


def test_another_threshold_takes_what_was_measured():
    low, middle = TokenQuality(0.1, 2, 20, 20, True, -0.5), TokenQuality(0.4, 8, 20, 20, True, -2.0)
    pairs = [TokenPair(4, 7, 12), TokenPair(4, 7, 11), TokenPair(5, 8, 8)]
    example = SupervisionExample(MESSAGES, pairs[:1], [low], pairs[1:], [middle, low], id="a")
    more = example.with_threshold(0.5)
    assert (more.samples, more.quality) == ([pairs[0], pairs[1]], [low, middle])
    assert (more.spared, more.spared_quality) == ([pairs[2]], [low])  # the positive itself is never a negative
    assert more.with_threshold(0.25) == example
    assert example.with_threshold(0.05).samples == []
    bypassed = SupervisionExample(MESSAGES, pairs[:1], [TokenQuality(None, None, 0, 0, True, -0.5)])
    for unmeasured in (SupervisionExample(MESSAGES, pairs[:1]), bypassed):
        with pytest.raises(ArgumentError, match="quality|threshold"):
            unmeasured.with_threshold(0.5)
