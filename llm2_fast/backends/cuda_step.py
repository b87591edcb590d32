"""A step on a GPU: static tensors of a batch, and what runs on them without the host.

A step has two parts. `decide` ends with the pick, which then goes to the host; `advance` prepares the next step, which
may be enqueued before the host has seen the pick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from llm2_fast.backends.cuda_decoder import CudaDecoder, PassRows, row_budget
from llm2_fast.backends.graph import StepGraph
from llm2_fast.backends.options import candidate_options, occurring_tokens, pick_options
from llm2_fast.backends.report import Report
from llm2_fast.kernels.branch_rows import branch_rows
from llm2_fast.kernels.commit import commit
from llm2_fast.sequence import Sequence


class StepShape(NamedTuple):
    """What the static tensors of a step depend on.

    Attributes:
        batch: Sequences at most.
        max_candidates: Of each.
        num_eos: End-of-sequence tokens of each, at most.
        penalized: Some sequence penalizes repetition.
    """

    batch: int
    max_candidates: int
    num_eos: int
    penalized: bool

    @classmethod
    def of(cls, sequences: list[Sequence]) -> StepShape:
        """Of a batch, rounded up to few shapes."""
        return cls(
            1 << (len(sequences) - 1).bit_length(),
            max(s.config.max_candidates for s in sequences),
            1 << max(0, max(len(s.eos_token_ids) for s in sequences) - 1).bit_length(),
            any(s.config.repetition_penalty != 1.0 for s in sequences),
        )


class Step(ABC):
    """A step of up to B sequences; candidates, if it has any, are up to K of each.

    Attributes:
        report: What `decide` tells the host.
    """

    def __init__(self, llm: CudaDecoder, shape: StepShape, fields: dict[str, tuple[torch.dtype, tuple]]) -> None:
        self.llm, self.shape, self.device = llm, shape, llm.device
        self.report = Report(fields, self.device)
        batch = shape.batch
        self.slots = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.batch_size = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.hidden_states = llm.hidden_states.new_zeros(batch, llm.spec.hidden_size)
        self.options: dict[str, torch.Tensor] = {}
        self.occurs: torch.Tensor | None = None  # bool [B, vocab_size], tokens of the sequences
        self.seen: torch.Tensor | None = None  # bool [B, K], candidates among them
        self._noted = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.decide, self.advance = StepGraph(self._decide, self.device), StepGraph(self._advance, self.device)

    def bind(self, sequences: list[Sequence]) -> None:
        """Take the slots and options of a batch, whose tokens are all cached."""
        self.report.clear()
        self.batch_size.fill_(len(sequences))
        self._bind_slots(self.llm, self.slots, [s.slot for s in sequences])
        select = candidate_options(sequences)
        del select["max_candidates"]
        for name, values in (select | pick_options(sequences)).items():
            shape = (self.shape.batch, *((self.shape.num_eos,) if values.ndim == 2 else ()))
            if name not in self.options:
                self.options[name] = torch.zeros(shape, dtype=values.dtype, device=self.device)
            if values.ndim == 2:
                self.options[name].fill_(-1)
                self.options[name][: len(values), : values.shape[1]].copy_(values)
            else:
                self.options[name][: len(values)].copy_(values)
        if self.shape.penalized:
            if self.occurs is None:
                vocab = (self.shape.batch, self.llm.spec.vocab_size)
                self.occurs = torch.zeros(vocab, dtype=torch.bool, device=self.device)
            self.occurs[: len(sequences)].copy_(occurring_tokens(sequences, self.llm.spec.vocab_size))
        self._prepare()

    def _bind_slots(self, decoder: CudaDecoder, slots: torch.Tensor, values: list[int]) -> None:
        slots[: len(values)].copy_(torch.tensor(values, dtype=torch.int32))
        lengths = torch.tensor([decoder.lengths[slot] for slot in values], dtype=torch.int32).to(self.device)
        decoder.device_lengths.index_copy_(0, torch.tensor(values, device=self.device), lengths)

    def _prepare(self) -> None:
        """Compute what a step begins with, of a batch that has just been bound."""

    @abstractmethod
    def _decide(self) -> None: ...

    @abstractmethod
    def _advance(self) -> None: ...

    @property
    def _pick_options(self) -> tuple[torch.Tensor, ...]:
        """The arguments of `adjust_and_pick` from the repetition penalty on."""
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "log_min_p", "seed", "step", "sample_index")
        return tuple(self.options[name] for name in (*names, "request_id", "eos_token_ids"))

    def _gather_hidden_states(self) -> None:
        torch.index_select(self.llm.hidden_states, 0, self.slots, out=self.hidden_states)

    def _note(self, token: torch.Tensor) -> None:
        """The tokens that were picked, int32 [B], belong to the sequences."""
        self.options["step"].add_(1)
        if self.occurs is not None:
            self._noted.view(-1).copy_(token)
            self._noted.clamp_(min=0)  # a sequence without a token has ended
            self.occurs.scatter_(1, self._noted, True)


class TokenPass:
    """The LLM runs over one token of each sequence, and commits it."""

    def __init__(self, step: Step) -> None:
        self._step, llm, batch = step, step.llm, step.shape.batch
        self._rows = llm.pass_rows(row_budget(batch), batch)
        self._winner = torch.zeros(batch, dtype=torch.int32, device=step.device)
        self._count = torch.zeros(batch, dtype=torch.int32, device=step.device)
        self._first_row = torch.zeros(batch + 1, dtype=torch.int32, device=step.device)

    def run(self, token: torch.Tensor) -> None:
        """Tokens int32 [B]; -1 leaves a sequence as it is."""
        step, llm, rows = self._step, self._step.llm, self._rows
        torch.clamp(token, -1, 0, out=self._winner)
        torch.add(self._winner, 1, out=self._count)
        rows.stored.fill_(False)
        branch_rows(
            token.view(-1, 1), self._count, llm.device_lengths, self._first_row, rows.token, rows.slot, rows.position,
            rows.count, step.slots,
        )  # fmt: skip
        llm.forward(rows)
        commit_rows(llm, rows, self._winner, self._first_row[:-1], step.batch_size)


def commit_rows(
    decoder: CudaDecoder, rows: PassRows, index: torch.Tensor, first_row: torch.Tensor, count: torch.Tensor | None
) -> None:
    """Make the picked branch of each sequence its last token."""
    commit(
        index, first_row, rows.slot, rows.position, rows.own_key, rows.own_value, rows.hidden_states,
        decoder.block_table, decoder.key_cache, decoder.value_cache, decoder.hidden_states, decoder.device_lengths,
        count,
    )  # fmt: skip
