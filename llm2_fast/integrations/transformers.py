"""`VerifierLogitsProcessor`: System 2 inside Hugging Face `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from llm2_fast.config import GenerationConfig, check_number
from llm2_fast.errors import ArgumentError, Llm2FastError
from llm2_fast.reference import NEG_INF, Candidates, process_logits, select_candidates, usable_rows
from llm2_fast.verifier import Verifier

# Options whose processors `generate` runs before custom ones, with the value besides None that leaves each off.
_EARLIER_PROCESSORS = {
    "guidance_scale": 1,
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


class VerifierLogitsProcessor(transformers.LogitsProcessor):
    """Restricts each row to its plausible tokens and adds the verifier's scores: z + beta * s inside, -inf elsewhere
    (LLM2, arXiv 2412.20372, equations 1 to 3).

    Goes into `model.generate(logits_processor=[...])`, with greedy search, sampling, beams and assisted decoding:

        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        processor = VerifierLogitsProcessor(
            verifier, attention_mask=inputs["attention_mask"], generation_config=model.generation_config
        )
        model.generate(**inputs, logits_processor=[processor])

    It belongs to one `generate` call, as the padding does; `reset` readies it for other prompts.

    The verifier scores over a cache of its own, one slot per row; only rows with several candidates are scored. Every
    row's tokens are compared with its slot's, so rows may be reordered, shortened or replaced between calls. `head` and
    `lora` verifiers, which ride on the LLM's pass in `llm2_fast.generate`, here run their base model once more, and
    load a copy of it unless they were loaded with `base_model=model`.

    `generate` tells a processor neither its options nor which rows have ended. So ended rows go on being scored, and
    options that change logits before custom processors run would silently corrupt the plausible set: pass the
    `generation_config` that `generate` will use to have them refused. Arguments of `generate` itself, such as
    `prefix_allowed_tokens_fn`, cannot be seen here and have to be left out. Temperature, top_k, top_p and min_p run
    afterwards, on the candidates only, and need no care.

    Args:
        verifier: System 2.
        alpha, beta, candidate_top_k, max_candidates: As in `llm2_fast.GenerationConfig`.
        repetition_penalty: As there: applied to the adjusted logits of the candidates, not, as `generate`'s own, before
            the plausible set is taken. Beam search passes log-probabilities, so there it applies to these plus scores.
        attention_mask: [B, prompt_width], ones behind zeros: the left-padded prompts given to `generate`. Needed since
            padding cannot be told from the ids where the pad token is also the end-of-sequence token.
        prompt_lengths: Instead of the mask, tokens per prompt, the longest of which has no padding.
        generation_config: What `generate` will use, usually `model.generation_config`.

    Raises:
        ArgumentError: An option is out of range, the prompts are not left-padded, or `generation_config` has an option
            on that runs before this processor.
        CheckpointError: The base model under a `head` or `lora` verifier cannot be loaded.
    """

    # There rows arrive packed, without the tokens before them, which is what a verifier reads.
    supports_continuous_batching = False

    def __init__(
        self,
        verifier: Verifier,
        *,
        alpha: float = GenerationConfig.alpha,
        beta: float = GenerationConfig.beta,
        candidate_top_k: int | None = GenerationConfig.candidate_top_k,
        max_candidates: int = GenerationConfig.max_candidates,
        repetition_penalty: float = GenerationConfig.repetition_penalty,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: Sequence[int] | None = None,
        generation_config: transformers.GenerationConfig | None = None,
    ) -> None:
        if not isinstance(verifier, Verifier):
            raise ArgumentError("verifier", "a llm2_fast.Verifier", type(verifier).__name__)
        self._config = GenerationConfig(
            alpha=alpha,
            beta=beta,
            candidate_top_k=candidate_top_k,
            max_candidates=max_candidates,
            repetition_penalty=repetition_penalty,
        )
        if generation_config is not None:
            _refuse_earlier_processors(generation_config)
        self._slots: list[int] = []
        self.reset(attention_mask=attention_mask, prompt_lengths=prompt_lengths)
        self._session = verifier.session()

    def reset(self, *, attention_mask: torch.Tensor | None = None, prompt_lengths: Sequence[int] | None = None) -> None:
        """Forget all rows and expect a `generate` call with other prompts. Arguments as for the constructor."""
        self._prompt_lengths, self._prompt_width = _read_padding(attention_mask, prompt_lengths)
        self._prompts: torch.Tensor | None = None
        self._free_slots(0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Adjust the logits of one step.

        Args:
            input_ids: int64 [R, T], prompts and generated tokens; R is a multiple of the number of prompts, whose rows
                (beams, returned sequences) are neighbours.
            scores: [R, V], raw logits, compared in float32.

        Returns:
            [R, V] in the dtype of `scores`, -inf outside the plausible sets.

        Raises:
            ArgumentError: The rows do not continue the prompts of this `generate` call, their logits are NaN or have no
                finite maximum, or they hold tokens that the verifier does not know.
            Llm2FastError: The verifier scored NaN, or no candidate of a row finitely. `generate` has no error per row.
        """
        histories = self._histories(input_ids)
        candidates = self._propose(scores)
        adjusted = self._adjust(candidates, histories)
        inside = candidates.ids >= 0
        rows, _ = inside.nonzero(as_tuple=True)
        output = torch.full_like(scores, NEG_INF)
        output[rows, candidates.ids[inside].long()] = adjusted[inside].to(scores.dtype)
        return output

    def _histories(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of each row without padding, once the rows are known to belong to this call's prompts."""
        num_rows, width = input_ids.shape
        num_prompts = len(self._prompt_lengths)
        if num_rows == 0 or num_rows % num_prompts != 0:
            raise ArgumentError("input_ids", f"rows for {num_prompts} prompts, or a multiple of it", f"{num_rows} rows")
        copies = num_rows // num_prompts
        first_call = self._prompts is None
        if width < self._prompt_width or (first_call and width != self._prompt_width):
            expected = f"prompts {self._prompt_width} tokens wide, as attention_mask or prompt_lengths say"
            raise ArgumentError("input_ids", expected, f"{width} tokens")
        prompts = input_ids[::copies, : self._prompt_width].clone() if first_call else self._prompts
        if not torch.equal(input_ids[:, : self._prompt_width], prompts.repeat_interleave(copies, dim=0)):
            expected = "the prompts of the first step, to which attention_mask or prompt_lengths belong"
            raise ArgumentError("input_ids", expected, "others; call reset, or make a processor per generate call")
        self._prompts = prompts
        starts = (self._prompt_width - length for length in self._prompt_lengths for _ in range(copies))
        return [row[start:] for row, start in zip(input_ids, starts, strict=True)]

    def _propose(self, logits: torch.Tensor) -> Candidates:
        config = self._config
        logits = logits[:, : self._session.vocab_size]  # what the verifier does not know is no candidate
        log_alpha = logits.new_full((len(logits),), config.log_alpha, dtype=torch.float32)
        candidate_top_k = logits.new_full((len(logits),), config.candidate_top_k or 0, dtype=torch.int32)
        candidates = select_candidates(logits, log_alpha, candidate_top_k, config.max_candidates)
        if undecided := (candidates.count == 0).nonzero().flatten().tolist():
            raise ArgumentError("scores", "logits with a finite maximum and no NaN", f"others in rows {undecided}")
        return candidates

    def _adjust(self, candidates: Candidates, histories: list[torch.Tensor]) -> torch.Tensor:
        """z + beta * s, then the repetition penalty; float32 [R, K], -inf past the count."""
        adjusted = candidates.logits.clone()
        counts = candidates.count.tolist()
        ambiguous = [row for row, count in enumerate(counts) if count > 1]
        branches = [candidates.ids[row, : counts[row]].tolist() for row in ambiguous]
        for row, scores in zip(ambiguous, self._score(histories, ambiguous, branches), strict=True):
            adjusted[row, : counts[row]] += self._config.beta * scores.to(adjusted.device)
        if undecided := (~usable_rows(adjusted)).nonzero().flatten().tolist():
            self._free_slots(0)  # a NaN may have come through their keys and values
            raise Llm2FastError(f"verifier: expected scores without NaN, one finite, got others in rows {undecided}")
        if self._config.repetition_penalty == 1.0:
            return adjusted
        seen = torch.stack([torch.isin(ids, history) for ids, history in zip(candidates.ids, histories, strict=True)])
        return _penalize(adjusted, candidates.ids, seen, self._config.repetition_penalty)

    def _score(self, histories: list[torch.Tensor], rows: list[int], branches: list[list[int]]) -> list[torch.Tensor]:
        """The verifier's scores of `branches` behind the histories of `rows`."""
        self._free_slots(len(histories))
        while len(self._slots) < len(histories):
            self._slots.append(self._session.add())
        for row in rows:
            self._follow(self._slots[row], histories[row].tolist())
        return [scores for scores, _ in self._session.score([self._slots[row] for row in rows], branches)]

    def _follow(self, slot: int, history: list[int]) -> None:
        """Make the slot hold `history`, keeping what it has of it."""
        known = self._session.token_ids(slot)
        pairs = enumerate(zip(known, history, strict=False))
        common = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(known), len(history)))
        self._session.rollback(slot, common)
        self._session.extend(slot, history[common:])

    def _free_slots(self, keep: int) -> None:
        while len(self._slots) > keep:
            self._session.free(self._slots.pop())


