"""A brute-force LLM2 decoder: no cache, one sequence, plain loops, and no code of the package below it.

It answers one question in the most obvious way: which tokens does LLM2 (arXiv 2412.20372) generate? Everything is
recomputed from scratch for every candidate. Philox is written out in Python integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

NextLogits = Callable[[list[int]], list[float]]  # tokens -> logits of the next token
Score = Callable[[list[int], int], float]  # tokens before the candidate, candidate -> score


def philox(counter: tuple[int, int, int, int], seed: int) -> int:
    """First word of Philox 4x32-10."""
    c, key = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ key[0], right & 0xFFFFFFFF, (left >> 32) ^ c[3] ^ key[1], left & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def process(values: dict[int, float], seen: set[int], options) -> dict[int, float]:
    """Repetition penalty, temperature, top-k, top-p, min-p on {token: logit}."""
    r, t = options.repetition_penalty, options.temperature or 1.0
    values = {v: (x / r if x > 0 else x * r) if v in seen else x for v, x in values.items()}
    values = {v: x / t for v, x in values.items()}
    ranked = sorted(values, key=lambda v: (-values[v], v))
    ranked = ranked[: options.top_k] if options.top_k else ranked
    top = values[ranked[0]]
    total, before, kept = sum(math.exp(values[v] - top) for v in ranked), 0.0, []
    for v in ranked:
        if before < options.top_p * total or options.top_p >= 1:
            kept.append(v)
        before += math.exp(values[v] - top)
    return {v: values[v] for v in kept if options.min_p == 0 or values[v] >= top + math.log(options.min_p)}


def pick(values: dict[int, float], seen: set[int], options, step: int, sample: int, request: int) -> int:
    left = process(values, seen, options)
    if options.temperature > 0:
        for v in left:
            u = ((philox((v, step, sample, request), options.seed) >> 9) + 0.5) / 2**23
            left[v] += -math.log(-math.log(u))
    return min(left, key=lambda v: (-left[v], v))


def plausible(logits: list[float], options) -> list[int]:
    threshold = max(logits) + (math.log(options.alpha) if options.alpha > 0 else -math.inf)
    ranked = sorted((v for v, z in enumerate(logits) if z >= threshold), key=lambda v: (-logits[v], v))
    return ranked[: options.candidate_top_k or options.max_candidates][: options.max_candidates]


def generate(
    prompt: list[int],
    next_logits: NextLogits,
    score: Score | None,
    options,
    *,
    eos: tuple[int, ...] = (),
    sample: int = 0,
    request: int = 0,
) -> tuple[list[int], list[float], list[list[int]], float]:
    """Tokens, logprobs, candidates of every step, and the smallest margin of any decision.

    The margin is the gap at the argmax (greedy) or the distance of a logit to the plausibility threshold, whichever is
    smaller; a comparison in float32 means nothing below it.
    """
    tokens: list[int] = []
    logprobs, steps, margin = [], [], math.inf
    for step in range(options.max_new_tokens):
        prefix = prompt + tokens
        z = next_logits(prefix)
        candidates = plausible(z, options) if score else range(len(z))
        adjusted = {v: z[v] for v in candidates}
        if score:
            threshold = max(z) + math.log(options.alpha) if options.alpha > 0 else -math.inf
            margin = min(margin, *(abs(x - threshold) for x in z))
            if len(candidates) > 1:
                adjusted = {v: z[v] + options.beta * score(prefix, v) for v in candidates}
        token = pick(adjusted, set(prefix), options, step, sample, request)
        if options.temperature == 0 and len(adjusted) > 1:
            first, second = sorted(process(adjusted, set(prefix), options).values())[:-3:-1]
            margin = min(margin, first - second)
        top = max(adjusted.values())
        logprobs.append(adjusted[token] - top - math.log(sum(math.exp(x - top) for x in adjusted.values())))
        steps.append(list(candidates) if score else [])
        tokens.append(token)
        if token in eos:
            break
    return tokens, logprobs, steps, margin


def model_logits(model) -> NextLogits:
    """Full forward pass of a causal language model."""

    def next_logits(tokens: list[int]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().tolist()

    return next_logits


def head_score(model, state: dict[str, torch.Tensor], layers: tuple[int, ...] = (-1,)) -> Score:
    """Head with the tensors `score.weight` and perhaps `dense.*`, at the candidate's position.

    Layer -1 is the output of the final norm, i that of decoder layer i.
    """
    state = {name: tensor.double() for name, tensor in state.items()}

    def score(tokens: list[int], candidate: int) -> float:
        ids = torch.tensor([[*tokens, candidate]])
        with torch.no_grad():
            output = model.base_model(ids, use_cache=False, output_hidden_states=True)
        states = [output.last_hidden_state if i == -1 else output.hidden_states[i + 1] for i in layers]
        x = torch.cat([h[0, -1].double() for h in states])
        if "dense.weight" in state:
            x = state["dense.weight"] @ x + state["dense.bias"]
            x = x / (1 + torch.exp(-x))
        return float(state["score.weight"].flatten() @ x)

    return score


def classifier_score(classifier) -> Score:
    """Logit of a one-label sequence classifier (transformers, or transformers with a PEFT adapter)."""

    def score(tokens: list[int], candidate: int) -> float:
        with torch.no_grad():
            return float(classifier(torch.tensor([[*tokens, candidate]]), use_cache=False).logits[0, 0])

    return score
