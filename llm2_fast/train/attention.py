"""How the rows of packed passes attend: with dense masks, or with FlexAttention and masks in blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from llm2_fast.models.decoder import attention_windows, branch_masks

FLEX_ATTENTION = "llm2_fast_flex_attention"  # a name for `attn_implementation`
_BLOCK = 128  # rows and keys of a block, the default of FlexAttention's kernels
_SMALLEST_HEAD = 16  # elements; the kernels have none smaller


class AttentionChoice(NamedTuple):
    """How packed passes attend, and why; as a string for logs and records.

    Attributes:
        flex: With FlexAttention; otherwise with dense masks.
        reason: What decided it.
    """

    flex: bool
    reason: str

    def __str__(self) -> str:
        return f"{'FlexAttention' if self.flex else 'dense masks'}: {self.reason}"


def choose_attention(model: PreTrainedModel, device_type: str) -> AttentionChoice:
    """FlexAttention where it can train the model, else dense masks.

    Args:
        model: As it was loaded, with or without a head.
        device_type: Of the device to train on, such as "cuda".
    """
    obstacle = _obstacle(model, device_type)
    return AttentionChoice(obstacle is None, obstacle or "the device and the model support it")


def _obstacle(model: PreTrainedModel, device_type: str) -> str | None:
    """Why the model cannot be trained with FlexAttention; None if it can."""
    if device_type != "cuda":
        return f"FlexAttention trains on cuda, not on {device_type}"
    if not model._supports_flex_attn:
        return f"{type(model).__name__} does not support FlexAttention"
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"the model was loaded with attn_implementation {config._attn_implementation!r}, not 'sdpa'"
    if getattr(config, "attention_dropout", None):
        return "FlexAttention has no dropout"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim < _SMALLEST_HEAD:
        return f"FlexAttention needs heads of at least {_SMALLEST_HEAD} elements, not {head_dim}"
    return None


def packed_masks(
    config: PreTrainedConfig, position_ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | BlockMask | dict[str, torch.Tensor] | dict[str, BlockMask]:
    """`block_masks` for a model that attends with `FLEX_ATTENTION`, else `dense_masks`."""
    windows = attention_windows(config)
    if config._attn_implementation == FLEX_ATTENTION:
        return block_masks(position_ids, windows)
    return dense_masks(position_ids, windows, dtype)


def dense_masks(
    position_ids: torch.Tensor, windows: dict[str, int | None], dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks of a packed batch: a row sees the chain before its position, and itself.

    Args:
        position_ids: int64 [B, Q], as `pack` makes them.
        windows: `attention_windows` of the model.
        dtype: Of the masks.

    Returns:
        [B, 1, Q, Q], or one such tensor per attention type where the layers differ.
    """
    batch_size, width = position_ids.shape
    own = torch.eye(width, dtype=torch.bool, device=position_ids.device).expand(batch_size, width, width)
    return branch_masks(position_ids, own, windows, dtype)


def block_masks(position_ids: torch.Tensor, windows: dict[str, int | None]) -> BlockMask | dict[str, BlockMask]:
    """The masks of `dense_masks` for FlexAttention. Nothing is allocated per pair of row and key.

    Args:
        position_ids: int64 [B, Q], as `pack` makes them.
        windows: `attention_windows` of the model.

    Returns:
        A mask, or one per attention type where the layers differ.
    """
    masks = {layer_type: _block_mask(position_ids, window) for layer_type, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _block_mask(position_ids: torch.Tensor, window: int | None) -> BlockMask:
    """One mask. `create_block_mask` would evaluate every element, and keep them all unless it is compiled."""
    batch_size, width = position_ids.shape

    def visible(b: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        position = position_ids[b, row]
        prefix = key < position
        if window is not None:
            prefix = prefix & (key > position - window)
        return prefix | (key == row)

    num_blocks = -(-width // _BLOCK)
    rows = torch.nn.functional.pad(position_ids, (0, num_blocks * _BLOCK - width))  # as rows of padding
    lowest, highest = rows.reshape(batch_size, 1, num_blocks, 1, _BLOCK).aminmax(dim=-1)
    # Between the first key that some row of a block sees and the last one, and those that all of its rows see.
    first_key = torch.arange(num_blocks, device=position_ids.device) * _BLOCK
    last_key = first_key + _BLOCK - 1
    some, every = first_key < highest, last_key < lowest
    if window is not None:
        some, every = some & (last_key > lowest - window), every & (first_key > highest - window)
    some |= torch.eye(num_blocks, dtype=torch.bool, device=position_ids.device)  # every row sees itself
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(every), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(width, width)
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of rows has, int32 [B, 1, N], and which come first, int32 [B, 1, N, N]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.int()


def _flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' FlexAttention, with operands in autocast's dtype as SDPA has them; not every torch casts them."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(FLEX_ATTENTION, _flex_attention)
