"""The `lora` verifier: a PEFT LoRA adapter on the LLM with a scalar head, read without PEFT."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from llm2_fast.cache.slots import SlotCache
from llm2_fast.errors import CheckpointError, IncompatibleVerifierError
from llm2_fast.models.decoder import FINAL_LAYER, Decoder, Rows
from llm2_fast.models.fingerprint import fingerprint, tensors_fingerprint
from llm2_fast.models.loading import LoadedModel
from llm2_fast.verifier.head import ScoreHead
from llm2_fast.verifier.scorer import Scorer
from llm2_fast.verifier.verifier import Verifier, read_json, read_tensors

_SIDE_FILE = "llm2_verifier.json"
_PREFIX = "base_model.model."
_SCORE = _PREFIX + "score.weight"
# Fields of adapter_config.json that are read here or change nothing about a trained adapter. PEFT's other fields, those
# of versions to come included, are refused when set: they mean something that plain LoRA does not do.
_UNDERSTOOD = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha"),
    *("lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
    *("rank_pattern", "revision", "target_modules", "task_type", "use_rslora"),
}
_HARMLESS_INITIALIZATIONS = (True, False, None, "gaussian")  # others change the base weights as well


@dataclass(frozen=True)
class LoraDelta:
    """The low-rank update of one linear module: `x -> scaling * B A x`, float32 whatever the model's dtype, as in PEFT.

    Attributes:
        a: float32 [r, in_features].
        b: float32 [out_features, r].
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.a.dtype) @ self.a.mT @ self.b.mT) * self.scaling


class LoraDecoder(Decoder):
    """A `Decoder` that applies an adapter inside its own passes only; the model is unchanged outside them.

    Args:
        model: The base model under the adapter.
        deltas: By path of a module of `model`, whose weight is of the update's shape.
    """

    def __init__(self, model: PreTrainedModel, deltas: dict[str, LoraDelta]) -> None:
        super().__init__(model)
        self._adapted: list[tuple[nn.Module, LoraDelta]] = []
        for path, delta in deltas.items():
            module = model.get_submodule(path)
            device = module.weight.device
            self._adapted.append((module, LoraDelta(delta.a.to(device), delta.b.to(device), delta.scaling)))

    def forward(
        self, cache: SlotCache, rows: Sequence[Rows], layers: tuple[int, ...] = (FINAL_LAYER,)
    ) -> list[torch.Tensor]:
        with self._applied():
            return super().forward(cache, rows, layers)

    @contextmanager
    def _applied(self) -> Iterator[None]:
        def hook(delta: LoraDelta) -> Any:
            return lambda module, args, output: (output + delta(args[0])).to(output.dtype)

        with ExitStack() as hooks:
            for module, delta in self._adapted:
                hooks.callback(module.register_forward_hook(hook(delta)).remove)
            yield


