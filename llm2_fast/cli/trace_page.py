"""`trace_page`: a generation as one HTML page that needs nothing else, not even scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape

from transformers import PreTrainedTokenizerBase

from llm2_fast.config import GenerationConfig
from llm2_fast.detokenizer import Detokenizer
from llm2_fast.results import Generation, Sample, TraceStep

_CLOSE = (0.25, 0.5, 1.0, 2.0)  # margins below these get colours, the smallest the strongest
_PART = "\N{WHITE VERTICAL RECTANGLE}"  # stands for a token that is only part of a character

# Candidates have a panel of their own, below the text or, on wide screens, beside it, so that they hide no token.
_STYLE = """
:root { color-scheme: light dark; --changed: #1a7f37; --warm: 255, 150, 30;
  --card: #f6f7f9; --line: #ccc; --quiet: #6a6a6a; }
@media (prefers-color-scheme: dark) {
  :root { --changed: #238636; --warm: 215, 110, 10; --card: #22262c; --line: #444; --quiet: #999; }
}
html { scroll-padding-bottom: 42vh; }
body { font: 16px/1.6 system-ui, sans-serif; margin: 0; padding: 1rem max(1rem, 50vw - 30rem) 42vh; }
.panel { position: fixed; box-sizing: border-box; inset: 60vh 0 0 0; overflow: auto; background: var(--card);
  padding: .6rem max(1rem, 50vw - 30rem); border: 0 solid var(--line); border-top-width: 1px; }
@media (min-width: 75rem) {
  html { scroll-padding-bottom: 0; }
  body { margin-right: 36rem; padding: 1rem max(2rem, 50vw - 48rem); }
  .panel { inset: 0 0 0 auto; width: 36rem; padding: 1rem; border-width: 0 0 0 1px; }
}
@media print { body { margin: 0; } .panel { display: none; } }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin-top: 2rem; }
.text, .card { font: 15px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.quiet, .prompt { color: var(--quiet); }
.shades { white-space: nowrap; }
.token { display: inline; border-radius: 3px; cursor: default; }
.token:hover, .token:focus { outline: 2px solid CanvasText; }
.close0 { background: rgba(var(--warm), .75); } .close1 { background: rgba(var(--warm), .5); }
.close2 { background: rgba(var(--warm), .32); } .close3 { background: rgba(var(--warm), .16); }
.below { border-bottom: 2px dotted currentColor; }
.changed { background: var(--changed); color: #fff; } .changed .quiet { color: inherit; }
.card { display: none; font-size: 14px; color: CanvasText; }
.token:hover .card, .token:focus .card { display: block; }
.token:hover .card { z-index: 1; }
table { border-collapse: collapse; } td, th { padding: 0 .5rem; text-align: right; font-weight: normal; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
td { white-space: pre; } th { color: var(--quiet); overflow-wrap: normal; }
tr.chosen td { font-weight: bold; }
@media (max-width: 36rem) { .card { font-size: 12px; } td, th { padding: 0 .25rem; } }
""".strip()

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<aside class="panel quiet">Point at a token to see its candidates; click on it to keep them here.</aside>
<h1>{title}</h1>
<p class="quiet">{summary}</p>
<p>{legend}</p>
<h2>Prompt</h2>
<div class="text prompt">{prompt}</div>
{samples}
</body>
</html>
"""


def trace_page(
    generation: Generation, tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig, title: str
) -> str:
    """The page.

    Every token is coloured by what System 2 had to do with it: its own choices, and how closely others were decided.
    Pointing at a token, or moving to it with the tab key, shows its candidates; clicking on it keeps them.

    Args:
        generation: Traced, with a verifier.
        tokenizer: Names the tokens; without one their ids are shown.
        config: That it was generated with.
        title: Of the page.
    """
    prompt = str(generation.prompt_token_ids) if tokenizer is None else tokenizer.decode(generation.prompt_token_ids)
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        summary=escape(_summary(generation, config)),
        legend=_legend(),
        prompt=escape(prompt),
        samples="\n".join(_sample(i, s, tokenizer, config) for i, s in enumerate(generation.samples)),
    )


def margin(step: TraceStep) -> float | None:
    """The chosen token's adjusted logit less the largest of the others; None if there is no other."""
    pairs = list(zip(step.candidate_ids, step.adjusted_logits, strict=True))
    others = [logit for token, logit in pairs if token != step.token_id]
    return dict(pairs)[step.token_id] - max(others) if others else None


def _summary(generation: Generation, config: GenerationConfig) -> str:
    stats = generation.stats
    steps = max(stats.steps, 1)
    return (
        f"alpha {config.alpha:g}, beta {config.beta:g}, temperature {config.temperature:g}; {stats.steps} tokens, "
        f"{stats.ambiguous_steps / steps:.0%} of them ambiguous, {stats.interventions} interventions"
    )


def _legend() -> str:
    shades = " ".join(
        f'<span class="close{i}">&nbsp;&lt;&nbsp;{bound:g}&nbsp;</span>' for i, bound in enumerate(_CLOSE)
    )
    return (
        '<span class="changed">&nbsp;System 2 chose this&nbsp;</span> instead of System 1\'s token. Else by margin, '
        f'the adjusted logit less the next best: <span class="shades">{shades}</span>; '
        '<span class="below">drawn against a better one</span>; '
        "plain: nothing to decide, or decided clearly."
    )


def _sample(index: int, sample: Sample, tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig) -> str:
    tokens = "".join(
        _token(number, step, text, tokenizer, config)
        for number, (step, text) in enumerate(zip(sample.trace, _texts(sample.trace, tokenizer), strict=True), 1)
    )
    end = sample.finish_reason if sample.error is None else f"{sample.finish_reason}: {sample.error}"
    return (
        f'<h2>Sample {index}</h2>\n<div class="text">{tokens}</div>\n<p class="quiet">finish reason: {escape(end)}</p>'
    )


def _texts(trace: Sequence[TraceStep], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """What each token adds to the text; special tokens by their names."""
    if tokenizer is None:
        yield from (f"{step.token_id} " for step in trace)
        return
    detokenizer, special = Detokenizer(tokenizer), set(tokenizer.all_special_ids)
    for number, step in enumerate(trace, 1):
        text = detokenizer.push(step.token_id)
        if number == len(trace):
            text += detokenizer.finish()
        yield text or (tokenizer.decode([step.token_id]) if step.token_id in special else _PART)


def _token(
    number: int, step: TraceStep, text: str, tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig
) -> str:
    shown = escape(text).replace("\n", '<span class="quiet">↵</span>\n')
    return f'<div class="token {_class(step)}" tabindex="0">{shown}{_card(number, step, tokenizer, config)}</div>'


def _class(step: TraceStep) -> str:
    distance = margin(step)
    if step.intervention:
        return "changed"
    if distance is None:
        return "clear"
    if distance < 0:
        return "below"
    return next((f"close{i}" for i, bound in enumerate(_CLOSE) if distance < bound), "clear")


def _card(number: int, step: TraceStep, tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig) -> str:
    """Step, choices and candidates. The logit is what the adjusted one was made from: z = z* - beta * s."""
    head = f"step {number}"
    if step.intervention:
        head += f": System 1 {_name(step.system1_token_id, tokenizer)}, System 2 {_name(step.token_id, tokenizer)}"
    if (distance := margin(step)) is not None:
        head += f", margin {distance:+.3f}"
    rows = []
    scores = step.scores or [None] * len(step.candidate_ids)
    for token, logprob, score, adjusted in zip(
        step.candidate_ids, step.logprobs, scores, step.adjusted_logits, strict=True
    ):
        logit = adjusted if score is None else adjusted - config.beta * score
        cells = [
            _name(token, tokenizer),
            f"{math.exp(logprob):.1%}",
            f"{logit:.3f}",
            "not needed" if score is None else f"{score:+.3f}",
            f"{adjusted:.3f}",
        ]
        mark = ' class="chosen"' if token == step.token_id else ""
        rows.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    names = "".join(f"<th>{name}</th>" for name in ("token", "probability", "logit z", "score s", "adjusted z*"))
    return f'<div class="card panel">{escape(head)}<table><tr>{names}</tr>{"".join(rows)}</table></div>'


def _name(token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A token in quotes, with spaces and line ends to be seen, and its id."""
    if tokenizer is None:
        return str(token_id)
    return f"{json.dumps(tokenizer.decode([token_id]), ensure_ascii=False)} ({token_id})"
