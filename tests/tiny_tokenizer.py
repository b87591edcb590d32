"""A word tokenizer with a chat template for the tiny models, made on the fly."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny

_SPECIAL = ("<unk>", "<s>", "</s>")  # at 1 and 2, where the tiny models expect beginning and end
_CHAT_WORDS = ("user", "assistant")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def words(vocab_size: int = tiny.VOCAB) -> list[str]:
    """The vocabulary by id: special tokens, the roles of a chat, then w5, w6 and so on."""
    first = [*_SPECIAL, *_CHAT_WORDS]
    return [*first, *(f"w{i}" for i in range(len(first), vocab_size))]


def tokenizer(vocab_size: int = tiny.VOCAB, vocabulary: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """One id per word (of `words` unless there is a vocabulary) and none for the beginning; others are `<unk>`."""
    unknown, beginning, end = _SPECIAL
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary or words(vocab_size))}, unk_token=unknown))
    core.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=unknown,
        bos_token=beginning,
        eos_token=end,
        model_input_names=["input_ids", "attention_mask"],
    )
    made.chat_template = _CHAT_TEMPLATE
    return made
