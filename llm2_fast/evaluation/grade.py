"""`grade`: records from generations, with answers found, judged and counted as votes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llm2_fast.answers import AnswerKind, answers_equal, extract_answer, parse_number
from llm2_fast.evaluation.arms import Arm
from llm2_fast.evaluation.record import Record, SampleRecord
from llm2_fast.problems import Problem
from llm2_fast.results import Generation, Sample

_COMPLETE = ("eos", "stop")  # a text that was cut off states no answer by its last number


def grade(problem: Problem, arm: Arm, generation: Generation, seconds: float) -> Record:
    """The record of a problem in an arm.

    A sample that ended with an error states no answer, whatever it had come to by then: it is wrong and no vote.

    Args:
        problem: With its gold answer.
        arm: Where the generation comes from.
        generation: `n` solutions.
        seconds: Its share of the time.
    """
    gold, samples, stats = problem.gold, generation.samples, generation.stats
    answers = [
        None if s.finish_reason == "error" else extract_answer(s.text, complete=s.finish_reason in _COMPLETE)
        for s in samples
    ]
    votes = count_votes(answers, gold.kind)
    can_be_reranked = not arm.steered and len(samples) > 1
    graded = [
        SampleRecord(
            text=sample.text,
            answer=answer,
            right=answer is not None and answers_equal(answer, gold.text, gold.kind),
            vote=vote,
            num_tokens=len(sample.token_ids),
            finish_reason=sample.finish_reason,
            error=sample.error,
            token_ids=sample.token_ids if can_be_reranked else None,
        )
        for sample, answer, vote in zip(samples, answers, votes, strict=True)
    ]
    return Record(
        problem_id=problem.id,
        arm=arm.key,
        samples=graded,
        steps=stats.steps,
        ambiguous_steps=stats.ambiguous_steps,
        interventions=stats.interventions,
        cut_steps=stats.cut_steps,
        num_candidates=sum(size * count for size, count in stats.candidate_histogram.items()),
        verifier_rows=stats.verifier_rows,
        margins=score_margins(samples),
        seconds=seconds,
    )


def count_votes(answers: Sequence[str | None], kind: AnswerKind) -> list[int | None]:
    """For each answer the index of the first one equal to it; None for none, and for what is no number among numbers.

    Args:
        answers: Of the samples of one problem.
        kind: How they are compared; see `answers_equal`.
    """
    votes: list[int | None] = []
    firsts: list[int] = []
    for index, answer in enumerate(answers):
        if answer is None or (kind == "number" and parse_number(answer) is None):
            votes.append(None)
            continue
        same = (i for i in firsts if answer == answers[i] or answers_equal(answer, answers[i], kind))
        if (first := next(same, index)) == index:
            firsts.append(index)
        votes.append(first)
    return votes


def score_margins(samples: Sequence[Sample]) -> dict[str, int]:
    """Ambiguous steps by the best score less the second best, to one decimal; empty without traces."""
    margins = Counter(
        f"{best - second:.1f}"
        for sample in samples
        for step in sample.trace or ()
        if step.scores is not None
        for second, best in [sorted(step.scores)[-2:]]
    )
    return dict(sorted(margins.items(), key=lambda entry: float(entry[0])))
