"""Steps on a GPU: static tensors of a batch, and what runs on them without the host.

A step has two parts. `decide` ends with the pick, which then goes to the host; `advance` prepares the next step, which
may be enqueued before the host has seen the pick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm2_fast.backends.cuda_decoder import CudaDecoder, PassRows, row_budget
from llm2_fast.backends.graph import StepGraph
from llm2_fast.backends.options import candidate_options, occurring_tokens, pick_options
from llm2_fast.backends.report import Report
from llm2_fast.kernels.adjust_and_pick import adjust_and_pick
from llm2_fast.kernels.branch_rows import branch_rows
from llm2_fast.kernels.commit import commit
from llm2_fast.kernels.linear import empty_partial, linear
from llm2_fast.kernels.lm_head_select import empty_partials, lm_head_select
from llm2_fast.kernels.score_head import score_head
from llm2_fast.reference import Candidates, Picked
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


@dataclass(frozen=True)
class CudaHead:
    """A score head on the device, as `score_head` takes it."""

    dense_weight: torch.Tensor | None
    dense_bias: torch.Tensor | None
    score_weight: torch.Tensor
    score_bias: float

    def empty_units(self, rows: int) -> torch.Tensor | None:
        """Workspace for `rows` rows."""
        return None if self.dense_weight is None else self.score_weight.new_empty(rows, len(self.dense_weight))

    def score(self, rows: PassRows, scores: torch.Tensor, units: torch.Tensor | None) -> None:
        """Scores float32 [R] of the rows of a pass."""
        score_head(
            rows.features, self.dense_weight, self.dense_bias, self.score_weight, self.score_bias, scores, units,
            rows.count,
        )  # fmt: skip


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


class PlainStep(Step):
    """No verifier. Rows that take the most probable token get it from `lm_head_select`, others from their logits.

    What a row reports depends on its own options alone, whatever the others of its batch need.
    """

    def __init__(self, llm: CudaDecoder, shape: StepShape, *, greedy: bool, drawn: bool) -> None:
        batch, vocab_size, device = shape.batch, llm.spec.vocab_size, llm.device
        vector, column = (batch,), (batch, 1)
        fields = {
            "ids": (torch.int32, column), "logits": (torch.float32, column), "count": (torch.int32, vector),
            "logsumexp": (torch.float32, vector), "cut": (torch.bool, vector), "token": (torch.int32, vector),
            "drawn_logprob": (torch.float32, vector), "drawn_logit": (torch.float32, column),
        }  # fmt: skip
        super().__init__(llm, shape, fields)
        self._greedy, self._drawn = greedy, drawn
        views = self.report.device
        self._top = Candidates(*(views[name] for name in Candidates._fields))
        self._log_alpha = torch.zeros(batch, device=device)
        self._one = torch.ones(batch, dtype=torch.int32, device=device)
        self._partials = empty_partials(batch, vocab_size, 1, device)
        self._is_greedy = torch.zeros(batch, dtype=torch.bool, device=device)
        self._token_pass = TokenPass(self)
        self.logits = torch.empty(batch if drawn else 0, vocab_size, device=device)
        self._partial = empty_partial(batch, llm.weights.lm_head)
        if drawn:
            self._ids = torch.arange(vocab_size, dtype=torch.int32, device=device).expand(batch, -1)
            self._count = torch.full((batch,), vocab_size, dtype=torch.int32, device=device)
            self._picked = empty_picked(batch, vocab_size, device, logprob=views["drawn_logprob"])
            self._gathered = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def bind(self, sequences: list[Sequence]) -> None:
        super().bind(sequences)
        self._is_greedy[: len(sequences)].copy_(torch.tensor([takes_largest(s) for s in sequences]))
        if self._drawn:
            self._picked.token.fill_(-1)

    def compute_logits(self) -> None:
        """Write `logits` of the sequences' next tokens. Only of a step with drawn rows."""
        self._gather_hidden_states()
        self._write_logits()

    def _write_logits(self) -> None:
        linear(
            self.hidden_states, self.llm.weights.lm_head, None, None, None, None, None, None, self.logits,
            self._partial, self.batch_size,
        )  # fmt: skip

    def _decide(self) -> None:
        self._gather_hidden_states()
        views = self.report.device
        if self._greedy:
            lm_head_select(
                self.hidden_states, self.llm.weights.lm_head, self._log_alpha, self._one, 1, self._top, self._partials,
                self.batch_size,
            )  # fmt: skip
        if self._drawn:
            self._write_logits()
            adjust_and_pick(
                self._ids, self.logits, self._count, None, self.options["beta"], self.occurs, *self._pick_options,
                outputs=self._picked, num_rows=self.batch_size,
            )  # fmt: skip
            self._gathered.view(-1).copy_(self._picked.token)
            self._gathered.clamp_(min=0)
            torch.gather(self._picked.adjusted, 1, self._gathered, out=views["drawn_logit"])
        top = views["ids"].view(-1)
        if self._greedy and self._drawn:
            torch.where(self._is_greedy, top, self._picked.token, out=views["token"])
        else:
            views["token"].copy_(top if self._greedy else self._picked.token)

    def _advance(self) -> None:
        self._token_pass.run(self.report.device["token"])
        self._note(self.report.device["token"])


