"""The ways in which the cuda backend gets scores: plain, joint look-ahead, lazy, always.

A step is enqueued by `begin`, and the next one may be before the host has seen what the first has picked. What the host
knows of a slot, its length above all, is that of the steps it has waited for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch

from llm2_fast.backends.compiled_plan import CompiledPlan, Twins
from llm2_fast.backends.cuda_decoder import CudaDecoder
from llm2_fast.backends.cuda_plain_step import PlainStep, takes_largest
from llm2_fast.backends.cuda_step import Step, StepShape
from llm2_fast.backends.cuda_verified_steps import AlwaysStep, CudaHead, JointStep, LazyStep
from llm2_fast.backends.late_step import LateStep, Reported
from llm2_fast.backends.outputs import step_outputs
from llm2_fast.backends.report import Receipt
from llm2_fast.errors import ArgumentError
from llm2_fast.kernels.row_tiles import MAX_ROWS
from llm2_fast.kernels.select_candidates import MAX_CANDIDATES
from llm2_fast.reference import Candidates, Picked
from llm2_fast.results import StepOutput
from llm2_fast.sequence import Sequence

_LARGEST_BATCH = 256  # of one step; more sequences are decoded in parts


class CudaPlan(CompiledPlan, ABC):
    """Steps of batches, and what a verifier keeps of their sequences."""

    rows_per_branch = 1

    def __init__(self, llm: CudaDecoder) -> None:
        self._llm = llm
        self._steps: dict[tuple, Step] = {}
        self._bound: tuple[Step, list[Sequence]] | None = None
        self._late: list[LateStep] = []  # whose outputs have not been built

    def begin(self, sequences: list[Sequence]) -> Callable[[], list[StepOutput]]:
        """Enqueue the choice of each sequence's next token. What is returned waits for it."""
        for step in self._late[:-1]:
            step.outputs()  # before its report is overwritten
        begun = [self._begin(part) for part in self._parts(sequences)]
        return lambda: [output for step in begun for output in step.outputs()]

    def continues(self, sequences: list[Sequence]) -> bool:
        """The last step was theirs, so the next one begins where that one ends, on the device."""
        return self._bound is not None and self._bound[1] == sequences

    @property
    def num_unknown(self) -> int:
        """Steps enqueued for which the host has not waited."""
        return sum(not step.known for step in self._late)

    def settle(self) -> None:
        """Wait for all steps, so that the host's books are those of the device."""
        for step in self._late:
            step.outputs()
        self._late.clear()

    def check(self, sequence: Sequence) -> None:
        """Raise `ArgumentError` if a sequence's options are out of reach."""

    def extend(self, sequences: list[Sequence]) -> None:
        """Compute what is missing of the sequences' tokens, the verifier's too if it needs it at every step."""
        missing = [s for s in sequences if self._llm.lengths[s.slot] < len(s)]
        if missing:
            self.release()
            self._llm.extend([s.slot for s in missing], [s.tokens_from(self._llm.lengths[s.slot]) for s in missing])

    def release(self) -> None:
        """What the next step begins with has to be computed anew."""
        self.settle()
        self._bound = None

    @abstractmethod
    def _make(self, shape: StepShape) -> Step: ...

    @abstractmethod
    def _begin(self, sequences: list[Sequence]) -> LateStep: ...

    def _enqueue(
        self, step: Step, note: Callable[[Reported], None], build: Callable[[Reported], list[StepOutput]]
    ) -> LateStep:
        """Both parts of a step; the report is on its way while the second runs."""
        step.decide()
        receipt = step.report.send()
        step.advance()
        return self._track(receipt, note, build)

    def _track(
        self, receipt: Receipt, note: Callable[[Reported], None], build: Callable[[Reported], list[StepOutput]]
    ) -> LateStep:
        self._late = [*self._late[-1:], LateStep(receipt, note, build)]
        return self._late[-1]

    def _parts(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Batches whose rows fit a pass."""
        width = max((s.config.max_candidates for s in sequences), default=1)
        size = min(_LARGEST_BATCH, MAX_ROWS // (width * self.rows_per_branch))
        size = 1 << (size.bit_length() - 1)
        for first in range(0, len(sequences), size):
            yield sequences[first : first + size]

    def _bind(self, sequences: list[Sequence], shape: StepShape, key: tuple = ()) -> Step:
        """The step of these sequences, ready to decide."""
        if not self.continues(sequences):
            self.settle()
            self.extend(sequences)
        if (step := self._steps.get((shape, *key))) is None:
            step = self._steps[(shape, *key)] = self._make(shape, *key)
        if self._bound != (step, sequences):
            self.settle()
            self._bind_slots(step, sequences)
            self._bound = step, list(sequences)
        return step

    def _bind_slots(self, step: Step, sequences: list[Sequence]) -> None:
        step.bind(sequences)


class PlainCudaPlan(CudaPlan):
    """No verifier: the pick is among the whole vocabulary."""

    def _make(self, shape: StepShape, greedy: bool, drawn: bool) -> Step:
        return PlainStep(self._llm, shape, greedy=greedy, drawn=drawn)

    def _plain_step(self, sequences: list[Sequence]) -> PlainStep:
        greedy = [takes_largest(s) for s in sequences]
        shape = StepShape.of(sequences)._replace(max_candidates=1)
        return self._bind(sequences, shape, (any(greedy), not all(greedy)))

    def _parts(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        return (sequences[first : first + _LARGEST_BATCH] for first in range(0, len(sequences), _LARGEST_BATCH))

    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        parts = []
        for part in self._parts(sequences):
            shape = StepShape.of(part)._replace(max_candidates=1, penalized=False)
            step = self._bind(part, shape, (False, True))
            step.compute_logits()
            parts.append(step.logits[: len(part)].cpu())
        return torch.cat(parts)

    def _begin(self, sequences: list[Sequence]) -> LateStep:
        slots = [s.slot for s in sequences]

        def note(report: Reported) -> None:
            for slot, token in zip(slots, report["token"].tolist(), strict=False):
                self._llm.lengths[slot] += token >= 0

        return self._enqueue(self._plain_step(sequences), note, lambda report: self._outputs(sequences, report))

    @staticmethod
    def _outputs(sequences: list[Sequence], report: Reported) -> list[StepOutput]:
        batch = len(sequences)
        values = {name: values[:batch] for name, values in report.items()}
        greedy = torch.tensor([takes_largest(s) for s in sequences])
        token = values["token"]
        index = token.clamp(-1, 0)
        logit = torch.where(greedy[:, None], values["logits"], values["drawn_logit"])
        top_logprob = values["logits"][:, 0] - values["logsumexp"]
        logprob = torch.where(greedy, top_logprob, values["drawn_logprob"])
        zero = torch.zeros(batch, dtype=torch.bool)
        candidates = Candidates(token[:, None], logit, index + 1, logit[:, 0] - logprob, zero)
        picked = Picked(index, token, logprob, index, logit, zero)
        return step_outputs(sequences, candidates, None, picked, [0] * batch)


class VerifiedCudaPlan(CudaPlan):
    """With a verifier of some kind."""

    def __init__(self, llm: CudaDecoder, head: CudaHead) -> None:
        super().__init__(llm)
        self._head = head

    def check(self, sequence: Sequence) -> None:
        width = sequence.config.max_candidates
        if width > MAX_CANDIDATES:
            raise ArgumentError("max_candidates", f"at most {MAX_CANDIDATES} with the cuda backend", width)

    @staticmethod
    def _outputs(
        sequences: list[Sequence], selected: Reported, report: Reported, first: int, verifier_rows: list[int]
    ) -> list[StepOutput]:
        """Of a report whose scores of sequence b begin at row `first_row[first + b]`; candidates are in `selected`."""
        batch = len(sequences)
        candidates = Candidates(*(selected[name][:batch] for name in Candidates._fields))
        picked = Picked(*(report[name][:batch] for name in Picked._fields))
        place = report["first_row"][first : first + batch, None] + torch.arange(candidates.ids.shape[1])
        scores = report["scores"].take(place.clamp(0, len(report["scores"]) - 1))
        return step_outputs(sequences, candidates, scores, picked, verifier_rows)


class JointCudaPlan(VerifiedCudaPlan):
    """`head`: one pass over all branches gives their scores and, for the chosen one, the next candidates."""

    def _make(self, shape: StepShape) -> Step:
        return JointStep(self._llm, shape, self._head, self.rows_per_branch)

    def _begin(self, sequences: list[Sequence]) -> LateStep:
        step = self._bind(sequences, StepShape.of(sequences))
        slots, first = [s.slot for s in sequences], step.shape.batch * (self.rows_per_branch - 1)

        def note(report: Reported) -> None:
            for slot, index in zip(slots, report["index"].tolist(), strict=False):
                if index >= 0:
                    self._committed(slot)

        def build(report: Reported) -> list[StepOutput]:
            rows = self._verifier_rows(report["count"][: len(sequences)].tolist())
            return self._outputs(sequences, report, report, first, rows)

        return self._enqueue(step, note, build)

    def _committed(self, slot: int) -> None:
        self._llm.lengths[slot] += 1

    def _verifier_rows(self, counts: list[int]) -> list[int]:
        return [count if count > 1 else 0 for count in counts]


class JointLoraCudaPlan(JointCudaPlan):
    """`lora`: the same pass runs every branch a second time, with the adapter, over other slots of the same cache."""

    rows_per_branch = 2

    def __init__(self, llm: CudaDecoder, head: CudaHead) -> None:
        super().__init__(llm, head)
        self._twins = Twins(llm, adapted=True)

    def extend(self, sequences: list[Sequence]) -> None:
        pairs = [(slot, s) for s in sequences for slot in (s.slot, self._twins[s.slot])]
        missing = [(slot, s.tokens_from(self._llm.lengths[slot])) for slot, s in pairs]
        missing = [(slot, tokens) for slot, tokens in missing if tokens]
        if missing:
            self.release()
            self._llm.extend(*zip(*missing, strict=True))

    def _bind_slots(self, step: JointStep, sequences: list[Sequence]) -> None:
        step.bind(sequences)
        step.bind_twins([self._twins[s.slot] for s in sequences])

    def _committed(self, slot: int) -> None:
        super()._committed(slot)
        self._llm.lengths[self._twins[slot]] += 1

    def _verifier_rows(self, counts: list[int]) -> list[int]:
        return counts  # an unambiguous step's row extends the adapter's cache


class FullCudaPlan(VerifiedCudaPlan):
    """`full`: a network of its own, with slots of its own."""

    def __init__(self, llm: CudaDecoder, head: CudaHead, verifier: CudaDecoder) -> None:
        super().__init__(llm, head)
        self.verifier, self._twins = verifier, Twins(verifier)

    def _advanced(self, slots: list[int], report: Reported, verified: list[bool]) -> None:
        """The LLM has run over the picked tokens; the verifier has kept those of `verified` sequences."""
        for slot, index, kept in zip(slots, report["index"].tolist(), verified, strict=False):
            self._llm.lengths[slot] += index >= 0
            self.verifier.lengths[self._twins[slot]] += index >= 0 and kept


class AlwaysCudaPlan(FullCudaPlan):
    """Every step is verified, and no step waits to know whether it has to be."""

    def _make(self, shape: StepShape) -> Step:
        return AlwaysStep(self._llm, shape, self._head, self.verifier)

    def extend(self, sequences: list[Sequence]) -> None:
        super().extend(sequences)
        if any(self._twins.skipped(s) for s in sequences):
            self.release()
            self._twins.catch_up(sequences)

    def _bind_slots(self, step: AlwaysStep, sequences: list[Sequence]) -> None:
        step.bind(sequences)
        step.bind_verifier([self._twins[s.slot] for s in sequences])

    def _begin(self, sequences: list[Sequence]) -> LateStep:
        step = self._bind(sequences, StepShape.of(sequences))
        slots, batch = [s.slot for s in sequences], len(sequences)
        return self._enqueue(
            step,
            lambda report: self._advanced(slots, report, [True] * batch),
            lambda report: self._outputs(sequences, report, report, 0, report["count"][:batch].tolist()),
        )


class LazyCudaPlan(FullCudaPlan):
    """The verifier runs at ambiguous steps only and catches up on what it skipped.

    A step's report holds its pick and the next step's candidates. The host waits for it once, to see whether the next
    step needs the verifier and to list the verifier's rows.
    """

    rows_per_branch = 3  # candidates, and skipped tokens that ride along

    def __init__(self, llm: CudaDecoder, head: CudaHead, verifier: CudaDecoder) -> None:
        super().__init__(llm, head, verifier)
        self._selected: Callable[[], Reported] | None = None  # waits for the next step's candidates
        self._last_tokens: dict[int, int] = {}  # by slot, that the last step known has picked

    def _make(self, shape: StepShape) -> Step:
        return LazyStep(self._llm, shape, self._head, self.verifier)

    def _bind_slots(self, step: LazyStep, sequences: list[Sequence]) -> None:
        step.bind(sequences)
        self._selected = step.report.send().wait

    def _begin(self, sequences: list[Sequence]) -> LateStep:
        step = self._bind(sequences, StepShape.of(sequences))
        selected, slots, batch = self._selected(), [s.slot for s in sequences], len(sequences)
        counts = selected["count"][:batch].tolist()
        ambiguous, skipped = [count > 1 for count in counts], [[] for _ in sequences]
        if any(ambiguous):
            ids = selected["ids"][:batch].tolist()
            ids = [row[:count] if count > 1 else [] for row, count in zip(ids, counts, strict=True)]
            skipped = [self._skipped(s) if row else [] for s, row in zip(sequences, ids, strict=True)]
            step.score([self._twins[slot] for slot in slots], skipped, ids)
        step.decide()
        if any(ambiguous):
            step.keep_winners()
        step.advance()
        rows = [len(skipped[b]) + counts[b] if ambiguous[b] else 0 for b in range(batch)]

        def note(report: Reported) -> None:
            self._advanced(slots, report, ambiguous)
            tokens = zip(slots, report["token"].tolist(), strict=False)
            self._last_tokens = {slot: token for slot, token in tokens if token >= 0}

        late = self._track(step.report.send(), note, lambda report: self._outputs(sequences, selected, report, 0, rows))
        self._selected = late.wait
        return late

    def _skipped(self, sequence: Sequence) -> list[int]:
        """Tokens that the verifier lacks, the one that the sequence is about to get included."""
        tokens, slot = self._twins.skipped(sequence), sequence.slot
        if self._llm.lengths[slot] > max(len(sequence), self._twins.length(slot)):
            tokens = [*tokens, self._last_tokens[slot]]
        return tokens
