"""`TrainingConfig`: every option of a training run, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from llm2_fast.config import check_number, check_option_names
from llm2_fast.errors import ArgumentError

KINDS = ("head", "lora", "full")
_NETWORKS = ("lora", "full")
_MAX_SEED = 2**32 - 1  # numpy's limit, which transformers seeds as well
# The paper's (section 3.1) for full; ten times its rate for lora, whose updates start from zero.
_DEFAULTS: dict[str, dict[str, float]] = {
    "head": {"epochs": 5, "learning_rate": 1e-3, "weight_decay": 0.01, "batch_size": 256},
    "lora": {"epochs": 2, "learning_rate": 2e-4, "weight_decay": 0.0, "batch_size": 128},
    "full": {"epochs": 2, "learning_rate": 2e-5, "weight_decay": 0.0, "batch_size": 128},
}


def _only(kinds: tuple[str, ...], default: Any) -> Any:
    return field(default=default, metadata={"kinds": kinds})


@dataclass(frozen=True)
class TrainingConfig:
    """Options of one training run. Immutable; `for_kind` makes one with the defaults of a kind of verifier.

    Pairs:

    Attributes:
        alpha: Plausibility constraint in (0, 1]: what counts as plausible.
        max_candidates: At most so many tokens of a position are plausible, the largest logits first.
        plausible_only: Train only where the ground truth is plausible, too. Elsewhere decoding never asks about it. By
            default on for problems, and off for supervision, whose pairs somebody chose.
        max_length: Tokens of prompt and solution; what is longer is cut.

    Optimization (AdamW, cosine schedule with 10 % warm-up):

    Attributes:
        epochs: Passes over the examples; by default 5 for `head`, 2 for the others.
        learning_rate: Peak; by default 1e-3 for `head`, 2e-4 for `lora`, 2e-5 for `full`.
        weight_decay: By default 0.01 for `head`, 0 for the others.
        batch_size: Per optimizer step, over all processes: pairs for `head`, by default 256; solutions with all their
            pairs for the others, by default 128.
        per_device_batch_size: Solutions per forward pass; gradients accumulate up to `batch_size` (`lora` and `full`).
        gradient_checkpointing: Recompute activations in the backward pass to save memory (`lora` and `full`).
        bf16: Compute in bfloat16, while what is trained and the optimizer stay float32; by default on where a GPU
            supports it, off on the CPU (`lora` and `full`).
        save_steps: Optimizer steps between checkpoints; by default one per epoch (`lora` and `full`).
        seed: Of initial weights and order of examples, 32 bits.

    Shape:

    Attributes:
        layers: Hidden states that a `head` reads: -1, by default, for the final norm's output, i for decoder layer i.
        mlp_size: Hidden units of a `head`; 0 makes it linear.
        lora_rank: Rank of a `lora` update.
        lora_alpha: Its scale is `lora_alpha / lora_rank`.

    Raises:
        ArgumentError: A value is outside its range; the message names it.
    """

    alpha: float = 0.1
    max_candidates: int = 8
    plausible_only: bool | None = None
    max_length: int = 1024
    epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    per_device_batch_size: int = _only(_NETWORKS, 4)
    gradient_checkpointing: bool = _only(_NETWORKS, False)
    bf16: bool | None = _only(_NETWORKS, None)
    save_steps: int | None = _only(_NETWORKS, None)
    seed: int = 0
    layers: tuple[int, ...] = _only(("head",), (-1,))
    mlp_size: int = _only(("head",), 0)
    lora_rank: int = _only(("lora",), 16)
    lora_alpha: float = _only(("lora",), 32.0)

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, minimum=0, maximum=1, exclusive_minimum=True)
        for name in ("max_candidates", "max_length", "epochs", "batch_size", "per_device_batch_size", "save_steps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), integer=True, minimum=1)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, minimum=0, exclusive_minimum=True)
        if self.weight_decay is not None:
            check_number("weight_decay", self.weight_decay, minimum=0)
        check_number("seed", self.seed, integer=True, minimum=0, maximum=_MAX_SEED)
        check_number("mlp_size", self.mlp_size, integer=True, minimum=0)
        check_number("lora_rank", self.lora_rank, integer=True, minimum=1)
        check_number("lora_alpha", self.lora_alpha, minimum=0, exclusive_minimum=True)
        for name in ("plausible_only", "bf16", "gradient_checkpointing"):
            allowed = (True, False) if name == "gradient_checkpointing" else (True, False, None)
            if not any(getattr(self, name) is value for value in allowed):
                raise ArgumentError(name, " or ".join(map(str, allowed)), getattr(self, name))
        if not isinstance(self.layers, (tuple, list)) or not all(type(layer) is int for layer in self.layers):
            raise ArgumentError("layers", "a sequence of integers", self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(option.name for option in fields(cls))

    @classmethod
    def for_kind(cls, kind: str, **options: Any) -> TrainingConfig:
        """The options for a kind of verifier, its defaults in the place of those not given.

        Args:
            kind: "head", "lora" or "full".
            options: By name.

        Raises:
            ArgumentError: The kind or an option is unknown, or the option means nothing for this kind.
        """
        if kind not in KINDS:
            raise ArgumentError("kind", " or ".join(map(repr, KINDS)), repr(kind))
        check_option_names(options, cls.option_names(), what="option")
        for option in fields(cls):
            kinds = option.metadata.get("kinds", KINDS)
            if option.name in options and kind not in kinds:
                expected = f"an option of kind {' or '.join(map(repr, kinds))} only"
                raise ArgumentError(option.name, expected, f"kind {kind!r}")
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**{**_DEFAULTS[kind], **given})
