"""A tokenizer for generated problems: words or pieces of them, single digits, blanks belong to the word behind them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
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


def make_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokens of `texts`, ten digits, and three special ones.

    Args:
        texts: What will be written.
        vocab_size: So many tokens, rare words in pieces by byte-pair encoding. None: every word is a token.
    """
    core = Tokenizer(WordLevel(_words(texts), unk_token=_UNKNOWN) if vocab_size is None else BPE(unk_token=_UNKNOWN))
    core.pre_tokenizer = Split(Regex(_PATTERN), behavior="isolated")
    core.decoder = Fuse()
    if vocab_size is not None:
        trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=[_PAD, _END, _UNKNOWN], show_progress=False)
        core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _words(texts: Iterable[str]) -> dict[str, int]:
    """The vocabulary of whole words."""
    words = {word for text in texts for word in re.findall(_PATTERN, text)}
    words |= {f"{blank}{digit}" for blank in ("", " ") for digit in range(10)} | {"\n", " "}
    return {word: i for i, word in enumerate([_PAD, _END, _UNKNOWN, *sorted(words)])}
