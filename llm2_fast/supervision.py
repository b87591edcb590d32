"""Supervision for verifiers: solutions, and tokens that should have been chosen against tokens that should not.

The layout is that of the official LLM2 release: JSON lines with `messages` and `samples`. Two keys may follow,
`quality` beside the samples and `spared` for what was measured and is no negative.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2_fast.errors import ArgumentError
from llm2_fast.prompts import encode_prompt

FORMAT_VERSION = 1
SHARD_PATTERN = "shard-*.jsonl"
UNFINISHED = ".part"  # behind the name of a shard that is being written


class TokenPair(NamedTuple):
    """A token that should have been chosen, and one that should not.

    Attributes:
        position: Index into `tokenize_messages(messages)` of the token both compete for; both see what stands before.
        ground_truth_id: The positive, `input_ids[position]`; another token with `positive="best"` of `explore`, to be
            scored like a negative.
        negative_id: The negative.
    """

    position: int
    ground_truth_id: int
    negative_id: int


@dataclass(frozen=True)
class TokenQuality:
    """What was measured of a token (LLM2, section 2.3).

    Attributes:
        quality: Q, the mean over continuations; with correctness `right / done`. None if nothing was sampled.
        right: Continuations that end in the right answer; None if quality is not correctness.
        done: Continuations looked at. Fewer than `n` when more could not have changed the verdict.
        n: Continuations asked for; 0 if nothing was to be sampled.
        plausible: The solution's own token was plausible at this position, so decoding chooses between the two.
        logprob: System 1's log-probability of the token.
    """

    quality: float | None
    right: int | None
    done: int
    n: int
    plausible: bool
    logprob: float

    def is_below(self, threshold: float) -> bool:
        """Whether Q of all `n` continuations is below `threshold`.

        Raises:
            ArgumentError: Nothing was sampled, or sampling stopped before this threshold was decided.
        """
        if self.quality is not None:
            verdict = self.quality < threshold
            if self.right is not None:
                verdict = below_threshold(self.right, self.done, self.n, threshold)
            if verdict is not None:
                return verdict
        raise ArgumentError("threshold", "one that the exploration decided", threshold)


@dataclass(frozen=True)
class SupervisionExample:
    """One solution with its token pairs.

    Attributes:
        messages: The chat: the user's question, then the assistant's solution.
        samples: Token pairs, by position.
        quality: Of each sample's negative; None if it was not recorded.
        spared: Pairs that were measured and whose second token turned out to be no negative, or was not drawn.
        spared_quality: Of each spared pair's second token.
        id: What tells its problem from others; None in files that have no ids.
        skipped: Why there is no supervision for this problem; None if there is.
    """

    messages: list[dict[str, str]]
    samples: list[TokenPair]
    quality: list[TokenQuality] | None = None
    spared: list[TokenPair] = dataclasses.field(default_factory=list)
    spared_quality: list[TokenQuality] = dataclasses.field(default_factory=list)
    id: str | None = None
    skipped: str | None = None

    def with_threshold(self, threshold: float) -> SupervisionExample:
        """The same with every measured token whose quality is below `threshold` as a negative, the others spared.

        Raises:
            ArgumentError: Qualities were not measured, or not to the end for this threshold.
        """
        if self.quality is None:
            raise ArgumentError("quality", "supervision with recorded qualities", None)
        measured = list(zip([*self.samples, *self.spared], [*self.quality, *self.spared_quality], strict=True))
        measured.sort(key=lambda entry: (entry[0].position, -entry[1].logprob, entry[0].negative_id))
        parts: dict[bool, list[tuple[TokenPair, TokenQuality]]] = {True: [], False: []}
        for pair, quality in measured:
            parts[pair.negative_id != pair.ground_truth_id and quality.is_below(threshold)].append((pair, quality))
        return dataclasses.replace(
            self,
            samples=[pair for pair, _ in parts[True]],
            quality=[quality for _, quality in parts[True]],
            spared=[pair for pair, _ in parts[False]],
            spared_quality=[quality for _, quality in parts[False]],
        )

    def to_json(self) -> str:
        """One line, without its end. Keys that hold nothing are left out."""
        entry: dict[str, Any] = {"id": self.id, "messages": self.messages, "samples": self.samples}
        entry |= {"quality": _json_qualities(self.quality), "spared": self.spared or None}
        entry |= {"spared_quality": _json_qualities(self.spared_quality) or None, "skipped": self.skipped}
        return json.dumps({key: value for key, value in entry.items() if value is not None}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str, where: str) -> SupervisionExample:
        """The example of a line; `where` is what errors call it.

        Raises:
            ArgumentError: It is not of the layout.
        """
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ArgumentError(where, "a JSON object", str(error)) from error
        if not isinstance(entry, dict):
            raise ArgumentError(where, "a JSON object", type(entry).__name__)
        samples, spared = (_parse_pairs(entry.get(key), f"{where}.{key}") for key in ("samples", "spared"))
        if samples is None:
            raise ArgumentError(f"{where}.samples", "a list of [position, ground_truth_id, negative_id]", None)
        spared = spared or []
        return cls(
            messages=_parse_messages(entry.get("messages"), f"{where}.messages"),
            samples=samples,
            quality=_parse_qualities(entry.get("quality"), len(samples), f"{where}.quality"),
            spared=spared,
            spared_quality=_parse_qualities(entry.get("spared_quality", []), len(spared), f"{where}.spared_quality"),
            id=entry.get("id"),
            skipped=entry.get("skipped"),
        )


@dataclass(frozen=True)
class Manifest:
    """What supervision was made with. Supervision is good for this model, tokenizer and chat template only.

    Attributes:
        model: Name of the model.
        model_fingerprint: `llm2_fast.models.fingerprint.fingerprint` of it.
        tokenizer_hash: `llm2_fast.models.loading.tokenizer_hash`.
        chat_template_hash: `llm2_fast.prompts.chat_template_hash`.
        options: Of the exploration: alpha, top_k, n, threshold, seed and so on.
        llm2_fast_version: That wrote it.
        format_version: Of the layout.
    """

    model: str
    model_fingerprint: str
    tokenizer_hash: str
    chat_template_hash: str
    options: dict[str, Any]
    llm2_fast_version: str
    format_version: int = FORMAT_VERSION

    def differences(self, other: Manifest) -> str:
        """What makes results of the two differ, for people; empty if nothing does."""
        mine, theirs = (
            {
                **dataclasses.asdict(manifest),
                **manifest.options,
                "options": None,
                "model": None,
                "llm2_fast_version": None,
            }
            for manifest in (self, other)
        )
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return "; ".join(f"{name} {mine.get(name)!r} there, {theirs.get(name)!r} here" for name in names)

    def to_json(self) -> str:
        """Indented, for people."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in a file.

        Raises:
            ArgumentError: It is none, or of another format version.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArgumentError(str(path), "a manifest", str(error)) from error
        if not isinstance(entry, dict) or entry.get("format_version") != FORMAT_VERSION or set(entry) != names:
            raise ArgumentError(str(path), f"a manifest of format version {FORMAT_VERSION}", repr(entry)[:200])
        return cls(**entry)


