"""llama.cpp through its C API: greedy decoding with no more of Python between the steps than needed."""

from __future__ import annotations

from typing import Any

import llama_cpp
from worker import Worker

_MAX_ROWS = 512  # of a pass


class LlamaCppWorker(Worker):
    def __init__(self, options: dict[str, Any]) -> None:
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(options["gguf"].encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options["max_length"] * options["max_batch_size"]
        params.n_batch = params.n_ubatch = _MAX_ROWS
        params.n_seq_max = options["max_batch_size"]
        params.n_threads = params.n_threads_batch = options["num_threads"]
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self._batch = llama_cpp.llama_batch_init(_MAX_ROWS, 0, 1)

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        self._clear()
        count = len(prompts)
        tokens = []
        for sequence, prompt in enumerate(prompts):
            self._run([(token, i, sequence, i + 1 == len(prompt)) for i, token in enumerate(prompt)])
            tokens.append(self._sample(-1))
        for step in range(1, new_tokens):
            self._run([(tokens[s], len(prompts[s]) + step - 1, s, True) for s in range(count)])
            tokens = [self._sample(s) for s in range(count)]
        return {"tokens": new_tokens * count}

    def argmax(self, prompt: list[int], continuation: list[int]) -> list[int]:
        self._clear()
        tokens = prompt + continuation[:-1]
        self._run([(token, i, 0, i + 1 >= len(prompt)) for i, token in enumerate(tokens)])
        return [self._sample(i) for i in range(len(prompt) - 1, len(tokens))]

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One pass over rows (token, position, sequence, logits wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _sample(self, row: int) -> int:
        return llama_cpp.llama_sampler_sample(self._sampler, self._context, row)


if __name__ == "__main__":
    LlamaCppWorker.serve()
