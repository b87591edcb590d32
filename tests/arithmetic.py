"""A tiny random model that does arithmetic by chance: one time in three, when it comes to an end at all."""

from __future__ import annotations

import random

from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
import tiny_tokenizer

NUM_VALUES = 3  # the answers are 1, 2 and 3
NUM_ENDS = 6  # tokens that end a solution, or a random model would seldom come to an end
_WORDS = ("The", "answer", "is", ".", "+", "=", "####")


def _vocabulary() -> list[str]:
    """Special tokens, the roles of a chat, the words, and numbers: 1, 2, 3, 01, 02, 03, 001 and so on."""
    first = [*tiny_tokenizer.words()[:5], *_WORDS]
    count = tiny.VOCAB - len(first) - NUM_ENDS + 1  # </s> is an end, too
    numbers = [f"{'0' * (i // NUM_VALUES)}{i % NUM_VALUES + 1}" for i in range(count)]
    return [*first, *numbers, *(f"end{'x' * i}" for i in range(NUM_ENDS - 1))]


VOCABULARY = _vocabulary()
NUMBERS = [word for word in VOCABULARY if word.isdigit()]
END_TOKEN_IDS = [VOCABULARY.index("</s>"), *(i for i, word in enumerate(VOCABULARY) if word.startswith("end"))]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; numbers of one value are written in several ways."""
    return tiny_tokenizer.tokenizer(vocabulary=VOCABULARY)


def model(family: str = "llama", **overrides: object) -> PreTrainedModel:
    """A random model whose solutions come to an end."""
    made = tiny.causal_lm(family, **overrides)
    made.generation_config.eos_token_id = END_TOKEN_IDS
    return made


def problems(count: int, seed: int = 0, *, solutions: bool = True) -> list[dict[str, str]]:
    """Sums of two numbers with a reference solution, or with the answer only."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        a, b = draw.choice(NUMBERS), draw.choice(NUMBERS)
        value = (int(a) + int(b)) % NUM_VALUES + 1
        answer = f"{a} + {b} = {value}\n#### {value}" if solutions else str(value)
        made.append({"question": f"{a} + {b} + {draw.choice(NUMBERS)} =", "answer": answer})
    return made
