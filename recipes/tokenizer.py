"""A tokenizer for generated problems: a token per word and per digit, blanks belong to the word behind them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

_PAD, _END, _UNKNOWN = "<pad>", "<end>", "<unknown>"
_PATTERN = r"<\w+>| ?[A-Za-z]+| ?\d|\s|[^\w\s]"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\n' + message['content'] + '<end>' }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokens of `texts`, ten digits with and without a blank, and three special ones."""
    words = {word for text in texts for word in re.findall(_PATTERN, text)}
    words |= {f"{blank}{digit}" for blank in ("", " ") for digit in range(10)} | {"\n", " "}
    vocabulary = {word: i for i, word in enumerate([_PAD, _END, _UNKNOWN, *sorted(words)])}
    core = Tokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    core.pre_tokenizer = Split(Regex(_PATTERN), behavior="isolated")
    core.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