@dataclass(frozen=True)
class Supervision:
    """Examples, and what they were made with (None if nothing says so, as in the official release)."""

    examples: list[SupervisionExample]
    manifest: Manifest | None


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Where the manifest of a supervision file (`x.jsonl`: `x.manifest.json`) or directory (`manifest.json`) stands."""
    path = Path(path)
    return path / "manifest.json" if path.is_dir() else path.with_suffix(".manifest.json")


def supervision_files(path: str | os.PathLike[str]) -> list[Path]:
    """The JSON-lines files behind a path: itself, or the finished shards of a directory.

    Raises:
        ArgumentError: There is none.
    """
    path = Path(path)
    files = sorted(path.glob(SHARD_PATTERN)) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ArgumentError("supervision", f"a JSON-lines file, or a directory with {SHARD_PATTERN}", str(path))
    if unfinished := [file.name for file in path.glob(f"{SHARD_PATTERN}{UNFINISHED}")]:
        message = f"supervision {str(path)!r}: {unfinished[0]} is left out, an exploration writes it or was interrupted"
        warnings.warn(message, stacklevel=2)
    return files


def read_supervision(path: str | os.PathLike[str]) -> Supervision:
    """Supervision from a JSON-lines file, or from the shards in a directory that `explore` wrote.

    Raises:
        ArgumentError: There is nothing to read, or a line is not of the layout; the message names file and line.
    """
    examples = [example for file in supervision_files(path) for example in _read_lines(file)]
    manifest = manifest_path(path)
    return Supervision(examples, Manifest.read(manifest) if manifest.is_file() else None)


def write_supervision(
    path: str | os.PathLike[str], examples: Iterable[SupervisionExample], manifest: Manifest | None = None
) -> None:
    """Write a JSON-lines file, and its manifest beside it if there is one."""
    path = Path(path)
    path.write_text("".join(f"{example.to_json()}\n" for example in examples), encoding="utf-8")
    if manifest is not None:
        manifest_path(path).write_text(manifest.to_json(), encoding="utf-8")


def tokenize_messages(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The `input_ids` that positions index: the chat through the chat template, without a generation prompt.

    Raises:
        ArgumentError: The chat template refuses the messages.
    """
    return encode_prompt(messages, tokenizer, len(tokenizer), "messages", add_generation_prompt=False)


