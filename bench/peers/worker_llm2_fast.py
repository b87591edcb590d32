"""llm2_fast: the cpu backend, plain or with one kind of verifier."""

from __future__ import annotations

from typing import Any

import torch
import worker

import llm2_fast


def start(options: dict[str, Any]) -> tuple[worker.Decode, dict[str, Any]]:
    torch.set_num_threads(options["num_threads"])
    loading = {name: options[name] for name in ("dtype", "quantization") if name in options}
    engine = llm2_fast.load(
        options["model"], options.get("verifier"), backend="cpu", max_batch_size=options["max_batch_size"], **loading
    )

    def decode(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        results = engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True, alpha=0.1)
        histogram = [item for result in results for item in result.stats.candidate_histogram.items()]
        steps = sum(count for _, count in histogram)
        return {
            "tokens": sum(len(result.samples[0].token_ids) for result in results),
            "mean |C|": round(sum(size * count for size, count in histogram) / steps, 2) if steps else None,
        }

    return decode, {"engine": f"llm2_fast {llm2_fast.__version__}"}


if __name__ == "__main__":
    worker.serve(start)
