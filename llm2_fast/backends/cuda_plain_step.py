"""`PlainStep`: a step without a verifier."""

from __future__ import annotations

import torch

from llm2_fast.backends.cuda_decoder import CudaDecoder
from llm2_fast.backends.cuda_step import Step, StepShape, TokenPass
from llm2_fast.kernels.adjust_and_pick import adjust_and_pick
from llm2_fast.kernels.linear import empty_partial, linear
from llm2_fast.kernels.lm_head_select import empty_partials, lm_head_select
from llm2_fast.reference import Candidates, Picked
from llm2_fast.sequence import Sequence


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