def _read_padding(attention_mask: torch.Tensor | None, prompt_lengths: Sequence[int] | None) -> tuple[list[int], int]:
    """Tokens per prompt without padding, and the width of the padded prompts."""
    if (attention_mask is None) == (prompt_lengths is None):
        actual = "neither" if attention_mask is None else "both"
        raise ArgumentError("attention_mask", "either attention_mask or prompt_lengths", actual)
    if attention_mask is None:
        lengths = list(prompt_lengths)
        for i, length in enumerate(lengths):
            check_number(f"prompt_lengths[{i}]", length, integer=True, minimum=1)
        if not lengths:
            raise ArgumentError("prompt_lengths", "at least one prompt", "none")
        return lengths, max(lengths)
    mask = torch.as_tensor(attention_mask)
    if mask.dim() != 2 or 0 in mask.shape:
        raise ArgumentError("attention_mask", "shape [B, prompt_width]", f"shape {tuple(mask.shape)}")
    lengths = (mask != 0).sum(dim=1)
    left_padded = torch.arange(mask.shape[1], device=mask.device) >= mask.shape[1] - lengths.unsqueeze(1)
    if wrong := ((mask != left_padded).any(dim=1) | (lengths == 0)).nonzero().flatten().tolist():
        raise ArgumentError("attention_mask", "rows of zeros (padding), then at least one 1", f"others in rows {wrong}")
    return lengths.tolist(), mask.shape[1]


def _refuse_earlier_processors(config: transformers.GenerationConfig) -> None:
    if not isinstance(config, transformers.GenerationConfig):
        raise ArgumentError("generation_config", "a transformers.GenerationConfig", type(config).__name__)
    for name, off in _EARLIER_PROCESSORS.items():
        value = getattr(config, name, None)
        if value is not None and value != off:
            instead = "; give it to VerifierLogitsProcessor instead" if name == "repetition_penalty" else ""
            expected = f"{off!r}, since generate applies it to the logits before the plausible set is taken{instead}"
            raise ArgumentError(f"generation_config.{name}", expected, value)


def _penalize(logits: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor, repetition_penalty: float) -> torch.Tensor:
    """`process_logits` with everything but the penalty off."""
    one = logits.new_ones(len(logits))
    off = {"temperature": one, "top_k": torch.zeros_like(one).int(), "top_p": one, "log_min_p": one * NEG_INF}
    return process_logits(logits, ids, seen, one * repetition_penalty, **off)
