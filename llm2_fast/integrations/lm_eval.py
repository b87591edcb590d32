"""Tasks of lm-evaluation-harness, plainly and with System 2: the model `llm2_fast`.

In Python, importing this module registers it for `lm_eval.simple_evaluate(model="llm2_fast", model_args=...)`. As a
command, `python -m llm2_fast.integrations.lm_eval` is `lm_eval` with the model registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2_fast.config import GenerationConfig, check_option_names
from llm2_fast.engine import load
from llm2_fast.errors import ArgumentError, MissingDependencyError
from llm2_fast.verifier import Verifier

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise MissingDependencyError("tasks of lm-evaluation-harness need: pip install 'llm2-fast[lm-eval]'") from error

_OF_MODEL = ("alpha", "beta", "candidate_top_k", "max_candidates", "seed")
_OF_TASK = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("llm2_fast")
class EngineLM(HFLM):
    """An engine as a model of lm-evaluation-harness.

    What is generated comes from the engine, with System 2 if there is a verifier. Likelihoods, which System 2 does not
    change, are those of the model itself, as `HFLM` computes them; so are encoding and chat templates.

    Args:
        pretrained: As `model` of `llm2_fast.load`.
        verifier, tokenizer, device, dtype, backend, max_length: As of `llm2_fast.load`.
        batch_size: Sequences decoded together.
        max_batch_size: Without effect: the batch size is not searched for.
        add_bos_token: As of `HFLM`.
        **options: alpha, beta, candidate_top_k, max_candidates, seed. A task sets the others.

    Raises:
        ArgumentError: An option is unknown or out of range.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        verifier: str | Verifier | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        max_length: int | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdecimal():
            raise ArgumentError("batch_size", "an integer >= 1", batch_size)
        check_option_names(options, _OF_MODEL, what="option")
        self._generation_config = GenerationConfig(**options)
        self._engine = load(
            pretrained,
            verifier,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            backend=backend,
            max_batch_size=int(batch_size),
            max_length=max_length,
        )
        if self._engine.tokenizer is None:
            raise ArgumentError("pretrained", "a model with a tokenizer", "none")
        super().__init__(
            self._engine.model.model,
            tokenizer=self._engine.tokenizer,
            max_length=self._engine.max_length,
            batch_size=int(batch_size),
            add_bos_token=add_bos_token,
        )

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue the context of each request, under the task's own options.

        A context that is too long loses its first tokens.

        Raises:
            ArgumentError: A task asks for an option that `GenerationConfig` does not have.
        """
        texts = [""] * len(requests)
        groups: dict[GenerationConfig, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._task_config(request.args[1]), []).append(index)
        with tqdm(total=len(requests), desc="llm2_fast", disable=disable_tqdm) as bar:
            for config, indices in groups.items():
                size = 4 * self._engine.max_batch_size
                for some in (indices[start : start + size] for start in range(0, len(indices), size)):
                    prompts = [self._encode_context(requests[index].args[0], config) for index in some]
                    # Repeats of a context are to be other samples.
                    generations = self._engine.generate(prompts, config, request_ids=some)
                    for index, generation in zip(some, generations, strict=True):
                        texts[index] = generation.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, generation.text)
                    bar.update(len(some))
        return texts

    def _task_config(self, gen_kwargs: dict[str, Any]) -> GenerationConfig:
        options = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        stop, max_new_tokens = options.pop("until"), options.pop("max_gen_toks")
        if not options.pop("do_sample", True):
            options["temperature"] = 0.0
        if options.get("top_k") == 0:  # off
            del options["top_k"]
        check_option_names(options, _OF_TASK, what="generation_kwargs")
        stop = tuple(text for text in stop if text)
        return self._generation_config.merge(stop=stop, max_new_tokens=max_new_tokens, **options)

    def _encode_context(self, context: str, config: GenerationConfig) -> list[int]:
        room = self.max_length - config.max_new_tokens
        if room < 1:
            expected = f"fewer than the context of {self.max_length} tokens"
            raise ArgumentError("max_gen_toks", expected, config.max_new_tokens)
        return self.tok_encode(context, left_truncate_len=room)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