def takes_largest(sequence: Sequence) -> bool:
    """The most probable token is the pick of plain decoding, whatever the other options."""
    return sequence.config.temperature == 0 and sequence.config.repetition_penalty == 1.0


def empty_picked(batch: int, width: int, device: torch.device, **given: torch.Tensor) -> Picked:
    """Outputs of `adjust_and_pick`; `given` instead of new ones."""
    shapes = {
        "index": (torch.int32, (batch,)), "token": (torch.int32, (batch,)), "logprob": (torch.float32, (batch,)),
        "system1_index": (torch.int32, (batch,)), "adjusted": (torch.float32, (batch, width)),
        "finished": (torch.bool, (batch,)),
    }  # fmt: skip
    return Picked(
        **{
            name: given[name] if name in given else torch.zeros(shape, dtype=dtype, device=device)
            for name, (dtype, shape) in shapes.items()
        }
    )


class VerifiedStep(Step):
    """Candidates are selected behind the LLM's head; scores come from the rows of some pass.

    Args:
        llm: The LLM.
        shape: Of the step.
        head: Reads the rows that score.
        num_rows: Of the pass that scores, R.
        num_sequences: Of that pass; a multiple of B.
        vocab_size: Ids from it on are no candidates.
    """

    def __init__(
        self, llm: CudaDecoder, shape: StepShape, head: CudaHead, num_rows: int, num_sequences: int, vocab_size: int
    ) -> None:
        batch, width, device = shape.batch, shape.max_candidates, llm.device
        vector, matrix = (batch,), (batch, width)
        fields = {
            "ids": (torch.int32, matrix), "logits": (torch.float32, matrix), "count": (torch.int32, vector),
            "logsumexp": (torch.float32, vector), "cut": (torch.bool, vector), "index": (torch.int32, vector),
            "token": (torch.int32, vector), "logprob": (torch.float32, vector), "system1_index": (torch.int32, vector),
            "adjusted": (torch.float32, matrix), "finished": (torch.bool, vector),
            "scores": (torch.float32, (num_rows,)), "first_row": (torch.int32, (num_sequences + 1,)),
        }  # fmt: skip
        super().__init__(llm, shape, fields)
        self.head, self._units = head, head.empty_units(num_rows)
        views = self.report.device
        self.candidates = Candidates(*(views[name] for name in Candidates._fields))
        self.picked = Picked(*(views[name] for name in Picked._fields))
        self.scores, self.first_row = views["scores"], views["first_row"]
        self._lm_head = llm.weights.lm_head[:vocab_size]
        self._partials = empty_partials(batch, vocab_size, width, device)
        if shape.penalized:
            self.seen = torch.zeros(matrix, dtype=torch.bool, device=device)
            self._index = torch.zeros(matrix, dtype=torch.int64, device=device)

    def _prepare(self) -> None:
        self.candidates.count.zero_()
        self.first_row.zero_()
        self._select()

    def _select(self) -> None:
        """The candidates of the next step."""
        self._gather_hidden_states()
        lm_head_select(
            self.hidden_states, self._lm_head, self.options["log_alpha"], self.options["candidate_top_k"],
            self.shape.max_candidates, self.candidates, self._partials, self.batch_size,
        )  # fmt: skip

    def _score(self, rows: PassRows) -> None:
        self.head.score(rows, self.scores, self._units)

    def _pick(self, first_row: torch.Tensor) -> None:
        """Scores of sequence b begin at `first_row[b]`."""
        if self.seen is not None:
            self._index.copy_(self.candidates.ids)
            self._index.clamp_(min=0)
            torch.gather(self.occurs, 1, self._index, out=self.seen)
        adjust_and_pick(
            self.candidates.ids, self.candidates.logits, self.candidates.count, self.scores, self.options["beta"],
            self.seen, *self._pick_options, outputs=self.picked, first_row=first_row, num_rows=self.batch_size,
        )  # fmt: skip