def check_positions(example: SupervisionExample, input_ids: list[int], where: str, *, own_tokens: bool = True) -> None:
    """Raise `ArgumentError` unless every pair of `example` belongs to `input_ids`.

    Args:
        example: As read.
        input_ids: `tokenize_messages(example.messages, tokenizer)`.
        where: What the error calls the example.
        own_tokens: The positives are the solution's own tokens; not so with `positive="best"` of `explore`.
    """
    for index, (position, ground_truth_id, _) in enumerate(example.samples):
        if not 0 < position < len(input_ids):
            raise ArgumentError(f"{where}.samples[{index}]", f"a position in [1, {len(input_ids)})", position)
        if own_tokens and input_ids[position] != ground_truth_id:
            expected = f"the solution's token {input_ids[position]} at position {position}"
            raise ArgumentError(f"{where}.samples[{index}]", expected, ground_truth_id)


def below_threshold(right: int, done: int, n: int, threshold: float) -> bool | None:
    """Whether `right / n` is below `threshold` after `n` continuations; None if `done` of them leave that open."""
    low, high = right / n < threshold, (right + n - done) / n < threshold
    return low if low == high else None


def _read_lines(path: Path) -> Iterator[SupervisionExample]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            yield SupervisionExample.from_json(line, f"{path.name}:{number}")


def _parse_messages(messages: Any, where: str) -> list[dict[str, str]]:
    texts = ("role", "content")
    if not isinstance(messages, list) or not messages:
        raise ArgumentError(where, "a list of messages", repr(messages)[:80])
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in texts):
            raise ArgumentError(f"{where}[{index}]", "an object with role and content", repr(message)[:80])
    return messages


def _parse_pairs(pairs: Any, where: str) -> list[TokenPair] | None:
    if pairs is None:
        return None
    if not isinstance(pairs, list):
        raise ArgumentError(where, "a list of [position, ground_truth_id, negative_id]", repr(pairs)[:80])
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 3 or not all(type(x) is int and x >= 0 for x in pair):
            raise ArgumentError(f"{where}[{index}]", "[position, ground_truth_id, negative_id]", repr(pair)[:80])
    return [TokenPair(*pair) for pair in pairs]


def _json_qualities(qualities: list[TokenQuality] | None) -> list[dict[str, Any]] | None:
    return None if qualities is None else [dataclasses.asdict(quality) for quality in qualities]


def _parse_qualities(qualities: Any, count: int, where: str) -> list[TokenQuality] | None:
    if qualities is None:
        return None
    names = {field.name for field in dataclasses.fields(TokenQuality)}
    if not isinstance(qualities, list) or len(qualities) != count:
        raise ArgumentError(where, f"{count} entries, one per pair", repr(qualities)[:80])
    for index, entry in enumerate(qualities):
        if not isinstance(entry, dict) or set(entry) != names:
            raise ArgumentError(f"{where}[{index}]", f"an object with {', '.join(sorted(names))}", repr(entry)[:80])
    return [TokenQuality(**entry) for entry in qualities]
