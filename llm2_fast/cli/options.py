"""Command-line options made from configurations, and those of `load`. Neither repeats a default value."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from llm2_fast.config import GenerationConfig, literal_values

# `load` lives beside torch, so its keywords are named here; those not given keep its defaults.
_LOAD_OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"metavar": "NAME", "help": "auto or a torch device"},
    "dtype": {"metavar": "NAME", "help": "auto (the checkpoint's; float32 for GGUF), float32, bfloat16 or float16"},
    "backend": {"metavar": "NAME", "help": "auto, or one of those that `llm2-fast info` lists"},
    "quantization": {"metavar": "NAME", "help": "weights as int8, int8-group64, int8-group128 or int8-channel"},
    "max_batch_size": {"metavar": "N", "type": int, "help": "sequences decoded together; more wait their turn"},
    "max_length": {"metavar": "N", "type": int, "help": "bound on prompt and new tokens together"},
    "kv_cache_memory_bytes": {
        "metavar": "N",
        "type": int,
        "help": "bound on the keys and values of all sequences; half of the machine's memory unless given",
    },
    "cache_packed": {"action": "store_true", "help": "keep packed weights in files, so that later loads are fast"},
    "always_verify": {"action": "store_true", "help": "a full verifier scores every step; for the cuda backend"},
    "allow_pickle": {"action": "store_true", "help": "also read pickled weights, which can run code while they load"},
}


def add_generation_options(
    parser: argparse.ArgumentParser, defaults: GenerationConfig, names: Iterable[str] | None = None
) -> None:
    """Add an option per field of `GenerationConfig`, with its documentation and the value in `defaults`.

    Args:
        parser: Gets the options.
        defaults: What `generation_config` starts from.
        names: The fields; all if None.
    """
    add_config_options(parser, "generation", defaults, names)


def add_config_options(
    parser: argparse.ArgumentParser, title: str, defaults: Any, names: Iterable[str] | None = None
) -> None:
    """Add an option per field of a configuration, with its documentation and the value in `defaults`.

    Args:
        parser: Gets the options, in a group called `title`.
        defaults: A `GenerationConfig` or another dataclass with `option_names` and `merge`.
        names: The fields; all if None.
    """
    hints, documentation = get_type_hints(type(defaults)), _attribute_documentation(type(defaults))
    group = parser.add_argument_group(title)
    for name in type(defaults).option_names() if names is None else names:
        text, default = documentation.get(name, ""), getattr(defaults, name)
        choices = literal_values(hints[name])
        if hints[name] is bool:
            kind: dict[str, Any] = {"action": "store_true"}
        elif hints[name] == bool | None:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hints[name]) is tuple:
            item = get_args(hints[name])[0]
            kind = {"action": "append", "type": item, "metavar": "TEXT" if item is str else "X"}
            text += " Repeatable."
        elif choices:
            kind = {"choices": choices}
            text += f" Default: {default}."
        else:  # a number, or a number or None
            number = next(iter(get_args(hints[name])), hints[name])
            kind = {"type": number, "metavar": "N" if number is int else "X"}
            if "by default" not in text.lower():
                text += f" Default: {'none' if default is None else f'{default:g}'}."
        group.add_argument(_flag(name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `llm2_fast.load` that the command line can express."""
    group = parser.add_argument_group("loading")
    for name, kind in _LOAD_OPTIONS.items():
        group.add_argument(_flag(name), default=argparse.SUPPRESS, **kind)


def generation_config(options: argparse.Namespace, defaults: GenerationConfig) -> GenerationConfig:
    """`defaults` with the options that were given. Raises `ArgumentError` for a value out of range."""
    return defaults.merge(**given_options(options, defaults))


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `llm2_fast.load`: the options that were given."""
    return _given(options, _LOAD_OPTIONS)


def given_options(options: argparse.Namespace, defaults: Any) -> dict[str, Any]:
    """The options that `add_config_options` added for `defaults` and that were given."""
    return _given(options, type(defaults).option_names())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _attribute_documentation(cls: type) -> dict[str, str]:
    """What a Google-style docstring says of each attribute, on one line. Empty when Python dropped docstrings."""
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