class JointStep(VerifiedStep):
    """One pass over the branches of all sequences gives their scores and, for the winners, the next candidates.

    With `copies` = 2 every branch has an adapted twin in the same pass, which scores; its slots follow the LLM's.
    """

    def __init__(self, llm: CudaDecoder, shape: StepShape, head: CudaHead, copies: int) -> None:
        self._copies, sequences = copies, copies * shape.batch
        self._rows = llm.pass_rows(row_budget(sequences * shape.max_candidates), sequences)
        super().__init__(llm, shape, head, len(self._rows.token), sequences, llm.spec.vocab_size)

        def integers(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=llm.device)

        self.all_slots = integers(sequences)
        self._ids, self._count = integers(sequences, shape.max_candidates), integers(sequences)
        self._winner = integers(sequences)

    def bind_twins(self, slots: list[int]) -> None:
        """The slots of the adapted twins."""
        self._bind_slots(self.llm, self.all_slots[self.shape.batch :], slots)

    def _prepare(self) -> None:
        self.all_slots[: self.shape.batch].copy_(self.slots)
        super()._prepare()

    def _decide(self) -> None:
        batch, rows, llm = self.shape.batch, self._rows, self.llm
        self._ids.view(self._copies, batch, -1).copy_(self.candidates.ids)
        self._count.view(self._copies, batch).copy_(self.candidates.count)
        rows.stored.fill_(False)
        branch_rows(
            self._ids, self._count, llm.device_lengths, self.first_row, rows.token, rows.slot, rows.position,
            rows.count, self.all_slots,
        )  # fmt: skip
        llm.forward(rows)
        self._score(rows)
        self._pick(self.first_row[batch * (self._copies - 1) : batch * self._copies])

    def _advance(self) -> None:
        self._winner.view(self._copies, self.shape.batch).copy_(self.picked.index)
        commit_rows(self.llm, self._rows, self._winner, self.first_row[:-1], None)
        self._note(self.picked.token)
        self._select()


