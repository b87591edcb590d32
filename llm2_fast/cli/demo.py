"""`llm2-fast demo`: a small model answers questions plainly and with System 2, and shows where they part."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm2_fast.cli.display import Display, PlainDisplay, Segment, make_display
from llm2_fast.cli.json_lines import print_json
from llm2_fast.cli.options import add_generation_options, generation_config
from llm2_fast.config import GenerationConfig
from llm2_fast.models import smollm2
from llm2_fast.results import Generation

if TYPE_CHECKING:
    from llm2_fast.engine import Engine

SUMMARY = "watch System 2 steer a small model"
_DEFAULTS = GenerationConfig(max_new_tokens=48, trace=True)
_QUESTIONS = (
    "What is the capital of Australia?",
    "Why is the sky blue? Answer in one sentence.",
    "Tom has 3 boxes with 4 apples each. How many apples does he have?",
    "A shirt costs 15 dollars and a hat costs 7 dollars. How much do they cost together?",
    "Sara had 10 balloons and gave 3 of them to her friend. How many are left?",
)
_SHOWN_INTERVENTIONS = 5


@dataclass(frozen=True)
class Answer:
    """A question, answered by System 1 alone and with System 2."""

    question: str
    plain: Generation
    verified: Generation


@dataclass(frozen=True)
class Summary:
    """Statistics over all answers.

    Attributes:
        plain_tokens, verified_tokens: Generated.
        ambiguous_share: Share of the verified steps that had more than one candidate.
        interventions: Verified steps whose token System 1 alone would not have chosen.
        mean_candidates: Per verified step.
        plain_tokens_per_second, verified_tokens_per_second: Of decoding, without prefill, one question at a time.
        speed_ratio: Verified to plain.
    """

    plain_tokens: int
    verified_tokens: int
    ambiguous_share: float
    interventions: int
    mean_candidates: float
    plain_tokens_per_second: float
    verified_tokens_per_second: float
    speed_ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    parser.add_argument(
        "--question", metavar="TEXT", action="append", help="ask this instead of the built-in questions; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print answers, traces and statistics as a JSON object")
    add_generation_options(parser, _DEFAULTS, names=("max_new_tokens", "beta"))


def run(options: argparse.Namespace) -> int:
    """Answer the questions, show the answers one by one, then statistics."""
    config = generation_config(options, _DEFAULTS)
    model_file, verifier = smollm2.model_file(), smollm2.default_verifier()
    display = PlainDisplay(sys.stderr, 80) if options.json else make_display(sys.stdout)
    with display.status(f"Loading {smollm2.NAME}; the first time it is converted, which takes about 20 seconds …"):
        verified = _load(model_file, verifier)
        plain = _load(model_file, None, tokenizer=verified.tokenizer)
        for engine in (plain, verified):  # the first tokens are slower, and are not what the statistics are about
            _ask(engine, _QUESTIONS[0], config.merge(max_new_tokens=1))
    if not options.json:
        _show_introduction(display, verified, config)
    answers = []
    for question in options.question or _QUESTIONS:
        if not options.json:
            display.line()
            display.line(Segment(question, "title"))
        with display.status("  answering …"):
            answers.append(Answer(question, _ask(plain, question, config), _ask(verified, question, config)))
        if not options.json:
            _show_answer(display, answers[-1], verified)
    summary = summarize(answers)
    if options.json:
        print_json({"model": smollm2.NAME, "backend": verified.backend, "answers": answers, "summary": summary})
    else:
        _show_summary(display, summary)
    return 0


def _load(*arguments: object, **options: object) -> Engine:
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries, read when they are imported
    from llm2_fast.engine import load

    return load(*arguments, **options)


def _ask(engine: Engine, question: str, config: GenerationConfig) -> Generation:
    return engine.generate([{"role": "user", "content": question}], config)[0]


def summarize(answers: list[Answer]) -> Summary:
    """Statistics over `answers`, at least one."""
    verified = [answer.verified.stats for answer in answers]
    steps = sum(stats.steps for stats in verified)
    candidates = sum(n * count for stats in verified for n, count in stats.candidate_histogram.items())
    plain_tokens, plain_speed = _tokens_and_speed(answer.plain for answer in answers)
    verified_tokens, verified_speed = _tokens_and_speed(answer.verified for answer in answers)
    return Summary(
        plain_tokens=plain_tokens,
        verified_tokens=verified_tokens,
        ambiguous_share=sum(stats.ambiguous_steps for stats in verified) / steps,
        interventions=sum(stats.interventions for stats in verified),
        mean_candidates=candidates / steps,
        plain_tokens_per_second=plain_speed,
        verified_tokens_per_second=verified_speed,
        speed_ratio=verified_speed / plain_speed,
    )


def _tokens_and_speed(generations: Iterable[Generation]) -> tuple[int, float]:
    stats = [generation.stats for generation in generations]
    tokens = sum(s.steps for s in stats)
    return tokens, tokens / sum(s.decode_seconds for s in stats)


def _show_introduction(display: Display, engine: Engine, config: GenerationConfig) -> None:
    from llm2_fast.cli.trace_view import LEGEND

    model = engine.model
    display.line(Segment(f"{smollm2.NAME}, plainly and with System 2", "title"))
    display.paragraph(
        Segment(""),
        [
            Segment(
                f"Greedy, alpha {config.alpha:g}, beta {config.beta:g}, a verifier of kind {engine.verifier.kind}; "
                f"{engine.backend} backend, {str(model.dtype).removeprefix('torch.')}, {model.device.type}. "
                "A model with 135 million parameters is often wrong, and System 2 can be wrong too.",
                "quiet",
            )
        ],
    )
    display.paragraph(Segment(""), LEGEND)


def _show_answer(display: Display, answer: Answer, engine: Engine) -> None:
    from llm2_fast.cli.trace_view import marked_text, show_steps

    (plain,), (verified,) = answer.plain.samples, answer.verified.samples
    display.paragraph(Segment("  System 1  ", "system1"), [Segment(plain.text.strip())])
    display.paragraph(Segment("  System 2  ", "system2"), list(marked_text(verified.trace, engine.tokenizer)))
    for sample in (plain, verified):
        if sample.error:
            display.line(Segment(f"  ended with an error: {sample.error}"))
    interventions = [number for number, step in enumerate(verified.trace, 1) if step.intervention]
    if not interventions:
        display.line(Segment("  no interventions", "quiet"))
    shown = verified.trace[: max(interventions[:_SHOWN_INTERVENTIONS], default=0)]
    show_steps(display, shown, engine.tokenizer, interventions_only=True)
    if (left_out := len(interventions) - _SHOWN_INTERVENTIONS) > 0:
        display.line(Segment(f"  and {left_out} more interventions", "quiet"))


def _show_summary(display: Display, summary: Summary) -> None:
    display.line()
    display.line(Segment("In total", "title"))
    tokens = (
        f"{summary.verified_tokens} tokens with System 2: {summary.ambiguous_share:.0%} of the steps ambiguous, "
        f"{summary.mean_candidates:.1f} candidates on average, {summary.interventions} interventions"
    )
    speed = (
        f"{summary.verified_tokens_per_second:.1f} tokens/s with System 2, {summary.plain_tokens_per_second:.1f} "
        f"plainly ({summary.plain_tokens} tokens): ratio {summary.speed_ratio:.2f}"
    )
    for text in (tokens, speed):
        display.paragraph(Segment("  "), [Segment(text)])
