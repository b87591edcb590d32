"""`llm2-fast trace`: a page that shows what System 2 did, token by token."""

from __future__ import annotations

import argparse
from pathlib import Path

from llm2_fast.cli.options import add_generation_options, add_load_options, generation_config, load_options
from llm2_fast.cli.prompts import read_prompts
from llm2_fast.config import GenerationConfig
from llm2_fast.errors import ArgumentError

SUMMARY = "write a page that shows what System 2 did, token by token"
_DEFAULTS = GenerationConfig(trace=True)
_OPTIONS = tuple(name for name in GenerationConfig.option_names() if name != "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trace`."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, or the path of a GGUF file")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="one; read from standard input if there is none")
    parser.add_argument("--verifier", metavar="VERIFIER", required=True, help="directory or hub id")
    parser.add_argument("--html", metavar="FILE", required=True, help="the page, which needs no other file or network")
    parser.add_argument("--chat", action="store_true", help="make the prompt a user message")
    add_generation_options(parser, _DEFAULTS, _OPTIONS)
    add_load_options(parser)


def run(options: argparse.Namespace) -> int:
    """Continue the prompt and write the page; 1 if a sample ended with an error."""
    config = generation_config(options, _DEFAULTS)
    prompts = read_prompts(options.prompts, None, chat=options.chat)
    if len(prompts) != 1:
        raise ArgumentError("prompt", "one prompt", f"{len(prompts)} prompts")
    page = Path(options.html)
    if not page.parent.is_dir():
        raise ArgumentError("--html", "a file in a directory that is there", str(page))
    from llm2_fast.cli.trace_page import trace_page  # these bring torch and transformers
    from llm2_fast.engine import load

    engine = load(options.model, options.verifier, **load_options(options))
    (generation,) = engine.generate(prompts, config)
    title = f"{Path(engine.model.name).name} with a {engine.verifier.kind} verifier"
    page.write_text(trace_page(generation, engine.tokenizer, config, title), encoding="utf-8")
    return int(any(sample.error for sample in generation.samples))
