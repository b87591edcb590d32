"""`read_plain`: records of plain decoding that an earlier evaluation left, if they are what would be decoded now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llm2_fast.errors import ArgumentError
from llm2_fast.evaluation.arms import PLAIN
from llm2_fast.evaluation.record import Record, read_records, record_id
from llm2_fast.problems import Problem
from llm2_fast.supervision import Manifest, manifest_path

_OF_VERIFIER = ("verifier", "max_length")  # the latter is at most the verifier's context, and changes no token


def read_plain(plain: str | os.PathLike[str], manifest: Manifest, problems: Sequence[Problem]) -> dict[str, Record]:
    """By problem id, records of plain decoding, marked as taken over and without what another verifier thought of them.

    Args:
        plain: Directory of an earlier evaluation.
        manifest: Of the present one. The earlier one's may differ in the verifier only: model, tokenizer, chat
            template, worked examples, sampling options, seed, backend, dtype and quantization are the same.
        problems: All of which must have been decoded there. A problem's id tells its question and answer.

    Raises:
        ArgumentError: `plain` is no such directory.
    """
    if not isinstance(plain, (str, os.PathLike)) or not manifest_path(plain).is_file():
        raise ArgumentError("plain", "the directory of an earlier evaluation", repr(plain))
    directory = Path(plain)
    if differences := _of_plain(Manifest.read(manifest_path(directory))).differences(_of_plain(manifest)):
        raise ArgumentError("plain", "an evaluation with the same model and options", differences)
    records = read_records(directory)
    ids = [record_id(problem.id, PLAIN) for problem in problems]
    if missing := [problem for problem, id in zip(problems, ids, strict=True) if id not in records]:
        actual = f"{len(missing)} missing in {directory}, the first: {missing[0].question[:60]!r}"
        raise ArgumentError("plain", f"a finished evaluation of all {len(problems)} problems", actual)
    found = {problem.id: _without_verifier(records[id]) for problem, id in zip(problems, ids, strict=True)}
    reranked = manifest.options["verifier"] is not None and manifest.options["n"] > 1
    if reranked and any(sample.token_ids is None for record in found.values() for sample in record.samples):
        raise ArgumentError("plain", "records with token ids, to rerank samples", f"records without in {directory}")
    return found


def _of_plain(manifest: Manifest) -> Manifest:
    """What plain decoding depends on."""
    options = {name: value for name, value in manifest.options.items() if name not in _OF_VERIFIER}
    return replace(manifest, options=options)


def _without_verifier(record: Record) -> Record:
    samples = [replace(sample, score=None) for sample in record.samples]
    return replace(record, samples=samples, rerank_seconds=0.0, taken_over=True)
