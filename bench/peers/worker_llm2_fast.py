"""llm2_fast: the cpu backend, plain or with one kind of verifier."""

from __future__ import annotations

from typing import Any

import torch
from worker import Worker

import llm2_fast
from llm2_fast import GenerationConfig
from llm2_fast.sequence import Sequence


class Llm2FastWorker(Worker):
    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["num_threads"])
        loading = {name: options[name] for name in ("dtype", "quantization") if name in options}
        self.name = f"llm2_fast {llm2_fast.__version__}"
        self._engine = llm2_fast.load(
            options["model"],
            options.get("verifier"),
            backend="cpu",
            max_batch_size=options["max_batch_size"],
            **loading,
        )

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        results = self._engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True, alpha=0.1)
        histogram = [item for result in results for item in result.stats.candidate_histogram.items()]
        steps = sum(count for _, count in histogram)
        return {
            "tokens": sum(len(result.samples[0].token_ids) for result in results),
            "mean |C|": round(sum(size * count for size, count in histogram) / steps, 2) if steps else None,
        }

    def argmax(self, prompt: list[int], continuation: list[int]) -> list[int]:
        backend = self._engine._backend
        sequence = Sequence(0, 0, GenerationConfig(), prompt)
        backend.prefill([sequence])
        found = []
        for token in continuation:
            (output,) = backend.step([sequence])
            found.append(output.token_id)
            sequence.token_ids.append(token)
        backend.free(sequence)
        return found


if __name__ == "__main__":
    Llm2FastWorker.serve()
