"""Prompts in any accepted form, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2_fast.errors import ArgumentError

Prompt = str | list[int] | list[dict[str, Any]]
_EXPECTED = "a string, chat messages (dicts with role and content), token ids, or a list of any of these"


def as_prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts. An empty list holds no prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (Mapping, UserDict, bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise ArgumentError("prompts", _EXPECTED, type(prompts).__name__)
    if getattr(prompts, "ndim", 1) == 0:
        raise ArgumentError("prompts", _EXPECTED, "a zero-dimensional array")
    items = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)  # tensors and arrays of ids
    single = items and (all(_is_token(x) for x in items) or all(isinstance(x, dict) for x in items))
    return [items] if single else items


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    name: str,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of one prompt.

    A string is tokenized as it is, with the special tokens the tokenizer adds; chat messages go through the model's
    chat template.

    Args:
        prompt: String, chat messages or token ids.
        tokenizer: Needed unless the prompt holds token ids.
        vocab_size: Bound on token ids.
        name: What error messages call the prompt.
        add_generation_prompt: End chat messages with what introduces the assistant's next one.

    Raises:
        ArgumentError: Of another type, empty, outside the vocabulary, or text without a tokenizer.
    """
    if isinstance(prompt, Iterable) and not isinstance(prompt, (str, Mapping, UserDict, bytes, bytearray)):
        if getattr(prompt, "ndim", 1) == 0:
            raise ArgumentError(name, _EXPECTED, "a zero-dimensional array")
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if prompt and all(_is_token(x) for x in prompt):
            return _checked_ids([int(token) for token in prompt], vocab_size, name)
    is_chat = isinstance(prompt, list) and prompt and all(isinstance(x, dict) for x in prompt)
    if prompt == "" or prompt == []:
        raise ArgumentError(name, "at least one token", "an empty prompt")
    if not isinstance(prompt, str) and not is_chat:
        raise ArgumentError(name, _EXPECTED, repr(prompt)[:80])
    if tokenizer is None:
        raise ArgumentError(name, "token ids, since the model came without a tokenizer", type(prompt).__name__)
    if isinstance(prompt, str):
        return _checked_ids(tokenizer(prompt)["input_ids"], vocab_size, name)
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates raise whatever they like: ValueError, jinja2 errors, KeyError
        raise ArgumentError(name, "messages that the model's chat template accepts", f"{prompt!r}: {error}") from error
    return _checked_ids(tokenizer(text, add_special_tokens=False)["input_ids"], vocab_size, name)


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()[:32]


def _is_token(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _checked_ids(token_ids: list[int], vocab_size: int, name: str) -> list[int]:
    if not token_ids:
        raise ArgumentError(name, "at least one token", "an empty prompt")
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ArgumentError(name, f"token ids in [0, {vocab_size})", token)
    return token_ids
