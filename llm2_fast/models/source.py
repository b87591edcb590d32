"""`ModelSource`: a decoder whose weights are in memory, or still in files and read one tensor at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm2_fast.models.quantization import Quantization


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
    def read_rows(self, parameter: nn.Parameter, first: int, out: torch.Tensor) -> None:
        """Fill `out`, contiguous, with as many rows of a parameter as it has, from `first` on."""

    @abstractmethod
    def running(self, quantization: Quantization | None = None) -> AbstractContextManager[PreTrainedModel]:
        """The skeleton, able to run inside the context.

        Args:
            quantization: Linear layers, and a table tied to one, compute with what it keeps of their weights.
        """


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

    def read_rows(self, parameter: nn.Parameter, first: int, out: torch.Tensor) -> None:
        out.copy_(parameter.detach()[first : first + len(out)])

    @contextmanager
    def running(self, quantization: Quantization | None = None) -> Iterator[PreTrainedModel]:
        with nullcontext() if quantization is None else quantization.applied_to(self.skeleton):
            yield self.skeleton


def as_source(model: PreTrainedModel | ModelSource) -> ModelSource:
    """`model` itself if it is a source."""
    return model if isinstance(model, ModelSource) else MemorySource(model)
