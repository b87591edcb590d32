"""The `full` verifier: a network of its own with a scalar head, the paper's setting."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm2_fast.errors import CheckpointError, IncompatibleVerifierError
from llm2_fast.models.checkpoint import open_checkpoint, weight_files
from llm2_fast.models.decoder import FINAL_LAYER, Decoder
from llm2_fast.models.fingerprint import fingerprint, tensors_fingerprint
from llm2_fast.models.loading import LoadedModel, load_tokenizer, resolve_device, resolve_dtype, tokenizer_hash
from llm2_fast.models.source import MemorySource, ModelSource
from llm2_fast.verifier.scorer import Scorer
from llm2_fast.verifier.verifier import Verifier, read_json

_HEAD_NAMES = ("score", "classifier")


class LabelHead(nn.Module):
    """The classifier's linear layer with its one label, in float32."""

    layers = (FINAL_LAYER,)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """Scores float32 [...] of final hidden states [..., hidden_size]."""
        return nn.functional.linear(hidden_states[0].float(), self.weight, self.bias).squeeze(-1)


class FullVerifier(Verifier):
    """A decoder with a scalar head. It may be smaller than the LLM but must share its tokenizer.

    Args:
        network: The decoder, without a head, or where its weights are.
        weight: [1, hidden_size] of the head.
        bias: [1], or None; only token classifiers have one.
        tokenizer: The one it was trained with, if known.
    """

    kind = "full"

    def __init__(
        self,
        network: PreTrainedModel | ModelSource,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.source = network if isinstance(network, ModelSource) else MemorySource(network.base_model)
        hidden_size = self.source.config.get_text_config().hidden_size
        if tuple(weight.shape) != (1, hidden_size):
            raise CheckpointError(f"verifier head: expected shape (1, {hidden_size}), got {tuple(weight.shape)}")
        self.tokenizer = tokenizer
        self.head = LabelHead(weight, bias).to(self.source.device)

    @property
    def network(self) -> PreTrainedModel:
        """The whole decoder. Loaded on first use: compiled decoders do not need it."""
        self.source = self.source.load()  # from now on what counts, since whoever has it may change it
        return self.source.skeleton

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.source)[:16] + tensors_fingerprint(self.head.state_dict())[:16]

    def check_compatible(self, model: LoadedModel) -> None:
        theirs = model.config.get_text_config().vocab_size
        ours = self.source.config.get_text_config().vocab_size
        if self.tokenizer is not None and model.tokenizer is not None:
            if tokenizer_hash(self.tokenizer) != tokenizer_hash(model.tokenizer):
                raise IncompatibleVerifierError(
                    f"verifier: expected the tokenizer of {model.name} ({len(model.tokenizer)} tokens), "
                    f"got another one ({len(self.tokenizer)} tokens)"
                )
            # Vocabularies are padded to round sizes, so only the tokenizer's own ids need a row.
            theirs = min(theirs, len(model.tokenizer))
            fits = ours >= theirs
        else:
            fits = ours == theirs
        if not fits:
            raise IncompatibleVerifierError(f"verifier: expected a vocabulary of {theirs} tokens, got {ours}")

    def head_for(self, model: LoadedModel) -> LabelHead:
        self.check_compatible(model)
        return self.head

    def scorer(self, model: LoadedModel) -> Scorer:
        head = self.head_for(model)
        return Scorer(Decoder(self.network), head)

    def _load_base(self) -> LoadedModel:
        return LoadedModel(self.source, self.tokenizer, "the verifier itself")

    @staticmethod
    def _recognises(directory: Path) -> bool:
        path = directory / "config.json"
        return path.is_file() and "architectures" in read_json(path)

    @classmethod
    def _read(
        cls, directory: Path, *, device: str | torch.device, dtype: str | torch.dtype, allow_pickle: bool
    ) -> FullVerifier:
        options = {"device": resolve_device(device), "dtype": resolve_dtype(dtype), "allow_pickle": allow_pickle}
        network = open_checkpoint(AutoModel, directory, **options)
        weight, bias = _read_head(directory, allow_pickle)
        return cls(network, weight, bias, load_tokenizer(directory))

    def _write(self, directory: Path) -> None:
        bias = self.head.bias
        auto_class = AutoModelForSequenceClassification if bias is None else AutoModelForTokenClassification
        config = copy.deepcopy(self.network.config)
        config.num_labels = 1
        classifier = auto_class.from_config(config, dtype=self.network.dtype)
        classifier.base_model.load_state_dict(self.network.state_dict())
        layer = next(getattr(classifier, name) for name in _HEAD_NAMES if hasattr(classifier, name))
        layer.float()  # as the head is kept: a bfloat16 network would round it
        layer.load_state_dict(self.head.state_dict())
        classifier.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)


def _read_head(directory: Path, allow_pickle: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [1, hidden_size] and bias [1] or None of the head, from whichever shard holds them."""
    names = {f"{head}.{part}" for head in _HEAD_NAMES for part in ("weight", "bias")}
    found: dict[str, torch.Tensor] = {}
    for shard in weight_files(directory):
        try:
            with safe_open(shard, framework="pt") as tensors:
                found |= {name.split(".")[-1]: tensors.get_tensor(name) for name in names & set(tensors.keys())}
        except SafetensorError as error:
            raise CheckpointError(f"verifier weights {str(shard)!r}: damaged: {error}") from error
    for shard in sorted(directory.glob("*.bin")) if allow_pickle and not found else ():
        tensors = torch.load(shard, map_location="cpu", weights_only=True)
        found |= {name.split(".")[-1]: tensors[name] for name in names & tensors.keys()}
    if "weight" not in found:
        names = " or ".join(f"{name}.weight" for name in _HEAD_NAMES)
        raise CheckpointError(f"verifier {str(directory)!r}: expected a head {names}, found none")
    return found["weight"], found.get("bias")
