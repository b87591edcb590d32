"""`Request`: one prompt and its samples under way, their text and their statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from llm2_fast.config import GenerationConfig
from llm2_fast.detokenizer import Detokenizer
from llm2_fast.prefix_index import prompt_key
from llm2_fast.results import FinishReason, Generation, GenerationStats, Sample, StepOutput, StreamEvent
from llm2_fast.sequence import Sequence


@dataclass(eq=False)
class Request:
    """One prompt and its samples under way.

    Attributes:
        request_id, prompt_token_ids, config, eos_token_ids: As of its sequences.
        tokenizer: None if there is none.
        streamed: Text is wanted as it comes, not only at the end.
        stats: Over all samples.
        samples: `config.n` of them.
        key: The prompt, for a `PrefixIndex`.
    """

    request_id: int
    prompt_token_ids: list[int]
    config: GenerationConfig
    eos_token_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None
    streamed: bool = False
    stats: GenerationStats = field(default_factory=GenerationStats)
    _decode_start: float | None = None

    def __post_init__(self) -> None:
        self.samples = [Sampling(self, self._sequence(index)) for index in range(self.config.n)]
        self.key = prompt_key(self.prompt_token_ids)

    def _sequence(self, sample_index: int) -> Sequence:
        return Sequence(self.request_id, sample_index, self.config, self.prompt_token_ids, self.eos_token_ids)

    def opened(self, num_shared: int) -> None:
        """A sample was admitted, whose first `num_shared` tokens had been computed."""
        if self._decode_start is None:  # by another prompt, as this one has computed nothing yet
            self.stats.cached_prompt_tokens = num_shared

    def prefilled(self, seconds: float) -> None:
        """Keys and values of the prompt, or once more of a preempted sample, have been computed."""
        self.stats.prefill_seconds += seconds
        self._decode_start = time.perf_counter() if self._decode_start is None else self._decode_start + seconds

    def sample_finished(self) -> None:
        """A sample has its last token."""
        self.stats.decode_seconds = time.perf_counter() - self._decode_start

    @property
    def generation(self) -> Generation:
        """The result, once all samples have finished."""
        return Generation(self.prompt_token_ids, [sampling.sample for sampling in self.samples], self.stats)


class Sampling:
    """One sample under way: its sequence, its text so far and its result."""

    def __init__(self, request: Request, sequence: Sequence) -> None:
        self.request, self.sequence = request, sequence
        self.sample = Sample(token_ids=sequence.token_ids, trace=[] if request.config.trace else None)
        # Decoding text token by token costs as much as a percent of a step, so only who looks at it pays for it.
        incremental = request.tokenizer is not None and (request.streamed or request.config.stop)
        self._detokenizer = Detokenizer(request.tokenizer, request.config.stop) if incremental else None

    @property
    def finished(self) -> bool:
        """The sample has its last token."""
        return self.sample.finish_reason is not None

    @property
    def is_last_step(self) -> bool:
        """The step under way ends the sample, if nothing ends it before."""
        return len(self.sequence.token_ids) + 1 >= self.request.config.max_new_tokens

    def record(self, output: StepOutput) -> StreamEvent:
        """Take one step's outcome into the sequence, the sample and the statistics."""
        sample = self.sample
        self.request.stats.count(output)
        text = None if self._detokenizer is None else ""
        if output.token_id is not None:
            self.sequence.token_ids.append(output.token_id)
            sample.logprobs.append(output.logprob)
            if output.trace is not None:
                sample.trace.append(output.trace)
            if self._detokenizer is not None:
                text = self._detokenizer.push(output.token_id)
        sample.finish_reason, sample.error = self._finish_reason(output), output.error
        if self.finished:
            if self._detokenizer is not None:
                text += self._detokenizer.finish()
                sample.text = self._detokenizer.text
                if self._detokenizer.stopped and sample.finish_reason == "length":
                    sample.finish_reason = "stop"  # the last characters were held back until now
            elif self.request.tokenizer is not None:
                sample.text = self.request.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            self.request.sample_finished()
        return StreamEvent(
            self.sequence.sample_index,
            output.token_id,
            text,
            output.logprob,
            output.trace,
            sample.finish_reason,
            sample.error,
        )

    def _finish_reason(self, output: StepOutput) -> FinishReason | None:
        if output.error is not None:
            return "error"
        if output.token_id in self.sequence.eos_token_ids:
            return "eos"
        if self._detokenizer is not None and self._detokenizer.stopped:
            return "stop"
        if len(self.sequence.token_ids) >= self.request.config.max_new_tokens:
            return "length"
        return None
