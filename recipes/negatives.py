"""What explored negatives are about: a sample of them, sorted by the decision that goes wrong."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm2_fast.supervision import Supervision, TokenPair, TokenQuality, read_supervision, tokenize_messages
from recipes.report import table
from recipes.word_problems import NAMES, VERBS, WORKSHOP_VERBS

FORM = "form: a word of another sort, or the end too early or too late"
_VERBS = {verb for verbs in (VERBS, WORKSHOP_VERBS) for sign in verbs for verb in verbs[sign]}


@dataclass(frozen=True)
class Negative:
    """A token that leads astray.

    Attributes:
        category: The decision it is part of.
        written: The line of the solution in front of it.
        ground_truth, token: What should stand there, and what it is.
        quality: Its measured quality.
    """

    category: str
    written: str
    ground_truth: str
    token: str
    quality: TokenQuality


def read_negatives(supervision: Supervision, tokenizer: PreTrainedTokenizerBase) -> Iterator[Negative]:
    """All negatives whose quality was recorded."""
    for example in supervision.examples:
        token_ids = tokenize_messages(example.messages, tokenizer)
        for pair, quality in zip(example.samples, example.quality or [], strict=False):
            yield _read_pair(token_ids, pair, quality, tokenizer)


def _read_pair(
    token_ids: list[int], pair: TokenPair, quality: TokenQuality, tokenizer: PreTrainedTokenizerBase
) -> Negative:
    written = tokenizer.decode(token_ids[: pair.position]).rpartition("\n")[2]
    ground_truth, token = (tokenizer.decode([i]) for i in (pair.ground_truth_id, pair.negative_id))
    return Negative(categorize(written, ground_truth, token), written, ground_truth, token, quality)


def categorize(written: str, ground_truth: str, token: str) -> str:
    """The decision that is wrong.

    Args:
        written: The line of the solution in front of the token.
        ground_truth, token: What should stand there, and what does.
    """
    kind = _kind(ground_truth)
    _, colon, equation = written.rpartition(":")
    if kind == "sign" or kind != _kind(token):
        return "whether a number rises or falls" if kind == "sign" else FORM
    if kind != "digit":
        return {"name": "which event: somebody's name", "verb": "which event: what somebody does"}.get(kind, FORM)
    if not colon:
        return "the answer" if written.startswith("The answer") else "which event: how many"
    return ("the number so far", "the operand", "the result")[sum(character in "+-=" for character in equation)]


def _kind(token: str) -> str:
    word = token.strip()
    if word in NAMES:
        return "name"
    if word in _VERBS:
        return "verb"
    if word.isdigit():
        return "digit"
    return "sign" if word in ("+", "-") else "form"


def describe_negatives(directory: Path, count: int = 50, seed: int = 0) -> str:
    """The shares of all categories, and a sample of negatives.

    Args:
        directory: Of a run of `recipes.arithmetic`.
        count: Negatives in the sample.
        seed: Of the sample.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory / "system1")
    negatives = list(read_negatives(read_supervision(directory / "supervision"), tokenizer))
    counts = Counter(negative.category for negative in negatives)
    zero = Counter(negative.category for negative in negatives if negative.quality.right == 0)
    contested = Counter(negative.category for negative in negatives if negative.quality.plausible)
    shares = (
        (name, f"{number:,}", f"{100 * zero[name] / number:.0f} %", f"{100 * contested[name] / number:.0f} %")
        for name, number in counts.most_common()
    )
    sample = random.Random(seed).sample(negatives, min(count, len(negatives)))
    rows = (
        (n.category, f"`{n.written}`", f"`{n.ground_truth!r}`", f"`{n.token!r}`", f"{n.quality.quality:.2f}")
        for n in sorted(sample, key=lambda n: n.category)
    )
    header = ("category", "negatives", "no continuation was right", "System 1 hesitates: the truth is plausible, too")
    details = ("category", "the line so far", "should be", "negative", "Q")
    return f"{table(header, shares)}\n\n{table(details, rows)}\n"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m recipes.negatives", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/recipes/arithmetic"), help="of recipes.arithmetic")
    parser.add_argument("--count", type=int, default=50)
    options = parser.parse_args(arguments)
    text = describe_negatives(options.output, options.count)
    (options.output / "negatives.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
