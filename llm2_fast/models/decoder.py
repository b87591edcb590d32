"""`Decoder`: forward passes of any Hugging Face decoder over ragged chains and branches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llm2_fast.cache.slots import SlotCache
from llm2_fast.errors import ArgumentError

FINAL_LAYER = -1
_ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies follow the longest sequence of a pass
_LONGEST_PROBE = 128
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Rows:
    """What one sequence contributes to a forward pass.

    Attributes:
        slot: Its slot in the cache.
        chain: Tokens that extend the committed prefix. They see it and each other causally, and are committed.
        branches: Tokens that each see a prefix and themselves, not their siblings. They are not committed.
        branch_positions: Position of each branch, i.e. how many tokens of the prefix and chain it sees; by default all.
    """

    slot: int
    chain: Sequence[int] = ()
    branches: Sequence[int] = ()
    branch_positions: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.chain) + len(self.branches)

    def positions(self, length: int) -> list[int]:
        """Positions of chain and branches behind a prefix of `length` tokens."""
        end = length + len(self.chain)
        branch_positions = self.branch_positions
        return [*range(length, end), *([end] * len(self.branches) if branch_positions is None else branch_positions)]


class Decoder:
    """The decoder stack of a Hugging Face model (`model.base_model`), run on `Rows` over a `SlotCache`.

    Args:
        model: A decoder-only model without a head. Used as it is: not moved, cast or patched.

    Raises:
        ArgumentError: The model attends in a way that the 4-D mask cannot express.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config()
        implementation = config._attn_implementation
        if implementation not in _ATTENTION_IMPLEMENTATIONS:
            expected = f"attn_implementation {' or '.join(map(repr, _ATTENTION_IMPLEMENTATIONS))}"
            raise ArgumentError("model", expected, f"{implementation!r}")
        self.vocab_size: int = config.vocab_size
        self.max_position_embeddings: int | None = getattr(config, "max_position_embeddings", None)
        if rope := _batch_dependent_rope(config):
            raise ArgumentError("model", "rotary frequencies that do not depend on the batch", f"rope_type {rope!r}")
        self._num_layers: int = config.num_hidden_layers
        self._windows = attention_windows(config)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise `ArgumentError` unless `forward` can return the hidden states of `layers`."""
        inner = range(self._num_layers - 1)
        if not layers or any(layer != FINAL_LAYER and layer not in inner for layer in layers):
            expected = f"{FINAL_LAYER} (the final norm) or 0 to {len(inner) - 1}"
            raise ArgumentError("layers", expected, repr(tuple(layers)))

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and cache."""
        return self.model.dtype

    def forward(
        self, cache: SlotCache, rows: Sequence[Rows], layers: tuple[int, ...] = (FINAL_LAYER,)
    ) -> list[torch.Tensor]:
        """One pass over the weights for all `rows`. Chains are committed to the cache, branches stored behind them.

        Args:
            cache: Holds the prefixes.
            rows: At least one, with distinct slots; ragged lengths are padded here.
            layers: Which hidden states to return: `FINAL_LAYER` is the output of the final norm, i the output of
                decoder layer i.

        Returns:
            For each of `layers` hidden states [B, Q, hidden_size], Q the largest number of rows; row b holds chain,
            then branches, then padding.
        """
        width = max(len(r) for r in rows)
        num_keys = cache.begin([r.slot for r in rows], width, self.device)
        lengths = [cache.lengths[r.slot] for r in rows]
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        token_ids = torch.zeros(len(rows), width, dtype=torch.long)
        for b, (r, length) in enumerate(zip(rows, lengths, strict=True)):
            token_ids[b, : len(r)] = torch.tensor([*r.chain, *r.branches])
            positions[b, : len(r)] = torch.tensor(r.positions(length))

        with evaluating(self.model), torch.no_grad():
            output = self.model(
                input_ids=token_ids.to(self.device),
                position_ids=positions.to(self.device),
                attention_mask=self._masks(rows, lengths, positions, num_keys),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=any(layer != FINAL_LAYER for layer in layers),
            )
        for r in rows:
            cache.advance(r.slot, len(r.chain))
        # hidden_states[0] is the embedding; the entry of the last layer would be normed, so it is FINAL_LAYER only.
        return [output.last_hidden_state if i == FINAL_LAYER else output.hidden_states[i + 1] for i in layers]

    def check(self) -> None:
        """Compare branched, cached passes with the model's own full pass over a few tokens.

        The passes rely on conventions of Hugging Face models. A model that keeps others would decode garbage without an
        error, so it is refused here. The probe is longer than the sliding windows up to `_LONGEST_PROBE` tokens.

        Raises:
            ArgumentError: The hidden states differ.
        """
        windows = [window for window in self._windows.values() if window is not None]
        length = min(max(8, *(window + 4 for window in windows)) if windows else 8, _LONGEST_PROBE)
        length = min(length, (self.max_position_embeddings or length) - 1)
        token_ids = [(7 * i + 1) % self.vocab_size for i in range(length)]
        cache = SlotCache()
        slot = cache.allocate()
        passes = [Rows(slot, chain=token_ids[:3]), Rows(slot, chain=token_ids[3:-1], branches=[0, token_ids[-1]])]
        # In the model's own dtype, whatever the caller computes in.
        with evaluating(self.model), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            ids = torch.tensor([token_ids], device=self.device)
            expected = self.model(input_ids=ids, use_cache=False).last_hidden_state[0].float()
            # Not self.forward: what a subclass adds is not in the model's own pass.
            hidden_states = torch.cat([Decoder.forward(self, cache, [rows])[0][0] for rows in passes]).float()
        actual = torch.cat([hidden_states[: length - 1], hidden_states[length:]])
        if not agree(actual, expected, 1e-3 if self.dtype == torch.float32 else 0.05):
            conventions = "a decoder-only model with Hugging Face's cache, position and mask conventions"
            raise ArgumentError("model", conventions, f"{type(self.model).__name__}, whose cached hidden states differ")

    def _masks(
        self, rows: Sequence[Rows], lengths: list[int], positions: torch.Tensor, num_keys: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks [B, 1, Q, num_keys]: one, or one per attention type where the layers differ."""
        row, key = torch.arange(positions.shape[1]), torch.arange(num_keys)
        # Prefix and chain are stored at their positions, branches behind them, wherever they belong.
        own = key == (torch.tensor(lengths)[:, None] + row)[..., None]
        padding = row >= torch.tensor([len(r) for r in rows])[:, None]
        own |= padding[..., None]  # what padding sees is never read, but it must see something
        return branch_masks(positions.to(self.device), own.to(self.device), self._windows, self.dtype)


class LanguageModel(Decoder):
    """A `Decoder` with its language-model head.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._lm_head = model.get_output_embeddings()
        if self._lm_head is None or getattr(model.config, "is_encoder_decoder", False):
            raise ArgumentError("model", "a decoder-only causal language model", type(model).__name__)
        super().__init__(model.base_model)
        self.causal_lm = model

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Raw logits, float32 [..., vocab_size], of final hidden states [..., hidden_size]."""
        config = self.causal_lm.config.get_text_config()
        with torch.no_grad():
            logits = self._lm_head(hidden_states)
            if (scale := getattr(config, "logit_scale", None)) is not None:
                logits = logits * scale
            if (scaling := getattr(config, "logits_scaling", None)) is not None:
                logits = logits / scaling
            if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
                logits = torch.tanh(logits / cap) * cap
            return logits.float()

    def check(self) -> None:
        """As `Decoder.check`, and the head: `logits` against the model's own."""
        super().check()
        ids = torch.tensor([[1 % self.vocab_size, 0]], device=self.device)
        with evaluating(self.causal_lm), torch.no_grad():
            expected = self.causal_lm(ids, use_cache=False).logits.float()
            actual = self.logits(self.model(input_ids=ids, use_cache=False).last_hidden_state)
        rtol = 1e-4 if self.dtype == torch.float32 else 0.02
        if not torch.allclose(actual, expected, rtol=rtol, atol=rtol, equal_nan=True):
            raise ArgumentError(
                "model",
                "logits that are its output embedding of the hidden states, scaled or capped as the config says",
                f"{type(self.causal_lm).__name__}, whose logits differ",
            )


def branch_masks(
    positions: torch.Tensor, own: torch.Tensor, windows: dict[str, int | None], dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks with which a row sees the keys before its position, and its own.

    Args:
        positions: int64 [B, Q], of each row.
        own: bool [B, Q, K], keys that a row sees wherever they are stored.
        windows: `attention_windows` of the model.
        dtype: Of the masks.

    Returns:
        [B, 1, Q, K], or one such tensor per attention type where the layers differ.
    """
    key = torch.arange(own.shape[-1], device=positions.device)
    masks = {}
    for layer_type, window in windows.items():
        visible = key < positions[..., None]
        if window is not None:
            visible &= key > (positions - window)[..., None]
        mask = torch.zeros(own.shape, dtype=dtype, device=own.device)
        masks[layer_type] = mask.masked_fill_(~(visible | own), torch.finfo(dtype).min).unsqueeze(1)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def agree(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by at most `tolerance` times the largest finite value expected, NaN equal to NaN."""
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 1.0
    return torch.allclose(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's training flag as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _batch_dependent_rope(config: object) -> str | None:
    """The type of rotary embedding that makes a sequence depend on its batch, if the model has one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_type = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return next((p["rope_type"] for p in per_type if p.get("rope_type") in _BATCH_DEPENDENT_ROPE), None)


def attention_windows(config: object) -> dict[str, int | None]:
    """Attention types of the layers, each with its sliding window or None."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        layer_types = ["sliding_attention" if sliding else "full_attention"]
    if unknown := set(layer_types) - set(_LAYER_TYPES):
        raise ArgumentError("model", f"layers of type {' or '.join(_LAYER_TYPES)}", ", ".join(sorted(unknown)))
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(layer_types)}
