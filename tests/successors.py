"""A task that a tiny verifier learns: solutions count round a ring of words, negatives are other words of the ring.

Every word of the ring is as often positive as negative, so that a verifier has to look at the word before.
"""

from __future__ import annotations

import torch

from llm2_fast.supervision import SupervisionExample, TokenPair, tokenize_messages
from tiny_tokenizer import tokenizer

TOKENIZER = tokenizer()
RING = range(20, 28)


def supervision(count: int, seed: int, length: int = 10, negatives: int = 2) -> list[SupervisionExample]:
    """Random examples, with `negatives` pairs at every position of a solution but the first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=generator))

    examples = []
    for _ in range(count):
        start = draw(len(RING))
        ids = [RING[(start + i) % len(RING)] for i in range(length)]
        messages = [
            {"role": "user", "content": f"w{5 + draw(10)}"},
            {"role": "assistant", "content": " ".join(f"w{i}" for i in ids)},
        ]
        input_ids = tokenize_messages(messages, TOKENIZER)
        pairs = [
            TokenPair(position, input_ids[position], RING[(input_ids[position] - RING[0] + offset) % len(RING)])
            for position in range(len(input_ids) - length + 1, len(input_ids))
            for offset in (1 + torch.randperm(len(RING) - 1, generator=generator)[:negatives]).tolist()
        ]
        examples.append(SupervisionExample(messages, pairs))
    return examples
