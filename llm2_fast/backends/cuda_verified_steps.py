"""Steps with a verifier: joint look-ahead, always verified, lazily verified."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm2_fast.backends.cuda_decoder import CudaDecoder, PassRows, row_budget
from llm2_fast.backends.cuda_step import Step, StepShape, TokenPass, commit_rows
from llm2_fast.kernels.adjust_and_pick import adjust_and_pick
from llm2_fast.kernels.branch_rows import branch_rows
from llm2_fast.kernels.lm_head_select import empty_partials, lm_head_select
from llm2_fast.kernels.score_head import score_head
from llm2_fast.reference import Candidates, Picked


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
