"""What a generation returns: `Generation`, its samples, statistics and traces."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "error"]


@dataclass(frozen=True)
class TraceStep:
    """One decoding step, candidates in order of System 1's preference.

    Attributes:
        candidate_ids: The plausible tokens; without a verifier only the chosen one.
        logprobs: System 1's log-probability of each, over the whole vocabulary.
        scores: The verifier's score of each; None where there was nothing to decide or no verifier.
        adjusted_logits: z + beta * s of each.
        system1_token_id: What System 1 alone would have chosen from the same candidates with the same random numbers.
        token_id: What was chosen.
    """

    candidate_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    scores: tuple[float, ...] | None
    adjusted_logits: tuple[float, ...]
    system1_token_id: int
    token_id: int

    @property
    def intervention(self) -> bool:
        """System 2 changed the choice."""
        return self.token_id != self.system1_token_id


@dataclass(frozen=True)
class StepOutput:
    """What a backend reports of one sequence's step.

    Attributes:
        token_id: The chosen token; None after an error.
        logprob: Log-softmax of the adjusted logits over the candidates, before temperature.
        num_candidates: Size of the plausible set; 0 without a verifier.
        cut: `max_candidates` dropped plausible tokens.
        intervention: System 2 changed the choice.
        verifier_rows: Token rows that the verifier computed for this step.
        error: Why no token could be chosen.
        trace: With `GenerationConfig.trace`.
    """

    token_id: int | None
    logprob: float
    num_candidates: int = 0
    cut: bool = False
    intervention: bool = False
    verifier_rows: int = 0
    error: str | None = None
    trace: TraceStep | None = None


@dataclass
class Sample:
    """One continuation of a prompt.

    Attributes:
        token_ids: Generated tokens, with the end-of-sequence token if there was one.
        text: Decoded without special tokens and cut before a stop string; None without a tokenizer.
        finish_reason: "eos", "stop", "length" or "error".
        error: What went wrong, with `finish_reason` "error".
        logprobs: One per token: log-softmax of the adjusted logits over the step's candidates, before temperature.
        trace: One step per token, with `GenerationConfig.trace`.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[float] = field(default_factory=list)
    trace: list[TraceStep] | None = None


@dataclass
class GenerationStats:
    """Counts over all samples of a prompt, and wall-clock times in seconds.

    Attributes:
        steps: Decoding steps.
        ambiguous_steps: Steps with more than one candidate.
        interventions: Steps whose token System 1 alone would not have chosen.
        candidate_histogram: Number of steps by number of candidates; empty without a verifier.
        cut_steps: Steps in which `max_candidates` dropped plausible tokens.
        verifier_rows: Token rows that the verifier computed: candidates, and tokens it caught up on, but for those of
            prompts that it computed for several samples to share.
        cached_prompt_tokens: Prompt tokens that were not computed when the first sample was admitted, since another
            prompt of the call begins with them and had them cached.
        preemptions: Times that a sample gave up its place in a full cache; what it had cached was computed again.
        prefill_seconds: From admission of the prompt until its keys and values were computed, and the same for samples
            admitted again.
        decode_seconds: The rest of the time until its last sample finished; prompts decoded together share it.
    """

    steps: int = 0
    ambiguous_steps: int = 0
    interventions: int = 0
    candidate_histogram: Counter[int] = field(default_factory=Counter)
    cut_steps: int = 0
    verifier_rows: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def count(self, output: StepOutput) -> None:
        """Add one step."""
        self.steps += 1
        self.ambiguous_steps += output.num_candidates > 1
        self.interventions += output.intervention
        self.cut_steps += output.cut
        self.verifier_rows += output.verifier_rows
        if output.num_candidates:
            self.candidate_histogram[output.num_candidates] += 1


@dataclass
class Generation:
    """All samples of one prompt.

    Attributes:
        prompt_token_ids: The prompt as the model saw it.
        samples: `n` of them, by sample index.
        stats: Over all samples.
    """

    prompt_token_ids: list[int]
    samples: list[Sample]
    stats: GenerationStats = field(default_factory=GenerationStats)

    @property
    def text(self) -> str | None:
        """Text of the first sample."""
        return self.samples[0].text


@dataclass(frozen=True)
class StreamEvent:
    """One token of a stream.

    Attributes:
        sample_index: The sample it belongs to.
        token_id: The token; None when the sample ended with an error.
        text: New text, possibly empty while a character or a stop string may be incomplete; None without a tokenizer.
        logprob: As in `Sample.logprobs`.
        trace: With `GenerationConfig.trace`.
        finish_reason: Set on the sample's last event.
        error: With `finish_reason` "error".
    """

    sample_index: int
    token_id: int | None
    text: str | None
    logprob: float
    trace: TraceStep | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
