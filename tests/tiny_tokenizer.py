"""A word-level tokenizer for the tiny models, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHAT_TEMPLATE = (
    "{% for m in messages %}w3 {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
)


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words `w3`, `w4`, … with their number as id; 0, 1 and 2 are `<unk>`, `<s>` and `</s>`."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = _CHAT_TEMPLATE
    return fast