class AlwaysStep(VerifiedStep):
    """`full`, every step verified: the verifier's pass over the branches, then the LLM's over the winners."""

    def __init__(self, llm: CudaDecoder, shape: StepShape, head: CudaHead, verifier: CudaDecoder) -> None:
        self._verifier = verifier
        self._rows = verifier.pass_rows(row_budget(shape.batch * shape.max_candidates), shape.batch)
        vocab_size = min(llm.spec.vocab_size, verifier.spec.vocab_size)
        super().__init__(llm, shape, head, len(self._rows.token), shape.batch, vocab_size)
        self.verifier_slots = torch.zeros_like(self.slots)
        self._token_pass = TokenPass(self)

    def bind_verifier(self, slots: list[int]) -> None:
        """The sequences' slots of the verifier."""
        self._bind_slots(self._verifier, self.verifier_slots, slots)

    def _decide(self) -> None:
        rows = self._rows
        rows.stored.fill_(False)
        branch_rows(
            self.candidates.ids, self.candidates.count, self._verifier.device_lengths, self.first_row, rows.token,
            rows.slot, rows.position, rows.count, self.verifier_slots,
        )  # fmt: skip
        self._verifier.forward(rows)
        self._score(rows)
        self._pick(self.first_row[:-1])

    def _advance(self) -> None:
        commit_rows(self._verifier, self._rows, self.picked.index, self.first_row[:-1], self.batch_size)
        self._token_pass.run(self.picked.token)
        self._note(self.picked.token)
        self._select()


class LazyStep(VerifiedStep):
    """`full`, ambiguous steps verified: the host lists the rows of the verifier's pass, before `decide`."""

    _CATCH_UP = 64  # skipped tokens of a sequence that ride along with its candidates, at most

    def __init__(self, llm: CudaDecoder, shape: StepShape, head: CudaHead, verifier: CudaDecoder) -> None:
        num_rows = row_budget(shape.batch * (shape.max_candidates + self._CATCH_UP))
        vocab_size = min(llm.spec.vocab_size, verifier.spec.vocab_size)
        super().__init__(llm, shape, head, num_rows, shape.batch, vocab_size)
        self._verifier, self._rows = verifier, None
        self._token_pass = TokenPass(self)
        self._ambiguous = torch.zeros(shape.batch, dtype=torch.bool, device=self.device)
        self._winner = torch.zeros_like(self.slots)
        self._none = torch.full_like(self.slots, -1)

    def score(self, slots: list[int], skipped: list[list[int]], ids: list[list[int]]) -> None:
        """A pass of the verifier over skipped tokens, which it stores, and candidates.

        Args:
            slots: The verifier's slot of each sequence.
            skipped: Tokens that it lacks.
            ids: Candidates; none of a sequence that is not ambiguous.
        """
        verifier = self._verifier
        long = [b for b, tokens in enumerate(skipped) if ids[b] and len(tokens) > self._CATCH_UP]
        verifier.extend([slots[b] for b in long], [skipped[b] for b in long])
        tokens, row_slots, positions, stored, first_row = [], [], [], [], []
        for b, slot in enumerate(slots):
            chain = [] if b in long or not ids[b] else skipped[b]
            length = verifier.lengths[slot]
            tokens += [*chain, *ids[b]]
            row_slots += [slot] * (len(chain) + len(ids[b]))
            positions += [*range(length, length + len(chain)), *([length + len(chain)] * len(ids[b]))]
            stored += [True] * len(chain) + [False] * len(ids[b])
            first_row.append(len(tokens) - len(ids[b]))
            verifier.lengths[slot] = length + len(chain)
        self.first_row[: len(first_row)].copy_(torch.tensor(first_row, dtype=torch.int32))
        self._rows = verifier.run_rows(tokens, row_slots, positions, stored, self.shape.batch)
        count = len(self._rows.token)
        self.head.score(self._rows, self.scores[:count], None if self._units is None else self._units[:count])

    def keep_winners(self) -> None:
        """Commit the winners of ambiguous sequences in the verifier's cache, after `decide`."""
        commit_rows(self._verifier, self._rows, self._winner, self.first_row[:-1], self.batch_size)

    def _decide(self) -> None:
        self._pick(self.first_row[:-1])
        torch.gt(self.candidates.count, 1, out=self._ambiguous)
        torch.where(self._ambiguous, self.picked.index, self._none, out=self._winner)

    def _advance(self) -> None:
        self._token_pass.run(self.picked.token)
        self._note(self.picked.token)
        self._select()
