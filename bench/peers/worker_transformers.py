"""transformers: `generate`, or LLM2 as one would first write it (bench/naive.py), which takes one prompt at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from worker import Worker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import naive

from llm2_fast.verifier import Verifier


class TransformersWorker(Worker):
    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["num_threads"])
        self.name = f"transformers {transformers.__version__}"
        dtype = getattr(torch, options["dtype"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None  # `generate` has no switch for this
        self._model.generation_config.pad_token_id = 0
        verifier = options.get("verifier")
        self._verifier = None if verifier is None else Verifier.from_pretrained(verifier, dtype=dtype)

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        if self._verifier is not None:
            return self._decode_verified(prompts, new_tokens)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        return {"tokens": output[:, width:].numel()}

    @torch.no_grad()
    def argmax(self, prompt: list[int], continuation: list[int]) -> list[int]:
        logits = self._model(torch.tensor([prompt + continuation])).logits[0]
        return logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()

    def _decode_verified(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        counts: list[int] = []
        for prompt in prompts:
            verifier = naive.NaiveVerifier.of(self._model, self._verifier)
            counts += naive.generate(self._model, verifier, prompt, max_new_tokens=new_tokens)[1]
        return {"tokens": len(counts), "mean |C|": round(sum(counts) / len(counts), 2)}


if __name__ == "__main__":
    TransformersWorker.serve()