class LoraVerifier(Verifier):
    """LoRA on the LLM's linear modules plus a scalar head; needs a cache of its own, but no weights of its own.

    Args:
        adapter_config: As in PEFT's `adapter_config.json`.
        tensors: As in PEFT's `adapter_model.safetensors`.
        base_name, base_fingerprint: The LLM it was trained on; None for adapters from elsewhere.

    Raises:
        CheckpointError: The adapter uses something that is not plain LoRA; the message names it.
    """

    kind = "lora"

    def __init__(
        self,
        adapter_config: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        *,
        base_name: str | None = None,
        base_fingerprint: str | None = None,
    ) -> None:
        super().__init__(base_name=base_name, base_fingerprint=base_fingerprint)
        _refuse_unsupported(adapter_config)
        self._config, self._tensors = adapter_config, tensors
        self._deltas, self._score = _parse_tensors(adapter_config, tensors)

    @property
    def fingerprint(self) -> str:
        return tensors_fingerprint(self._tensors)

    def check_compatible(self, model: LoadedModel) -> None:
        super().check_compatible(model)
        if self.base_fingerprint is None:
            message = "this lora verifier does not say which weights it was trained on; only shapes are compared"
            warnings.warn(
                f"llm2_fast: {message} (load it with base_model=... and save it to record them)", stacklevel=2
            )

    def head_for(self, model: LoadedModel) -> ScoreHead:
        self.check_compatible(model)
        hidden_size = model.config.get_text_config().hidden_size
        if self._score.shape != (1, hidden_size):
            actual = tuple(self._score.shape)
            raise IncompatibleVerifierError(f"verifier: score.weight expected shape (1, {hidden_size}), got {actual}")
        head = ScoreHead(hidden_size)
        head.score.weight = nn.Parameter(self._score.float(), requires_grad=False)
        return head.to(model.device)

    def deltas_for(self, model: LoadedModel) -> dict[str, LoraDelta]:
        """The updates by module path below the decoder of `model`. Loads no model.

        Raises:
            IncompatibleVerifierError: A module is missing or of another shape.
        """
        base = model.source.skeleton.base_model
        prefix = base.base_model_prefix + "."
        deltas = {path.removeprefix(prefix): delta for path, delta in self._deltas.items()}
        modules = dict(base.named_modules())
        for path, delta in deltas.items():
            if (module := modules.get(path)) is None:
                raise IncompatibleVerifierError(f"verifier: expected a module {path!r} to adapt, the model has none")
            # GPT-2's Conv1D keeps its weight transposed.
            weight, update = module.weight, (delta.b.shape[0], delta.a.shape[1])
            shape = tuple(weight.shape) if isinstance(module, nn.Linear) else tuple(weight.shape[::-1])
            if shape != update:
                raise IncompatibleVerifierError(f"verifier: {path} expected an update of shape {shape}, got {update}")
        return deltas

    def scorer(self, model: LoadedModel) -> Scorer:
        head = self.head_for(model)
        return Scorer(LoraDecoder(model.model.base_model, self.deltas_for(model)), head)

    def bind(self, base: LoadedModel) -> None:
        if self.base_fingerprint is None:  # an adapter from elsewhere: the caller says what it belongs to
            self.base_name, self.base_fingerprint = base.name, fingerprint(base.source)
        super().bind(base)

    @staticmethod
    def _recognises(directory: Path) -> bool:
        return (directory / "adapter_config.json").is_file()

    @classmethod
    def _read(cls, directory: Path, **options: Any) -> LoraVerifier:
        config = read_json(directory / "adapter_config.json")
        tensors = read_tensors(directory / "adapter_model.safetensors")
        side = {"base_model": config.get("base_model_name_or_path") or None}
        if (directory / _SIDE_FILE).is_file():
            side = read_json(directory / _SIDE_FILE)
        return cls(config, tensors, base_name=side.get("base_model"), base_fingerprint=side.get("base_fingerprint"))

    def _write(self, directory: Path) -> None:
        (directory / "adapter_config.json").write_text(json.dumps(self._config, indent=2, sort_keys=True) + "\n")
        save_file(self._tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        side = {"base_model": self.base_name, "base_fingerprint": self.base_fingerprint}
        (directory / _SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    expected = {"peft_type": "LORA", "task_type": "SEQ_CLS", "bias": "none"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"adapter_config.json: {name} expected {value!r}, got {config[name]!r}")
    for name in sorted(set(config) - _UNDERSTOOD):
        if config[name]:
            raise CheckpointError(f"adapter_config.json: {name} expected to be off, got {config[name]!r}")
    if (initialization := config.get("init_lora_weights")) not in _HARMLESS_INITIALIZATIONS:
        expected_values = ", ".join(map(repr, _HARMLESS_INITIALIZATIONS))
        raise CheckpointError(
            f"adapter_config.json: init_lora_weights expected {expected_values}, got {initialization!r}"
        )
    extra = set(config.get("modules_to_save") or ()) - {"score", "classifier"}
    if extra:
        raise CheckpointError(f"adapter_config.json: modules_to_save expected only score, got {sorted(extra)}")


def _parse_tensors(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, LoraDelta], torch.Tensor]:
    """LoRA updates by module path, and the score weight. Every tensor must be one or the other."""
    if _SCORE not in tensors:
        raise CheckpointError(f"adapter_model.safetensors: expected {_SCORE}, got {', '.join(sorted(tensors)[:3])}, …")
    deltas, used = {}, {_SCORE}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        partner = name.replace(".lora_A.", ".lora_B.")
        if partner not in tensors:
            raise CheckpointError(f"adapter_model.safetensors: expected {partner} beside {name}")
        deltas[path] = LoraDelta(a.float(), tensors[partner].float(), _scaling(config, path, a.shape[0]))
        used |= {name, partner}
    if left := sorted(set(tensors) - used):
        raise CheckpointError(
            f"adapter_model.safetensors: expected lora_A, lora_B and score weights only, got {left[0]}"
        )
    return deltas, tensors[_SCORE]


def _scaling(config: dict[str, Any], path: str, rank: int) -> float:
    try:
        alpha = config.get("lora_alpha", 8)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"adapter_config.json: lora_alpha or alpha_pattern cannot be used: {error}") from error
