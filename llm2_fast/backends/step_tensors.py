"""`StepTensors`: options and outputs of a batch's compiled steps."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from llm2_fast.backends.options import candidate_options, pick_options
from llm2_fast.reference import Candidates, Picked
from llm2_fast.sequence import Sequence


class StepArrays(NamedTuple):
    """The outputs of a step as NumPy arrays.

    Each torch op between two steps takes 15 µs, since a step leaves nothing but weights in the caches.
    """

    candidates: Candidates
    scores: np.ndarray
    picked: Picked


class StepTensors:
    """Allocated once for a batch; the steps of the same sequences overwrite the outputs.

    Args:
        extension: The module `llm2_fast_C`.
        sequences: The batch.
        max_candidates: K of the selection; by default the largest of the sequences' options.
        pick_width: K of the pick; by default that of the selection.

    Attributes:
        candidates, scores, picked: The outputs, as of the functions in `llm2_fast.reference`.
        arrays: The same memory.
        bound: `llm2_fast_C.StepTensors`.
    """

    def __init__(
        self,
        extension: ModuleType,
        sequences: list[Sequence],
        max_candidates: int | None = None,
        pick_width: int | None = None,
    ) -> None:
        batch = len(sequences)
        select = candidate_options(sequences)
        width = select.pop("max_candidates")
        if max_candidates is not None:
            width = max_candidates
        pick_width = width if pick_width is None else pick_width
        pick = pick_options(sequences)
        self._sequences, self._step = list(sequences), memoryview(pick["step"].numpy())

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32)

        def flags() -> torch.Tensor:
            return torch.empty(batch, dtype=torch.bool)

        self.candidates = Candidates(
            ids=integers(batch, width),
            logits=torch.empty(batch, width),
            count=integers(batch),
            logsumexp=torch.empty(batch),
            cut=flags(),
        )
        self.scores = torch.empty(batch, width)
        self.picked = Picked(
            index=integers(batch),
            token=integers(batch),
            logprob=torch.empty(batch),
            system1_index=integers(batch),
            adjusted=torch.empty(batch, pick_width),
            finished=flags(),
        )
        self.arrays = StepArrays(_arrays(self.candidates), self.scores.numpy(), _arrays(self.picked))
        outputs = {**self.candidates._asdict(), **self.picked._asdict(), "scores": self.scores}
        outputs["candidate_logits"] = outputs.pop("logits")
        capsules = {name: to_dlpack(tensor) for name, tensor in {**select, **pick, **outputs}.items()}
        self.bound = extension.StepTensors(batch, width, pick_width, **capsules)

    def fit(self, sequences: list[Sequence]) -> bool:
        """Whether these are the tensors of `sequences`; if so, their step numbers are brought up to date."""
        if sequences != self._sequences:
            return False
        for row, sequence in enumerate(sequences):
            self._step[row] = len(sequence.token_ids)
        return True


def _arrays(tensors: Candidates | Picked) -> Candidates | Picked:
    return type(tensors)(*(tensor.numpy() for tensor in tensors))
