"""transformers: `generate`, or LLM2 as one would first write it (bench/naive.py), which takes one prompt at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import worker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import naive

from llm2_fast.verifier import Verifier


def start(options: dict[str, Any]) -> tuple[worker.Decode, dict[str, Any]]:
    torch.set_num_threads(options["num_threads"])
    dtype = getattr(torch, options["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # `generate` has no switch for this
    model.generation_config.pad_token_id = 0
    verifier = options.get("verifier")
    verifier = None if verifier is None else Verifier.from_pretrained(verifier, dtype=dtype)

    def plainly(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        return {"tokens": output[:, width:].numel()}

    def verified(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        network = getattr(verifier, "network", model.base_model)  # a head's network is the model
        counts: list[int] = []
        for prompt in prompts:
            _, sizes = naive.generate(model, naive.NaiveVerifier(network, head), prompt, max_new_tokens=new_tokens)
            counts += sizes
        return {"tokens": len(counts), "mean |C|": round(sum(counts) / len(counts), 2)}

    def head(hidden_states: torch.Tensor) -> torch.Tensor:
        if hasattr(verifier, "network"):
            return hidden_states @ verifier.head.weight.float().T
        return verifier.head([hidden_states])[:, None]

    decode = plainly if verifier is None else torch.no_grad()(verified)
    return decode, {"engine": f"transformers {transformers.__version__}"}


if __name__ == "__main__":
    worker.serve(start)
