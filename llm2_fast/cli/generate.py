"""`llm2-fast generate`: continue prompts."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from llm2_fast.cli.json_lines import print_json
from llm2_fast.cli.options import add_generation_options, add_load_options, generation_config, load_options
from llm2_fast.cli.prompts import read_prompts
from llm2_fast.config import GenerationConfig
from llm2_fast.results import Generation, Sample, TraceStep

if TYPE_CHECKING:
    from llm2_fast.engine import Engine

SUMMARY = "continue prompts with a model, steered by a verifier if one is given"
_DEFAULTS = GenerationConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `generate`."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, or the path of a GGUF file")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="read from standard input if there is none")
    parser.add_argument("--verifier", metavar="VERIFIER", help="directory or hub id; without it, plain decoding")
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt per line, or JSON lines with a key prompt (text or token ids) or messages (chat); "
        "- is standard input",
    )
    parser.add_argument("--chat", action="store_true", help="make every prompt that is text a user message")
    parser.add_argument("--json", action="store_true", help="print a JSON object per prompt, with statistics")
    add_generation_options(parser, _DEFAULTS)
    add_load_options(parser)


def run(options: argparse.Namespace) -> int:
    """Continue the prompts, print what comes; 1 if a sample ended with an error."""
    config = generation_config(options, _DEFAULTS)
    prompts = read_prompts(options.prompts, options.prompts_file, chat=options.chat)
    from llm2_fast.engine import load  # brings torch and transformers, so not before the input is known to be usable

    engine = load(options.model, options.verifier, **load_options(options))
    if not options.json and len(prompts) == config.n == 1 and sys.stdout.isatty():
        return _stream(engine, prompts[0], config)
    generations = engine.generate(prompts, config)
    if options.json:
        for generation in generations:
            print_json(generation)
    else:
        _print_texts(engine, generations)
    return int(any(sample.error for generation in generations for sample in generation.samples))


def _stream(engine: Engine, prompt: Any, config: GenerationConfig) -> int:
    trace: list[TraceStep] = []
    error = None
    for event in engine.stream(prompt, config):
        print(f"{event.token_id} " if event.text is None else event.text, end="", flush=True)
        error = event.error
        if event.trace is not None:
            trace.append(event.trace)
    print()
    _report(engine, error, trace)
    return int(error is not None)


def _print_texts(engine: Engine, generations: list[Generation]) -> None:
    """All texts, under a heading each if there are several."""
    samples = [
        (p, s, sample) for p, generation in enumerate(generations) for s, sample in enumerate(generation.samples)
    ]
    for prompt_index, sample_index, sample in samples:
        if len(samples) > 1:
            print(f"==> prompt {prompt_index}, sample {sample_index} <==")
        print(_text(sample))
        _report(engine, sample.error, sample.trace)


def _text(sample: Sample) -> str:
    return " ".join(map(str, sample.token_ids)) if sample.text is None else sample.text


def _report(engine: Engine, error: str | None, trace: list[TraceStep] | None) -> None:
    """An error, and the trace if there is one, beside the text: on standard error."""
    if error is not None:
        print(f"sample ended with an error: {error}", file=sys.stderr)
    if trace:
        from llm2_fast.cli.display import make_display
        from llm2_fast.cli.trace_view import show_steps

        show_steps(make_display(sys.stderr), trace, engine.tokenizer, interventions_only=False)
