"""`ModelSource`: a decoder whose weights are in memory, or still in files and read one tensor at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class ModelSource(ABC):
    """What there is to know of a decoder, without all of its weights in memory.

    Attributes:
        skeleton: Its modules and configuration. The parameters are those of the model or, where the weights are still
            in files, on the meta device: their values come from `tensor` and `rows`.
        device: Where the model is, or will be.
    """

    skeleton: PreTrainedModel
    device: torch.device

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.skeleton.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as `tensor` gives them."""
        return self.skeleton.dtype

    @abstractmethod
    def load(self) -> MemorySource:
        """The whole model in memory; itself if it is there already."""

    @abstractmethod
    def tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        """Values of a parameter of the skeleton. Not to be written to: they may be the model's, or a file's."""

    @abstractmethod
    def rows(self, parameter: nn.Parameter, indices: Sequence[int]) -> torch.Tensor:
        """Values [len(indices), ...] of single rows of a parameter."""

    @abstractmethod
    def row_range(self, parameter: nn.Parameter, first: int, end: int) -> torch.Tensor:
        """Values [end - first, ...] of neighbouring rows of a parameter. Not to be written to."""

    @abstractmethod
    def running(self) -> AbstractContextManager[PreTrainedModel]:
        """The skeleton, able to run inside the context."""


class MemorySource(ModelSource):
    """A loaded model.

    Args:
        model: Used as it is, and kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.skeleton, self.device = model, model.device

    def load(self) -> MemorySource:
        return self

    def tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def rows(self, parameter: nn.Parameter, indices: Sequence[int]) -> torch.Tensor:
        return parameter.detach()[list(indices)]

    def row_range(self, parameter: nn.Parameter, first: int, end: int) -> torch.Tensor:
        return parameter.detach()[first:end]

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        yield self.skeleton


def as_source(model: PreTrainedModel | ModelSource) -> ModelSource:
    """`model` itself if it is a source."""
    return model if isinstance(model, ModelSource) else MemorySource(model)
