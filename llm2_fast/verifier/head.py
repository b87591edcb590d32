"""`ScoreHead`, and the `head` verifier: nothing but a scalar head on the frozen LLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llm2_fast.errors import CheckpointError
from llm2_fast.models.decoder import FINAL_LAYER, Decoder
from llm2_fast.models.fingerprint import tensors_fingerprint
from llm2_fast.models.loading import LoadedModel
from llm2_fast.verifier.scorer import Scorer
from llm2_fast.verifier.verifier import Verifier, read_json, read_tensors

_FORMAT = "llm2_fast.verifier"
_FORMAT_VERSION = 1


class ScoreHead(nn.Module):
    """Scalar head: `w . h`, or `w . silu(W h + b)` with `mlp_size` hidden units. float32.

    It has no output bias: a constant added to all candidates' scores changes no decision.

    Args:
        hidden_size: Of the decoder.
        layers: Hidden states read, concatenated: `FINAL_LAYER` for the final norm's output, i for decoder layer i.
        mlp_size: Hidden units, 0 for a linear head.
    """

    def __init__(self, hidden_size: int, layers: tuple[int, ...] = (FINAL_LAYER,), mlp_size: int = 0) -> None:
        super().__init__()
        self.hidden_size, self.layers, self.mlp_size = hidden_size, layers, mlp_size
        features = hidden_size * len(layers)
        self.dense = nn.Linear(features, mlp_size) if mlp_size else None
        self.score = nn.Linear(mlp_size or features, 1, bias=False)

    def forward(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """Scores float32 [...] of hidden states [..., hidden_size], one tensor per layer."""
        x = torch.cat([h.float() for h in hidden_states], dim=-1)
        if self.dense is not None:
            x = nn.functional.silu(self.dense(x))
        return self.score(x).squeeze(-1)


class HeadVerifier(Verifier):
    """A `ScoreHead` on the LLM's own hidden states. Scoring rides on the LLM's pass and needs no second cache."""

    kind = "head"

    def __init__(self, head: ScoreHead, *, base_name: str, base_fingerprint: str) -> None:
        super().__init__(base_name=base_name, base_fingerprint=base_fingerprint)
        self.head = head.requires_grad_(False)

    @property
    def fingerprint(self) -> str:
        return tensors_fingerprint(self.head.state_dict())

    def head_for(self, model: LoadedModel) -> ScoreHead:
        self.check_compatible(model)
        Decoder(model.source.skeleton.base_model).check_layers(self.head.layers)
        return self.head.to(model.device)

    def scorer(self, model: LoadedModel) -> Scorer:
        head = self.head_for(model)
        return Scorer(Decoder(model.model.base_model), head)

    @staticmethod
    def _recognises(directory: Path) -> bool:
        path = directory / "config.json"
        return path.is_file() and read_json(path).get("format") == _FORMAT

    @classmethod
    def _read(cls, directory: Path, **options: Any) -> HeadVerifier:
        config = read_json(directory / "config.json")
        if config.get("format_version") != _FORMAT_VERSION or config.get("kind") != cls.kind:
            expected = f"kind 'head', format_version {_FORMAT_VERSION}"
            actual = f"kind {config.get('kind')!r}, format_version {config.get('format_version')!r}"
            raise CheckpointError(f"verifier {str(directory)!r}: expected {expected}, got {actual}")
        try:
            head = ScoreHead(config["hidden_size"], tuple(config["layers"]), config["mlp_size"])
            head.load_state_dict(read_tensors(directory / "model.safetensors"))
            if not isinstance(config["base_fingerprint"], str):
                raise TypeError(f"base_fingerprint is {config['base_fingerprint']!r}")
            return cls(head, base_name=config["base_model"], base_fingerprint=config["base_fingerprint"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"verifier {str(directory)!r}: config and weights do not fit: {error!r}") from error

    def _write(self, directory: Path) -> None:
        config = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "kind": self.kind,
            "base_model": self.base_name,
            "base_fingerprint": self.base_fingerprint,
            "hidden_size": self.head.hidden_size,
            "layers": list(self.head.layers),
            "mlp_size": self.head.mlp_size,
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
